"""From a record to ids, labels and pixels: exactly what should be trained is trained."""

import io
import json
import multiprocessing
import os
import pickle
import random
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COLORS, N, SHARED, draw, preprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data import IGNORE_INDEX, IMAGE_TOKEN, ChatDataset, ChatTemplate, collate
from support.check_records import check_records, print_checked
from support.checkpoints import Progress
from support.errors import BadRecord, UserError
from support.files import WorkerFile
from support.images import ImageStore, decode_image
from support.pretrained import load_image_processor
from support.records import RecordFile, RecordSet, describe_records, open_records, reopen_heldout
from support.step_batches import plan_steps

PHOTOS = sorted((SHARED / "photos").glob("*.jpg"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def record_of(*texts, **more):
    """Returns a record whose turns, human first, have these values."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "one", "conversations": turns, **more}


def runs_of(labels):
    """Returns the runs of consecutive labeled tokens, as lists."""
    runs, inside = [], False
    for label in labels:
        if label != IGNORE_INDEX:
            runs = runs if inside else [*runs, []]
            runs[-1].append(label)
        inside = label != IGNORE_INDEX
    return runs


@pytest.fixture(scope="session", params=["tiny", "TinyLlama's"])
def any_template(request, parts):
    """The template of the tiny tokenizer, and the real one if shared/ exists."""
    return ChatTemplate(parts.llm if request.param == "tiny" else request.getfixturevalue("real").llm)


CONVERSATION = [
    user("<image>\nWhat object is shown?"), assistant("olive oil ."),
    user("Is it red?"), assistant("No, it is\n\nsolid cold."),
    user("Sure?"), assistant("Yes"),
]


# -- the mask ----------------------------------------------------------------------------------------------


def test_labels_are_each_answer_and_its_end_token_in_every_turn(any_template):
    ids, labels = any_template.encode(CONVERSATION, N)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    answers = runs_of(labels)
    assert [run[-1] for run in answers] == [any_template.tokenizer.eos_token_id] * 3
    texts = [any_template.tokenizer.decode(run[:-1]) for run in answers]
    assert texts == ["olive oil .", "No, it is\n\nsolid cold.", "Yes"]


def test_image_question_and_the_newline_after_an_answer_are_not_trained(any_template):
    ids, labels = any_template.encode(CONVERSATION, N)
    untrained = [token for token, label in zip(ids, labels) if label == IGNORE_INDEX]
    assert untrained.count(any_template.image_token_id) == N
    assert any_template.tokenizer.decode(untrained) == (
        "<s> <|user|>\n" + IMAGE_TOKEN * N + "\nWhat object is shown?</s>\n<|assistant|>\n"
        "\n<|user|>\nIs it red?</s>\n<|assistant|>\n\n<|user|>\nSure?</s>\n<|assistant|>\n\n")


def test_a_prompt_is_a_prefix_of_its_training_sequence(any_template):
    ids, labels = any_template.encode(CONVERSATION, N)
    for k in (1, 3, 5):
        prompt = any_template.encode_prompt(CONVERSATION[:k], N)
        assert ids[:len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORE_INDEX == labels[len(prompt) - 1]  # the answer begins there


def test_ids_are_those_of_the_tokenizers_own_template_after_the_first_token(any_template):
    template, plain = any_template, AutoTokenizer.from_pretrained(any_template.tokenizer.name_or_path)

    def expected(messages, **how):
        ids = plain.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
        return [plain.bos_token_id] + ids

    only_text = [user("Which oil?"), *CONVERSATION[1:]]
    assert template.encode(only_text, N)[0] == expected(only_text)
    assert template.encode_prompt(only_text[:3], N) == expected(only_text[:3], add_generation_prompt=True)

    plain.add_tokens([IMAGE_TOKEN], special_tokens=True)
    theirs = expected(CONVERSATION)
    at = theirs.index(len(plain) - 1)
    assert template.encode(CONVERSATION, N)[0] == theirs[:at] + [theirs[at]] * N + theirs[at + 1:]


def test_tinyllama_reads_olive_oil_as_it_does_after_a_newline(real):
    template = ChatTemplate(real.llm)
    words = template.tokenizer.convert_ids_to_tokens
    alone = template.tokenizer("olive oil", add_special_tokens=False)["input_ids"]
    assert words(alone) == ["▁o", "live", "▁oil"]
    ids, labels = template.encode([user("<image>\nDescribe it."), assistant("olive oil is healthy .")], 256)
    assert words(runs_of(labels)[0]) == ["ol", "ive", "▁oil", "▁is", "▁health", "y", "▁.", "</s>"]
    assert (ids[0], ids.count(1), ids.count(template.image_token_id)) == (1, 1, 256)
    assert template.image_token_id == 32_000  # outside the LLM's vocabulary


# Pieces that look like something with a meaning to the tokenizer, to the template or to the record's format.
PIECES = st.one_of(st.text(max_size=12), st.sampled_from([
    "</s>", "<s>", "<unk>", "<|user|>\n", "<|assistant|>\n", "\n", " ", "  ", "olive", "🙂", "é", "<0x0A>",
    "{{ eos_token }}", "<", ">", "s", "/", "s>", "</", "\t", "\u3000", "אב"]))
# The tokenizer decodes ▁ to a space.
TEXTS = st.lists(PIECES, max_size=5).map("".join).filter(lambda text: "▁" not in text)
TURNS = st.lists(st.tuples(TEXTS.filter(lambda text: IMAGE_TOKEN not in text),
                           st.one_of(TEXTS.filter(str.strip), TEXTS.map(lambda text: text + IMAGE_TOKEN))),
                 min_size=1, max_size=3)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(turns=TURNS, image_in=st.sampled_from(["nowhere", "front", "back", "second turn"]))
def test_any_conversation_is_labeled_on_its_answers_only(template, turns, image_in):
    texts = [text for turn in turns for text in turn]
    if image_in in ("front", "back"):
        texts[0] = f"<image>\n{texts[0]}" if image_in == "front" else f"{texts[0]}\n<image>"
    elif image_in == "second turn" and len(turns) > 1:
        texts[2] += "<image>"
    messages = template.to_messages(record_of(*texts), has_image=True)
    assert sum(IMAGE_TOKEN in message["content"] for message in messages) == 1
    ids, labels = template.encode(messages, N)
    assert ids.count(template.image_token_id) == N
    assert ids.count(template.tokenizer.bos_token_id) == 1
    assert ids.count(template.end_token_id) == len(messages)  # one after each turn, none within

    answers, contents = runs_of(labels), [message["content"] for message in messages[1::2]]
    assert [run[-1] for run in answers] == [template.end_token_id] * len(turns)
    assert [template.tokenizer.decode(run[:-1]) for run in answers] == contents
    for content, (_, answer) in zip(contents, turns):
        assert content.replace(" ", "") == answer.strip().replace(" ", "")
    for k in range(1, len(messages), 2):
        prompt = template.encode_prompt(messages[:k], N)
        assert ids[:len(prompt)] == prompt and labels[len(prompt)] != IGNORE_INDEX


# -- records to messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?",
                                      "<image>What is it?", " What is it? <image> "])
def test_the_image_is_before_the_question_wherever_the_record_has_it(template, question):
    messages = template.to_messages(record_of(question, "A cat."), has_image=True)
    assert messages == [user("<image>\nWhat is it?"), assistant("A cat.")]


def test_an_image_of_a_later_turn_stays_there(template):
    record = record_of("Hello?", "Hi.", "And this?\n<image>", "A cat.")
    messages = template.to_messages(record, has_image=True)
    assert [m["content"] for m in messages] == ["Hello?", "Hi.", "<image>\nAnd this?", "A cat."]


def test_a_leading_answer_is_skipped_and_a_trailing_question_dropped(template):
    record = record_of("Who?", "A cat.", "Where?")
    record["conversations"].insert(0, {"from": "gpt", "value": "an answer to nothing"})
    assert template.to_messages(record, has_image=False) == [user("Who?"), assistant("A cat.")]


@pytest.mark.parametrize("has_image, change", [
    (True, {"conversations": None}),
    (True, {"conversations": []}),
    (True, {"conversations": ["a", "b"]}),
    (True, record_of("only a question")),
    (True, {"conversations": [{"from": "gpt", "value": "a"}]}),
    (True, record_of("<image> <image>", "two")),
    (True, record_of("<image>", "a", "<image>", "b")),
    (False, record_of("<image>\nWhat?", "no image")),
    (True, {"conversations": [{"from": "human", "value": "a"}] * 2}),
    (True, {"conversations": [{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}]}),
    (True, {"conversations": [{"from": "human", "value": "a"}, {"from": ["gpt"], "value": "b"}]}),
    (True, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}),
    (True, {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}),
    (True, record_of("a", " \n")),
])
def test_a_record_that_is_no_conversation_is_refused_by_its_id(template, has_image, change):
    with pytest.raises(UserError, match="'number 17'"):
        template.to_messages({**change, "id": "number 17"}, has_image)


@pytest.mark.parametrize("literal", ["</s>", "<s>", "<unk>", "<image>"])
def test_a_literal_special_token_in_a_text_stays_text(any_template, literal):
    question = f"What does {literal if literal != '<image>' else 'it'} mean?"
    record = record_of(question, f"It is {literal} and more {literal}")
    messages = any_template.to_messages(record, has_image=False)
    ids, labels = any_template.encode(messages, N)
    tokenizer = any_template.tokenizer
    assert ids.count(any_template.image_token_id) == ids.count(tokenizer.unk_token_id) == 0
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(runs_of(labels)[0][:-1]).endswith("more " + literal[0] + " " + literal[1:])


# -- samples -----------------------------------------------------------------------------------------------


@pytest.fixture
def dataset_of(tmp_path, template, image_processor):
    """dataset_of([record, …], max_length=…) returns a ChatDataset with red.png among its images."""
    (tmp_path / "images").mkdir()
    draw("red").save(tmp_path / "images" / "red.png")

    def make(records, max_length=500):
        (tmp_path / "chat.json").write_text(json.dumps(records))
        records = RecordSet(RecordFile(tmp_path / "chat.json"), ImageStore(tmp_path / "images"),
                            np.arange(len(records)))
        return ChatDataset(records, template, image_processor, N, max_length)

    return make


LONG = record_of("<image>\nWhat is it?", "olive oil .", "Where?", "on a table .", "Sure?", "Yes .",
                 image="red.png")


def test_a_conversation_that_is_too_long_loses_whole_last_turns(dataset_of, template):
    ids, labels = dataset_of([LONG]).encode(LONG)
    ends = [t for t, label in enumerate(labels) if label == template.end_token_id]
    for max_length in range(ends[0] + 1, len(ids)):
        whole = sum(end < max_length for end in ends)  # answers that fit with their end token
        short_ids, short_labels = dataset_of([LONG], max_length).encode(LONG)
        assert len(short_ids) <= max_length
        assert short_ids == ids[:ends[whole - 1] + 1] and short_labels == labels[:ends[whole - 1] + 1]
        assert short_ids.count(template.image_token_id) == N
    with pytest.raises(UserError, match="'one'.*--max-length"):
        dataset_of([LONG], ends[0]).encode(LONG)


def test_a_record_whose_image_would_be_cut_away_is_refused(dataset_of):
    """Otherwise its pixel values would have no positions, and training would end there."""
    record = record_of("Hello?", "Hi .", "What is this?\n<image>", "A red circle on a table .",
                       image="red.png")
    dataset = dataset_of([record], max_length=40)
    assert len(dataset_of([record]).encode(record)[0]) > 40
    with pytest.raises(UserError, match="--max-length"):
        dataset.encode(record)


def test_a_record_without_an_image_is_only_text(dataset_of, template):
    sample = dataset_of([record_of("Who?", "A cat .")])[0]
    assert sample["pixel_values"] is None and template.image_token_id not in sample["input_ids"]


def test_half_an_emoji_in_a_text_makes_that_record_unusable_and_no_other(dataset_of, template):
    """json.loads turns the escape \\ud83d, which is left where a text was cut, into a lone surrogate."""
    record = record_of("Who?", "A cat \ud83d")
    dataset = dataset_of([record, record_of("Who?", "A cat .")])
    checked = check_records(dataset.records, template, N, 500)
    assert checked.usable.indices.tolist() == [1]
    assert "a character that no text should have" in checked.failures
    sample = dataset[0]
    assert sample["input_ids"] == dataset[1]["input_ids"] and len(sample["skipped"]) == 1


def test_a_conversation_of_hundreds_of_turns_is_encoded_quickly(template):
    messages = [user("Who is it, then?"), assistant("A cat .")] * 500
    started = time.perf_counter()
    ids, labels = template.encode(messages, N)
    assert time.perf_counter() - started < 2  # 9 s, if each answer rendered all turns before it
    assert labels.count(template.end_token_id) == 500
    alone = template.encode(messages[:2], N)[1]
    labeled = [label for label in alone if label != IGNORE_INDEX]
    assert [label for label in labels if label != IGNORE_INDEX] == 500 * labeled


def test_a_question_of_a_later_turn_is_asked_with_the_image_in_front(dataset_of, template):
    prompt, reference = dataset_of([LONG]).make_prompt(0, turn=1)
    assert reference == "on a table ." and prompt["pixel_values"].shape == (3, 28, 28)
    assert prompt["input_ids"] == template.encode_prompt([user("<image>\nWhere?")], N)


def test_padding_is_masked_by_its_position_so_end_tokens_stay_although_they_are_the_padding(template):
    conversations = [user("Who?"), assistant("A cat .")], [user("Who is it, then?"), assistant("I .")]
    samples = [dict(zip(("input_ids", "labels"), template.encode(messages, N)), pixel_values=None)
               for messages in conversations]
    # Cut after the end token, as ChatDataset.encode() does. The row's last token is then the
    # padding token.
    samples[0] = {key: value and value[:-1] for key, value in samples[0].items()}
    assert samples[0]["input_ids"][-1] == template.tokenizer.pad_token_id
    batch = collate(samples, template.tokenizer.pad_token_id)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"]
        assert batch["labels"][row, :length].tolist() == sample["labels"]
        assert batch["attention_mask"][row].tolist() == [t < length for t in range(batch["labels"].shape[1])]
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert batch["labels"][0, len(samples[0]["labels"]) - 1] == template.end_token_id


def test_prompts_are_padded_on_the_left():
    prompts = [{"input_ids": [5, 6, 7], "pixel_values": None}, {"input_ids": [8], "pixel_values": None}]
    batch = collate(prompts, 2, padding_side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [False, False, True]]
    assert "labels" not in batch and len(batch["pixel_values"]) == 0


# -- pixels ------------------------------------------------------------------------------------------------


def noise(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(28, 28), (29, 28), (28, 29), (37, 91), (91, 37), (5, 3), (1, 1), (27, 28),
                                  (640, 427), (427, 640), (300, 11), (2, 190), (1001, 333)])
def test_pixels_of_a_sample_are_those_of_transformers_clip_processor(parts, dataset_of, tmp_path, size):
    theirs = CLIPImageProcessorPil.from_pretrained(parts.clip)
    noise(size).save(tmp_path / "images" / "noise.png")
    sample = dataset_of([record_of("What?", "noise", image="noise.png")])[0]
    assert sample["pixel_values"].shape == (3, 28, 28) and sample["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(sample["pixel_values"], preprocess(theirs, noise(size)), atol=0, rtol=0)


@pytest.mark.skipif(not PHOTOS, reason="needs shared/photos")
def test_pixels_of_photos_are_those_of_transformers_with_clips_own_settings(real):
    ours, theirs = load_image_processor(real.clip), CLIPImageProcessorPil.from_pretrained(real.clip)
    for path in PHOTOS:
        image = Image.open(path).convert("RGB")
        pixels = preprocess(ours, decode_image(path, path.name))
        assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, preprocess(theirs, image), atol=0, rtol=0)


# -- records -----------------------------------------------------------------------------------------------

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


def test_no_image_of_a_held_out_record_is_trained_on(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([record_of("<image>\nWhat?", "This.", image=f"{i % 10}.png")
                                for i in range(30)]))
    chosen = []
    for limit in (0, 5):
        train, heldout = open_records(path, tmp_path / "images", None, None, heldout=4, limit=limit, seed=0)
        names = [{records[i]["image"] for i in range(len(records))} for records in (train, heldout)]
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
        return open_records(**names, **{**dict(heldout=10, limit=0, seed=0), **changes})

    return make


def contents(records):
    return [records[i] for i in range(len(records))]


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
    "sorted": (MANY[::-1], "as many records, and none of the 10"),
    "with more keys": ([{**record, "width": 640} for record in MANY], "as many records, and none of the 10"),
    "appended": (MANY + [record_of("<image>\nWhat is it?", f"New {i}.", image=f"{i}.png", id=f"new {i}")
                         for i in range(100)], "100 more records, and none of the 10"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_run_is_evaluated_on_exactly_its_held_out_records(split, tmp_path, capsys, change, message):
    train, heldout = split(MANY)
    expected = [record["conversations"] for record in contents(heldout)]
    described = json.loads(json.dumps(describe_records(train, heldout)))
    assert described["trained_on"] == {"count": 180, "hash": train.records_hash()}
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
    monkeypatch.setattr(RecordFile, "_find_records", lambda self, text: pytest.fail("parses every record"))
    assert len(reopen_heldout(tmp_path / "chat.json", tmp_path, described)) == 10


def test_the_hash_of_the_training_records_changes_with_their_text(split):
    hashes = [split(records)[0].records_hash() for records in (
        MANY, MANY[::-1], json.loads(json.dumps(MANY).replace("It is 1", "It was 1")))]
    assert hashes[0] == hashes[1] != hashes[2]


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


def test_the_check_counts_images_and_those_found_by_the_id_of_their_record(dataset_of, template, capsys):
    dataset = dataset_of([record_of("Who?", "A ."), record_of("Who?", "A .", image="red.png"),
                          record_of("Who?", "A .", image=["red.png"]), record_of("Who?", "A .", image=""),
                          {**record_of("Who?", "A ."), "id": "by id"}])
    draw("red").save(dataset.records.images.root / "by id.jpg")
    print_checked(dataset.records, check_records(dataset.records, template, N, 500))
    expected = "  3 with an image, of which 1 are found by their id; 2 without an image"
    assert expected in capsys.readouterr().out


# -- images ------------------------------------------------------------------------------------------------


def zip_of(path, folder, top="", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for image in folder.iterdir():
            archive.write(image, top + image.name)
    return path


@pytest.mark.parametrize("top, method", [("", zipfile.ZIP_STORED), ("train2017/", zipfile.ZIP_DEFLATED)])
def test_a_folder_and_its_zip_hold_the_same_pictures(drawn, tmp_path, top, method):
    folder = ImageStore(drawn / "images")
    archive = ImageStore(zip_of(tmp_path / "images.zip", drawn / "images", top, method))
    for color in COLORS:
        name = f"{color}.png"
        one, other = folder.open({}, name), archive.open({}, name)
        assert one.size == other.size and one.tobytes() == other.tobytes()
        assert one.tobytes() == Image.open(drawn / "images" / name).convert("RGB").tobytes()
        assert archive.open({}, top + name).tobytes() == one.tobytes()


def test_a_picture_of_a_camera_held_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # blue on the left becomes blue on top
    image.save(tmp_path / "photo.png", exif=exif)
    opened = ImageStore(tmp_path).open({}, "photo.png")
    assert opened.size == (20, 40) and opened.getpixel((10, 5)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((7, 9), 200 * 257, np.uint16))
    else:
        image = Image.new("L", (9, 7), 200).convert(mode)
    image.save(tmp_path / "picture.tiff")
    opened = ImageStore(tmp_path).open({}, "picture.tiff")
    assert opened.mode == "RGB" and opened.size == (9, 7)
    expected = 255 if mode == "1" else 200
    assert all(abs(value - expected) <= 60 * (mode == "1") + 1 for value in opened.getpixel((0, 0)))


def test_half_a_zip_and_a_missing_folder_are_refused_in_one_sentence(drawn, tmp_path):
    (tmp_path / "images.zip").write_bytes((drawn / "images.zip").read_bytes()[:-100])
    with pytest.raises(UserError, match="images.zip"):
        ImageStore(tmp_path / "images.zip")
    with pytest.raises(UserError, match="nowhere"):
        ImageStore(tmp_path / "nowhere")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_share_a_zip_without_disturbing_each_other(drawn, template, image_processor, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    # A spawned worker must import everything, so there is only one.
    workers, samples = {"fork": (2, 200), "spawn": (1, 24)}[method]
    indices = np.random.default_rng(0).integers(0, 8, samples)
    records = RecordSet(RecordFile(drawn / "chat.json"), ImageStore(drawn / "images.zip"), indices)
    dataset = ChatDataset(records, template, image_processor, N, 500)
    expected = [dataset[i] for i in range(len(dataset))]  # this opens the files before the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=method)
    for sample, own in zip(loader, expected, strict=True):
        assert torch.equal(sample["pixel_values"], own["pixel_values"])
        assert sample["input_ids"] == own["input_ids"] and not sample["skipped"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_does_not_move_the_file_handle_of_its_parent(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    file = WorkerFile(tmp_path / "file")
    file.read(0, 10)  # opens it before the worker is forked
    before = os.lseek(file._file.fileno(), 0, os.SEEK_CUR)
    worker = multiprocessing.get_context("fork").Process(target=file.read, args=(500_000, 10))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert os.lseek(file._file.fileno(), 0, os.SEEK_CUR) == before


def test_pictures_can_be_read_from_memory():
    """decode_image() gets the members of a .zip file as open files."""
    file = io.BytesIO()
    draw("red").save(file, "PNG")
    assert decode_image(io.BytesIO(file.getvalue()), "red.png").tobytes() == draw("red").tobytes()


# -- the order of training ---------------------------------------------------------------------------------


def plan(length, rank=0, world_size=1, samples_done=0, steps_done=0, lengths=None, **changes):
    """Returns the steps: lists of micro-batches, which are lists of sample numbers."""
    settings = {**dict(batch_size=2, grad_accum=3, epochs=2, max_steps=None, seed=0), **changes}
    lengths = np.zeros(length) if lengths is None else np.array(lengths)
    steps, sizes = plan_steps(lengths, SimpleNamespace(**settings),
                              SimpleNamespace(rank=rank, world_size=world_size),
                              Progress(step=steps_done, samples=samples_done))
    assert len(sizes) == len(steps) and (world_size > 1 or sizes == [len(flat([step])) for step in steps])
    return steps


def flat(steps):
    return [number for step in steps for batch in step for number in batch]


def test_every_epoch_sees_every_sample_once_and_keeps_its_last_partial_step():
    steps = plan(20)  # steps of 6: three whole ones and one of two, twice
    assert [sum(map(len, step)) for step in steps] == [6, 6, 6, 2] * 2
    assert all(len(batch) <= 2 for step in steps for batch in step)
    assert sorted(flat(steps[:4])) == sorted(flat(steps[4:])) == list(range(20))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    steps = plan(20)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert plan(20) == steps
    assert flat(plan(20, batch_size=6, grad_accum=1)) == flat(steps)  # nor on how a step is cut
    assert flat(steps[:4]) != flat(steps[4:]) and plan(20, seed=1) != steps


def test_max_steps_counts_optimizer_steps_and_may_exceed_the_epochs():
    assert plan(20, max_steps=3) == plan(20)[:3]
    assert plan(20, max_steps=0) == []
    assert len(plan(20, max_steps=11, epochs=1)) == 11


def test_processes_share_a_step_without_overlap():
    alone = plan(20, batch_size=2, grad_accum=2, epochs=1)
    parts = [plan(20, world_size=2, rank=rank, batch_size=1, grad_accum=2, epochs=1) for rank in range(2)]
    assert [sorted(flat([step])) for step in alone] == [
        sorted(flat([one, other])) for one, other in zip(*parts, strict=True)]


def test_micro_batches_hold_samples_of_similar_length_and_no_sample_changes_its_step():
    lengths = np.random.default_rng(3).integers(1, 700, 20)
    steps, unsorted = plan(20, lengths=lengths), plan(20)
    assert [sorted(flat([step])) for step in steps] == [sorted(flat([step])) for step in unsorted]
    for step in steps:
        assert np.all(np.diff(lengths[flat([step])]) <= 0)  # the longest first
    assert steps[0] != unsorted[0]


@pytest.mark.parametrize("limits", [{}, {"max_steps": 7}])
def test_a_resumed_run_sees_the_rest_of_the_same_order(limits):
    steps = plan(20, **limits)
    for done in range(len(steps) + 1):
        samples = len(flat(steps[:done]))
        assert plan(20, samples_done=samples, steps_done=done, **limits) == steps[done:]
