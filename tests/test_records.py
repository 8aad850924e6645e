"""Records: read from JSON as they are, held out by their identity, and checked before the training."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
import gzip
import json
import pickle

import pytest
from conftest import N, draw, record_of

from support.check_records import check_records, print_check_result
from support.errors import UserError
from support.records import RecordFile, describe_records, open_records, reopen_heldout


def contents(records):
    return [records[i] for i in range(len(records))]


# -- the file ----------------------------------------------------------------------------------------------

VALUE = [{"id": 1, "text": 'olive é 🙂 " ] } \\'}, {"id": 2, "nested": {"a": [1, {"b": []}]}},
         {"id": "three", "x": None}]


@pytest.mark.parametrize("text", [
    json.dumps(VALUE),
    json.dumps(VALUE, ensure_ascii=False, indent=3),
    "\ufeff  " + json.dumps(VALUE, ensure_ascii=False) + "\n\n",
    json.dumps(VALUE).replace("}, {", "}\r\n,\t{"),
    "\n".join(json.dumps(record, ensure_ascii=False) for record in VALUE),  # JSON lines
    "\ufeff\n" + "\r\n\n".join(map(json.dumps, VALUE)) + "\n",
])
def test_records_are_those_of_json(tmp_path, text):
    path = tmp_path / "chat.json"
    path.write_bytes(text.encode())
    records = RecordFile(path)
    assert [records[i] for i in range(len(records))] == VALUE
    again = pickle.loads(pickle.dumps(records))  # with its file open already, as a spawned worker gets it
    assert [again[i] for i in (2, 0)] == [VALUE[2], VALUE[0]]


NOT_RECORDS = {  # name: (content, what the sentence says)
    "truncated": (b'[{"id": 1}, {"id": 2', "1 complete"),
    "without a comma": (b'[{"id": 1} {"id": 2}]', "comma is missing.*1 complete"),
    "a list in an object": (b'{"n": 1, "data": [{"id": 1}]}',
                            r"one JSON object \('n', 'data'\) instead of a list"),
    "web page": (b"<html>404</html>", "is a web page"),
    "CSV": (b"id,image,question\n1,a.jpg,What?\n", r"is a table \(CSV"),
    "Parquet": (b"PAR1\x15\x04\xff\xfe", "is a Parquet file"),
    "gzip": (gzip.compress(b"[]"), "is compressed by gzip: unpack it"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
    "half a JSON line": (b'{"id": 1}\n{"id": 2', "1 complete"),
    "number": (b'[{"id": 1}, 7]', "entry 2"),
    "no records": (b"[]", "no records"),
    "not UTF-8": (b'[{"id": "\xff"}]', "UTF-8"),
    "UTF-16": ('[{"ä": 1}]'.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
}


@pytest.mark.parametrize("content, message", NOT_RECORDS.values(), ids=NOT_RECORDS)
def test_a_file_that_is_no_list_of_records_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        RecordFile(tmp_path / "chat.json")
    assert "chat.json" in str(error.value) and "\n" not in str(error.value)


# -- the held-out records ----------------------------------------------------------------------------------


def test_no_image_of_a_held_out_record_is_trained_on(split):
    chosen, three_each = [], [record_of("What?", "This.", image=f"{i % 10}.png") for i in range(30)]
    for limit in (0, 5):
        train, heldout = split(three_each, heldout=4, limit=limit)
        names = [{record["image"] for record in contents(records)} for records in (train, heldout)]
        assert len(names[1]) == len(heldout) == 4 and not names[0] & names[1]
        assert len(train) == (limit or 3 * 6)  # all three records of each of the other six images
        chosen.append(heldout.indices.tolist())
    assert chosen[0] == chosen[1]


MANY = [record_of("<image>\nWhat is it?", f"It is {i}.", image=f"{i // 2}.png", id=str(i))
        for i in range(200)]


@pytest.fixture
def split(tmp_path):
    """split([record, …]) writes them to chat.json and returns open_records() of it, with 10 held out."""
    def make(records, **changes):
        (tmp_path / "chat.json").write_text(json.dumps(records))
        names = dict(data=tmp_path / "chat.json", images=tmp_path, heldout_data=None, heldout_images=None)
        return open_records(SimpleNamespace(**names, **{**dict(heldout=10, limit=0, seed=0), **changes}))

    return make


def test_the_held_out_records_survive_sorting_appending_and_deleting(split):
    before = contents(split(MANY)[1])
    assert contents(split(MANY[::-1])[1]) == before
    new = [record_of("<image>\nWhat is it?", "New.", image=f"new {i}.png", id=f"new {i}") for i in range(5)]
    after = contents(split(MANY + new)[1])
    assert [record for record in after if record not in new] == before[:10 - sum(r in new for r in after)]
    kept = [record for record in MANY if int(record["id"]) % 7]
    after = contents(split(kept)[1])
    assert {r["image"] for r in before if r in kept} <= {r["image"] for r in after}


def test_another_seed_holds_out_other_records(split):
    sets = [{record["image"] for record in contents(split(MANY, seed=seed)[1])} for seed in range(3)]
    assert len(set.union(*sets)) > 20


def test_a_record_without_an_image_is_held_out_by_its_id_or_else_by_its_text(split):
    by_id = [record_of("Who?", f"A cat, {i}.", id=i % 20) for i in range(40)]
    train, heldout = split(by_id)
    assert not {r["id"] for r in contents(train)} & {r["id"] for r in contents(heldout)}
    without = [{"conversations": record_of("Who?", f"A cat, {i}.")["conversations"]} for i in range(40)]
    train, heldout = split(without)
    assert (len(train), len(heldout)) == (30, 10)


CHANGES = {  # name: (the new file, what the sentence says)
    "the same": (MANY, None),
    "written by another program": (json.dumps(MANY, indent=3, sort_keys=True), "as many records, and none"),
    "with more keys": ([{**record, "width": 640} for record in MANY], "as many records, and none of the 10"),
    "appended": (MANY + [record_of("<image>\nWhat is it?", f"New {i}.", image=f"{i}.png", id=f"new {i}")
                         for i in range(100)], "100 more records, and none of the 10"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_run_is_evaluated_on_exactly_its_held_out_records(split, tmp_path, capsys, change, message):
    train, heldout = split(MANY)
    expected = [record["conversations"] for record in contents(heldout)]
    described = json.loads(json.dumps(describe_records(train, heldout)))
    assert described["trained_on"] == {"count": 180, "hash": train.fingerprint()}
    (tmp_path / "chat.json").write_text(change if isinstance(change, str) else json.dumps(change))
    again = contents(reopen_heldout(tmp_path / "chat.json", tmp_path, described))
    assert [record["conversations"] for record in again] == expected
    out = capsys.readouterr().out
    assert out.count("\n") == bool(message) and (message or "") in out


def test_held_out_records_that_are_gone_are_counted_and_none_left_is_an_error(split, tmp_path, capsys):
    train, heldout = split(MANY)
    described = describe_records(train, heldout)
    first, second, *others = old = contents(heldout)
    changed = [record for record in MANY if record != first]
    changed[changed.index(second)] = {**second, "conversations": first["conversations"]}
    (tmp_path / "chat.json").write_text(json.dumps(changed))
    assert contents(reopen_heldout(tmp_path / "chat.json", tmp_path, described)) == others
    assert "1 fewer records, and 2 of the 10 held-out records are gone or changed" in capsys.readouterr().out
    (tmp_path / "chat.json").write_text(json.dumps([r for r in MANY if r not in old]))
    with pytest.raises(UserError, match="contains none of the 10 records.*train again"):
        reopen_heldout(tmp_path / "chat.json", tmp_path, described)


def test_the_other_records_of_an_unchanged_file_are_not_parsed(split, tmp_path, monkeypatch):
    described = describe_records(*split(MANY))
    monkeypatch.setattr(RecordFile, "_find_records", lambda self, content: pytest.fail("parses every record"))
    assert len(reopen_heldout(tmp_path / "chat.json", tmp_path, described)) == 10


def test_the_hash_of_the_training_records_changes_with_their_text(split):
    hashes = [split(records)[0].fingerprint() for records in (
        MANY, MANY[::-1], json.loads(json.dumps(MANY).replace("It is 1", "It was 1")))]
    assert hashes[0] == hashes[1] != hashes[2]


# -- the check ---------------------------------------------------------------------------------------------


def test_the_check_counts_images_and_those_found_by_the_id_of_their_record(dataset_of, template, capsys):
    dataset = dataset_of([record_of("Who?", "A ."), record_of("Who?", "A .", image="red.png"),
                          record_of("Who?", "A .", image=["red.png"]), record_of("Who?", "A .", image=""),
                          {**record_of("Who?", "A ."), "id": "by id"}])
    draw("red").save(dataset.records.images.root / "by id.jpg")
    print_check_result(dataset.records, check_records(dataset.records, template, N, 500))
    expected = "  3 with an image, of which 1 are found by their id; 2 without an image"
    assert expected in capsys.readouterr().out


def test_several_processes_share_the_check_and_all_get_the_same_result(dataset_of, template):
    dataset = dataset_of([record_of("Who?", f"A cat {'.' * i}" if i % 3 else "") for i in range(7)])
    parts, both_have_checked = {}, threading.Barrier(2)

    def check(rank):
        def gather(part):
            parts[rank] = part
            both_have_checked.wait(60)
            return [parts[0], parts[1]]

        processes = SimpleNamespace(rank=rank, world_size=2, gather=gather)
        return check_records(dataset.records, template, N, 500, processes=processes)

    with ThreadPoolExecutor(2) as pool:
        results = [check_records(dataset.records, template, N, 500), *pool.map(check, range(2))]
    assert [len(parts[rank]) for rank in range(2)] == [4, 3]
    for result in results:
        assert result.usable.indices.tolist() == [1, 2, 4, 5]
        assert result.lengths.tolist() == results[0].lengths.tolist()
        assert result.failures == results[0].failures and len(*result.failures.values()) == 3
