"""From a record to ids, labels and pixels: exactly what should be trained is trained."""

import shutil
from itertools import groupby

import pytest
import torch
from conftest import N, SHARED, preprocess, record_of
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data import IGNORE_INDEX, IMAGE_TOKEN, ChatTemplate, collate
from sanity_check import make_image_prompt
from support.errors import BadRecord, UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def runs_of(labels):
    """Returns the runs of consecutive labeled tokens, as lists."""
    groups = groupby(labels, key=lambda label: label != IGNORE_INDEX)
    return [list(group) for labeled, group in groups if labeled]


@pytest.fixture(scope="session")
def tinyllama(tmp_path_factory):
    """The template in shared/hub. Its folder gets an empty file as weights, because it is refused without."""
    folder = SHARED / "hub" / "TinyLlama-1.1B-Chat-v1.0"
    if not folder.exists():
        pytest.skip("needs shared/hub")
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("real") / "copy")
    (folder / "model.safetensors").touch()
    return ChatTemplate(folder, N)


@pytest.fixture(params=["template", "tinyllama"])
def any_template(request):
    """The template of the tiny tokenizer, and the real one if shared/ exists."""
    return request.getfixturevalue(request.param)


CONVERSATION = [user("<image>\nWhat object is shown?"), assistant("olive oil ."), user("Is it red?"),
                assistant("No, it is\n\nsolid cold."), user("Sure?"), assistant("Yes")]


# -- the mask ----------------------------------------------------------------------------------------------


def test_labels_are_each_answer_and_its_end_token_in_every_turn_and_nothing_else(any_template):
    ids, labels = any_template.encode(CONVERSATION)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    answers = runs_of(labels)
    assert [run[-1] for run in answers] == [any_template.tokenizer.eos_token_id] * 3
    texts = [any_template.tokenizer.decode(run[:-1]) for run in answers]
    assert texts == ["olive oil .", "No, it is\n\nsolid cold.", "Yes"]
    untrained = [token for token, label in zip(ids, labels) if label == IGNORE_INDEX]
    assert any_template.tokenizer.decode(untrained) == (
        "<s> <|user|>\n" + IMAGE_TOKEN * N + "\nWhat object is shown?</s>\n<|assistant|>\n"
        "\n<|user|>\nIs it red?</s>\n<|assistant|>\n\n<|user|>\nSure?</s>\n<|assistant|>\n\n")


def test_ids_are_those_of_the_tokenizers_own_template_after_the_first_token(any_template):
    template, plain = any_template, AutoTokenizer.from_pretrained(any_template.tokenizer.name_or_path)

    def expected(messages, **how):
        ids = plain.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
        return [plain.bos_token_id] + ids

    only_text = [user("Which oil?"), *CONVERSATION[1:]]
    assert template.encode(only_text)[0] == expected(only_text)
    assert template.encode_prompt(only_text[:3]) == expected(only_text[:3], add_generation_prompt=True)

    plain.add_tokens([IMAGE_TOKEN], special_tokens=True)
    theirs = expected(CONVERSATION)
    at = theirs.index(len(plain) - 1)
    assert template.encode(CONVERSATION)[0] == theirs[:at] + [theirs[at]] * N + theirs[at + 1:]


def test_tinyllama_reads_olive_oil_as_it_does_after_a_newline(tinyllama):
    words = tinyllama.tokenizer.convert_ids_to_tokens
    assert tinyllama.tokenizer.tokenize("olive oil") == ["▁o", "live", "▁oil"]
    ids, labels = tinyllama.encode([user("<image>\nDescribe it."), assistant("olive oil is healthy .")])
    assert words(runs_of(labels)[0]) == ["ol", "ive", "▁oil", "▁is", "▁health", "y", "▁.", "</s>"]
    assert (ids[0], ids.count(1), ids.count(32_000)) == (1, 1, N)  # 32,000 is outside the vocabulary


# -- records to messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?",
                                      "<image>What is it?", " What is it? <image> "])
def test_the_image_is_before_the_question_wherever_it_was_in_training_and_in_a_prompt(template, question):
    messages = template.to_messages(record_of(question, "A cat.", image="red.png"))
    assert messages == [user("<image>\nWhat is it?"), assistant("A cat.")]
    prompts = [make_image_prompt(template, question, pixel_values)
               for pixel_values in (torch.zeros(3, 28, 28), None)]
    assert prompts[0]["input_ids"] == template.encode_prompt(messages[:1])
    assert prompts[1]["input_ids"] == template.encode_prompt([user("What is it?")])


def test_a_leading_answer_a_trailing_question_other_keys_and_empty_ones_are_left_out(template):
    record = record_of("Who?", "A cat.", "Where?", model="gpt-4", system="", video=None, images=[])
    record["conversations"][0]["weight"] = 0
    record["conversations"].insert(0, {"from": "gpt", "value": "an answer to nothing"})
    assert template.to_messages(record) == [user("Who?"), assistant("A cat.")]


# -- samples -----------------------------------------------------------------------------------------------


