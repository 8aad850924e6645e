"""Records: read from JSON as they are, split by their images, and checked before the training."""

import json
import pickle

import pytest
from conftest import N, record_of

from support.errors import UserError
from support import records as records_module
from support.records import Records, read_records, select_usable_records, split_records


def contents(records):
    return [records[i] for i in range(len(records))]


VALUE = [{"id": 1, "text": 'olive é 🙂 " ] } \\'}, {"id": "two", "nested": {"a": [1, {"b": None}]}}, {},
         {"id": 4, "half a character": "\ud83d"}]


@pytest.mark.parametrize("text", [json.dumps(VALUE), "\ufeff  " + json.dumps(VALUE, indent=3) + "\r\n\n",
                                  json.dumps(VALUE[:3], ensure_ascii=False)])
def test_records_are_those_of_json(tmp_path, text):
    (tmp_path / "chat.json").write_bytes(text.encode())
    records, value = read_records(tmp_path / "chat.json"), json.loads(text.strip("\ufeff"))
    value[2]["id"] = "number 3 of chat.json"  # so that a sentence about it says where it is
    assert contents(records) == value and contents(records.subset([1, 0])) == [value[1], value[0]]
    assert contents(pickle.loads(pickle.dumps(records))) == value  # as a spawned worker gets it


@pytest.mark.parametrize("content", [
    b'[{"id": 1}, {"id": 2', b'{"n": 1, "data": [{"id": 1}]}', b'{"id": 1}\n{"id": 2}\n', b"<html>404</html>",
    b'[{"id": 1}, 7]', b"[]"])
def test_a_file_that_is_no_list_of_records_is_refused_with_its_first_characters(tmp_path, content):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(UserError, match="chat.json is not a JSON list of records.*begins with") as error:
        read_records(tmp_path / "chat.json")
    assert repr(content) in str(error.value)


def test_a_git_lfs_pointer_in_place_of_the_file_is_named_as_such(tmp_path):
    (tmp_path / "chat.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_records(tmp_path / "chat.json")


def split(records, limit=0, seed=0):
    """Returns (training, held-out) records as lists, with 10 images held out."""
    return [contents(part) for part in split_records(Records(records, "chat.json"), 10, limit, seed)]


def images_of(records):
    return {record["image"] for record in records if "image" in record}


MANY = [record_of("What is it?", f"It is {i}.", image=f"{i // 2}.png", id=str(i)) for i in range(2000)]


def test_no_held_out_image_is_trained_on_and_all_other_records_are(capsys):
    train, heldout = split(MANY)
    assert len(heldout) == len(images_of(heldout)) == 10 and not images_of(train) & images_of(heldout)
    assert [record for record in MANY if record["image"] not in images_of(heldout)] == sorted(
        train, key=lambda record: int(record["id"])) != train  # in a random order
    assert "2,000 records, of which 10 are held out; 10 others show the same" in capsys.readouterr().out
    assert split(MANY) == [train, heldout]
    assert len(set.union(*(images_of(split(MANY, seed=seed)[1]) for seed in range(3)))) > 20


def test_limit_takes_records_and_not_images():
    """A limit of images would train on both records of half as many images."""
    train, heldout = split(MANY, limit=400)
    assert 330 < len(images_of(train)) < 390  # 360 are expected
    assert heldout == split(MANY)[1] and train == split(MANY)[0][:400]


@pytest.mark.parametrize("fields", [{"id": "text"}, {"id": 0}, {"id": None}, {"image": None}, {"image": ""}])
def test_a_record_without_an_image_is_never_held_out(fields):
    texts = [{**record_of("What is it?", f"It is {i}."), **fields} for i in range(60)]
    for seed in range(5):
        train, heldout = split(MANY[:40] + texts, seed=seed)
        assert len([record for record in train if not record.get("image")]) == 60 and len(train) == 60 + 20
        assert len(images_of(heldout)) == 10


@pytest.mark.parametrize("records, message", [
    (MANY[:20], "10 different images, so --heldout 10 leaves none to train on"),
    ([record_of("Who?", "A cat.")], '"image" must name its file')])
def test_a_split_that_leaves_nothing_is_refused(records, message):
    with pytest.raises(UserError, match=message):
        split(records)


def check(dataset, **options):
    return select_usable_records(dataset.records, dataset.template, dataset.max_length, **options)


def test_the_check_names_unusable_records_by_their_reason_and_leaves_them_out(dataset_of, capsys):
    records = [record_of("Who?", "A ."), record_of("Who?", " ", id="two"),
               record_of("Who?", "A .", image="red.png"), record_of("Who?", "", id="four"),
               record_of("Who?", "A ." * 400, id="five"), record_of("Who?", "A ." * 20),
               record_of("Who?", "A .", image="none.png", id="six")]
    usable, lengths = check(dataset_of(records))
    assert contents(usable) == [records[i] for i in (0, 2, 5)]
    assert lengths[1] >= lengths[0] + N and lengths[2] > lengths[0]
    out = capsys.readouterr().out
    for words in ("2 unusable: an empty answer\n    record 'two'", "\n    record 'four'",
                  "1 unusable: too long", "\n    record 'five'", "1 unusable: image missing\n"):
        assert words in out
    for chosen, message in (
            (records, "4 of 7 records .* cannot be used: see the reasons above; --allow-bad"),
            (records[-1:], "1 of 1 records .* cannot be used: is .* the right place of the images")):
        with pytest.raises(UserError, match=message):
            check(dataset_of(chosen), allow_bad=0.5)


def test_the_length_of_a_record_that_is_cut_is_that_after_the_cut(dataset_of):
    """Otherwise it would be taken for the longest, and a long micro-batch would run out of memory later."""
    cut = record_of("Who?", "A .", "And?", "A . " * 400)
    dataset = dataset_of([cut, record_of("Who?", "A . " * 40)], max_length=200)
    _, lengths = check(dataset)
    assert lengths[0] == len(dataset[0]["input_ids"]) < lengths[1]


def test_the_check_opens_the_images_of_few_records_and_of_all_if_it_must(dataset_of, monkeypatch):
    """A photo of an iPhone that is called .jpg would otherwise end a training on 50 photos hours later."""
    dataset = dataset_of([record_of("Who?", "A .", image=name) for name in ("red.png", "web.png")])
    (dataset.records.images.root / "web.png").write_text("<html>404</html>")
    assert len(check(dataset)[0]) == 1
    monkeypatch.setattr(records_module, "MAX_CHECKED", 1)
    assert len(check(dataset)[0]) == 2 and len(check(dataset, thorough=True)[0]) == 1


def test_a_short_record_whose_text_the_template_changes_is_found_by_the_check(dataset_of, monkeypatch):
    """Otherwise the next record would stand in for it among the held-out ones."""
    def render(*args, **options):
        return original(*args, **options).replace("Ok", "No")

    dataset = dataset_of([record_of("Who?", answer, image="red.png") for answer in ("A .", "Ok .")])
    original = dataset.template.render
    monkeypatch.setattr(dataset.template, "render", render)
    assert contents(check(dataset, thorough=True)[0]) == contents(dataset.records)[:1]