LONG = record_of("<image>\nWhat is it?", "olive oil .", "Where?", "on a table .", "Sure?", "Yes .",
                 image="red.png")


def test_a_conversation_that_is_too_long_loses_whole_last_turns(template):
    ids, labels = template.encode_record(LONG, 256)
    ends = [t for t, label in enumerate(labels) if label == template.end_token_id]
    for max_length in range(ends[0] + 1, len(ids)):
        whole = sum(end < max_length for end in ends)  # answers that fit with their end token
        short_ids, short_labels = template.encode_record(LONG, max_length)
        assert len(short_ids) <= max_length
        assert short_ids == ids[:ends[whole - 1] + 1] and short_labels == labels[:ends[whole - 1] + 1]
        assert short_ids.count(template.image_token_id) == N
    with pytest.raises(UserError, match="'one'.*--max-length"):
        template.encode_record(LONG, ends[0])


def test_a_record_whose_image_would_be_cut_away_is_refused(template):
    """Otherwise its pixel values would have no positions, and training would end there."""
    record = record_of("Hello?", "Hi .", "What is this?\n<image>", "A red circle .", image="red.png")
    length = len(template.encode_record(record, 256)[0])
    with pytest.raises(UserError, match="--max-length"):
        template.encode_record(record, length - 2)


def test_a_question_of_a_later_turn_is_asked_with_the_image_in_front(dataset_of, template):
    prompt, reference = dataset_of([LONG]).make_prompt(0, turn=1)
    assert reference == "on a table ." and prompt["pixel_values"].shape == (3, 28, 28)
    assert prompt["input_ids"] == template.encode_prompt([user("<image>\nWhere?")])


def test_padding_is_masked_by_its_position_so_end_tokens_stay_although_they_are_the_padding(template):
    conversations = [user("Who?"), assistant("A cat .")], [user("Who is it, then?"), assistant("I .")]
    samples = [dict(zip(("input_ids", "labels"), template.encode(messages)), pixel_values=None)
               for messages in conversations]
    # Cut after the end token, as encode_record() does: the row's last token is the padding token.
    samples[0] = {key: value and value[:-1] for key, value in samples[0].items()}
    assert samples[0]["input_ids"][-1] == template.pad_token_id
    batch = collate(samples, template.pad_token_id)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"]
        assert batch["labels"][row, :length].tolist() == sample["labels"]
        assert batch["attention_mask"][row].tolist() == [t < length for t in range(batch["labels"].shape[1])]
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert batch["labels"][0, len(samples[0]["labels"]) - 1] == template.end_token_id


# -- pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (28, 29), (37, 91), (5, 3), (640, 427), (427, 640)])
def test_pixels_of_a_sample_are_those_of_transformers_clip_processor(parts, dataset_of, tmp_path, size):
    theirs = CLIPImageProcessorPil.from_pretrained(parts.clip)
    noise = Image.merge("RGB", [Image.effect_noise(size, 80) for _ in range(3)])
    noise.save(tmp_path / "images" / "noise.png")
    sample = dataset_of([record_of("What?", "noise", image="noise.png")])[0]
    assert sample["pixel_values"].shape == (3, 28, 28)
    torch.testing.assert_close(sample["pixel_values"], preprocess(theirs, noise), atol=0, rtol=0)


# -- records that cannot be trained on ---------------------------------------------------------------------


HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}
OPENAI = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


@pytest.mark.parametrize("turns, more, reason", [
    (None, {}, "'conversations' is not a list of turns$"),
    (None, {"messages": OPENAI}, "rename 'messages' to 'conversations'"),
    (OPENAI, {}, "OpenAI's form: rename 'role' to 'from' and 'content' to 'value'"),
    ([HUMAN], {}, "no human turn"),
    ([HUMAN, HUMAN, GPT], {}, "alternate.*turn 2 should be from gpt"),
    ([GPT, HUMAN, GPT, GPT], {}, "alternate.*turn 4 should be from human"),
    ([HUMAN, {"from": "gpt"}], {}, "a value that is not a text: turn 2: None"),
    ([GPT, HUMAN, {"from": "gpt", "value": " "}], {}, "empty answer: turn 3"),
    ([HUMAN, {"from": "gpt", "value": "\ud83d"}], {}, r"no text should have: '\\ud83d', turn 2"),
    ([{"from": "human", "value": "<image>What?"}, GPT], {}, "more <image>.*1 <image>, 0 images"),
    ([{"from": "human", "value": "<image>"}, GPT] * 2, {"image": "a.jpg"}, "more <image>.*2 <image>, 1 im"),
    ([HUMAN, GPT], {"image": ["a.jpg", "b.jpg"]}, "'image' is not the name of one file"),
    *(([HUMAN, GPT], {"image": "a.jpg", key: "content"}, f"the key '{key}' is not read")
      for key in ("images", "video", "videos", "audio", "system", "image_path")),
])
def test_records_that_cannot_be_trained_on_say_why(template, turns, more, reason):
    with pytest.raises(BadRecord, match=f"'a': .*{reason}"):
        template.to_messages({"id": "a", "conversations": turns, **more})
