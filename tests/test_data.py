"""From a record to ids, labels and pixels: what is trained on is exactly what should be."""

import io
import json
import multiprocessing
import os
import pickle
import random
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import COLOURS, N, SHARED, draw
from data import IGNORE_INDEX, IMAGE_TOKEN, ChatDataset, ChatTemplate, collate
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import Windows
from PIL import Image
from pixels import ImageProcessor
from plumbing import UserError
from storage import ImageStore, PositionedFile, Records
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

REAL_LLM = SHARED / "hub" / "TinyLlama-1.1B-Chat-v1.0"
REAL_CLIP = SHARED / "hub" / "clip-vit-large-patch14"
PHOTOS = sorted((SHARED / "photos").glob("*.jpg"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def record_of(*texts, **more):
    """A record whose turns, human first, have these values."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "one", "conversations": turns, **more}


def runs_of(labels):
    """The stretches of supervised tokens, as lists."""
    runs, inside = [], False
    for label in labels:
        if label != IGNORE_INDEX:
            runs = runs if inside else [*runs, []]
            runs[-1].append(label)
        inside = label != IGNORE_INDEX
    return runs


@pytest.fixture(scope="session", params=["tiny", "TinyLlama's"])
def any_template(request, parts):
    """Ours on the fly, and the real one where shared/ is at hand."""
    if request.param == "tiny":
        return ChatTemplate(parts.llm)
    if not REAL_LLM.exists():
        pytest.skip("needs shared/hub")
    return ChatTemplate(REAL_LLM)


CONVERSATION = [
    user("<image>\nWhat object is shown?"),
    assistant("olive oil ."),
    user("Is it red?"),
    assistant("No, it is\n\nsolid cold."),
    user("Sure?"),
    assistant("Yes"),
]


# -- the mask ----------------------------------------------------------------------------------------------


def test_labels_are_each_answer_and_its_end_token_in_every_turn(any_template):
    ids, labels = any_template.encode(CONVERSATION, N)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    answers = runs_of(labels)
    assert [run[-1] for run in answers] == [any_template.tokenizer.eos_token_id] * 3
    assert [any_template.tokenizer.decode(run[:-1]) for run in answers] == [
        "olive oil .",
        "No, it is\n\nsolid cold.",
        "Yes",
    ]


def test_image_prompt_and_newline_after_an_answer_are_not_trained(any_template):
    ids, labels = any_template.encode(CONVERSATION, N)
    untrained = [token for token, label in zip(ids, labels) if label == IGNORE_INDEX]
    assert untrained.count(any_template.image_token_id) == N
    assert any_template.tokenizer.decode(untrained) == (
        "<s> <|user|>\n" + IMAGE_TOKEN * N + "\nWhat object is shown?</s>\n<|assistant|>\n"
        "\n<|user|>\nIs it red?</s>\n<|assistant|>\n\n<|user|>\nSure?</s>\n<|assistant|>\n\n"
    )


def test_a_prompt_is_a_prefix_of_its_training_sequence(any_template):
    ids, labels = any_template.encode(CONVERSATION, N)
    for k in (1, 3, 5):
        prompt = any_template.encode_prompt(CONVERSATION[:k], N)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORE_INDEX == labels[len(prompt) - 1]  # there, not before, it answers


@pytest.mark.parametrize("folder", ["tiny", "TinyLlama's"])
def test_ids_are_those_of_the_tokenizers_own_template_with_bos_in_front(parts, folder):
    folder = parts.llm if folder == "tiny" else REAL_LLM
    if not folder.exists():
        pytest.skip("needs shared/hub")
    template, plain = ChatTemplate(folder), AutoTokenizer.from_pretrained(folder)
    text_alone = [user("Which oil?"), *CONVERSATION[1:]]
    theirs = plain.apply_chat_template(text_alone, tokenize=True, return_dict=False)
    assert template.encode(text_alone, N)[0] == [plain.bos_token_id] + theirs
    theirs = plain.apply_chat_template(
        text_alone[:3], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert template.encode_prompt(text_alone[:3], N) == [plain.bos_token_id] + theirs

    plain.add_tokens([IMAGE_TOKEN], special_tokens=True)
    theirs = [plain.bos_token_id] + plain.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    at = theirs.index(len(plain) - 1)
    assert template.encode(CONVERSATION, N)[0] == theirs[:at] + [theirs[at]] * N + theirs[at + 1 :]


@pytest.mark.skipif(not REAL_LLM.exists(), reason="needs shared/hub")
def test_tinyllama_reads_olive_oil_as_it_does_after_a_newline():
    template = ChatTemplate(REAL_LLM)
    words = template.tokenizer.convert_ids_to_tokens
    alone = template.tokenizer("olive oil", add_special_tokens=False)["input_ids"]
    assert words(alone) == ["▁o", "live", "▁oil"]
    ids, labels = template.encode([user("<image>\nDescribe it."), assistant("olive oil is healthy .")], 256)
    assert words(runs_of(labels)[0]) == ["ol", "ive", "▁oil", "▁is", "▁health", "y", "▁.", "</s>"]
    assert (ids[0], ids.count(1), ids.count(template.image_token_id)) == (1, 1, 256)
    assert template.image_token_id == 32_000  # outside the LLM's vocabulary


# Pieces that look like what the tokenizer, the template or the record's format give a meaning to.
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "</s>",
            "<s>",
            "<unk>",
            "<|user|>\n",
            "<|assistant|>\n",
            "\n",
            " ",
            "  ",
            "olive",
            "🙂",
            "é",
            "<0x0A>",
            "{{ eos_token }}",
            "<",
            ">",
            "s>",
            "</",
            "\t",
            "\u3000",
            "אב",
        ]
    ),
)
# No ▁, which reads back as a space.
TEXTS = st.lists(PIECES, max_size=5).map("".join).filter(lambda text: "▁" not in text)
TURNS = st.lists(
    st.tuples(
        TEXTS.filter(lambda text: IMAGE_TOKEN not in text),
        st.one_of(TEXTS.filter(str.strip), TEXTS.map(lambda text: text + IMAGE_TOKEN)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(turns=TURNS, image_in=st.sampled_from(["nowhere", "front", "back", "second turn"]))
def test_any_conversation_is_labelled_on_its_answers_alone(template, turns, image_in):
    texts = [text for turn in turns for text in turn]
    if image_in in ("front", "back"):
        texts[0] = f"<image>\n{texts[0]}" if image_in == "front" else f"{texts[0]}\n<image>"
    elif image_in == "second turn" and len(turns) > 1:
        texts[2] += "<image>"
    messages = template.messages(record_of(*texts), has_image=True)
    assert sum(IMAGE_TOKEN in message["content"] for message in messages) == 1
    ids, labels = template.encode(messages, N)
    assert ids.count(template.image_token_id) == N
    assert ids.count(template.tokenizer.bos_token_id) == 1
    assert ids.count(template.end_token_id) == len(messages)  # one after each turn, none within

    answers = runs_of(labels)
    assert [run[-1] for run in answers] == [template.end_token_id] * len(turns)
    assert [template.tokenizer.decode(run[:-1]) for run in answers] == [m["content"] for m in messages[1::2]]
    for message, (_, answer) in zip(messages[1::2], turns):
        assert message["content"].replace(" ", "") == answer.strip().replace(" ", "")
    for k in range(1, len(messages), 2):
        prompt = template.encode_prompt(messages[:k], N)
        assert ids[: len(prompt)] == prompt and labels[len(prompt)] != IGNORE_INDEX


# -- records to messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nWhat is it?",
        "What is it?\n<image>",
        "What is it?",
        "<image>What is it?",
        " What is it? <image> ",
    ],
)
def test_the_image_stands_before_the_question_wherever_the_record_has_it(template, question):
    assert template.messages(record_of(question, "A cat."), has_image=True) == [
        user("<image>\nWhat is it?"),
        assistant("A cat."),
    ]


def test_an_image_of_a_later_turn_stays_there(template):
    messages = template.messages(record_of("Hello?", "Hi.", "And this?\n<image>", "A cat."), has_image=True)
    assert [m["content"] for m in messages] == ["Hello?", "Hi.", "<image>\nAnd this?", "A cat."]


def test_a_leading_answer_is_skipped_and_a_trailing_question_dropped(template):
    record = record_of("Who?", "A cat.", "Where?")
    record["conversations"].insert(0, {"from": "gpt", "value": "an answer to nothing"})
    assert template.messages(record, has_image=False) == [user("Who?"), assistant("A cat.")]


@pytest.mark.parametrize(
    "has_image, change",
    [
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
    ],
)
def test_a_record_that_is_no_conversation_is_refused_by_its_name(template, has_image, change):
    with pytest.raises(UserError, match="'number 17'"):
        template.messages({**change, "id": "number 17"}, has_image)


@pytest.mark.parametrize("literal", ["</s>", "<s>", "<unk>", "<image>"])
def test_a_literal_special_token_in_a_text_stays_text(any_template, literal):
    question = f"What does {literal if literal != '<image>' else 'it'} mean?"
    record = record_of(question, f"It is {literal} and more {literal}")
    messages = any_template.messages(record, has_image=False)
    ids, labels = any_template.encode(messages, N)
    tokenizer = any_template.tokenizer
    assert ids.count(any_template.image_token_id) == ids.count(tokenizer.unk_token_id) == 0
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(runs_of(labels)[0][:-1]).endswith("more " + literal[0] + " " + literal[1:])


# -- samples -----------------------------------------------------------------------------------------------


@pytest.fixture
def dataset_of(tmp_path, template, image_processor):
    """dataset_of([record, …], max_length=…) → a ChatDataset, with red.png among its images."""
    (tmp_path / "images").mkdir()
    draw("red").save(tmp_path / "images" / "red.png")

    def make(records, max_length=500):
        (tmp_path / "chat.json").write_text(json.dumps(records))
        return ChatDataset(
            Records(tmp_path / "chat.json"),
            ImageStore(tmp_path / "images"),
            np.arange(len(records)),
            template,
            image_processor,
            N,
            max_length,
        )

    return make


LONG = record_of(
    "<image>\nWhat is it?", "olive oil .", "Where?", "on a table .", "Sure?", "Yes .", image="red.png"
)


def test_an_over_long_conversation_loses_whole_last_turns(dataset_of, template):
    ids, labels = dataset_of([LONG]).tokens(LONG)
    ends = [t for t, label in enumerate(labels) if label == template.end_token_id]
    for max_length in range(ends[0] + 1, len(ids)):
        whole = sum(end < max_length for end in ends)  # answers that fit with their end token
        short_ids, short_labels = dataset_of([LONG], max_length).tokens(LONG)
        assert len(short_ids) <= max_length
        assert short_ids == ids[: ends[whole - 1] + 1] and short_labels == labels[: ends[whole - 1] + 1]
        assert short_ids.count(template.image_token_id) == N
    with pytest.raises(UserError, match="'one'.*--max-length"):
        dataset_of([LONG], ends[0]).tokens(LONG)


def test_a_sample_whose_image_was_cut_away_has_no_pixels_either(dataset_of, template):
    """Features without positions would end the training in the middle of it."""
    record = record_of(
        "Hello?", "Hi .", "What is this?\n<image>", "A red circle on a table .", image="red.png"
    )
    dataset = dataset_of([record], max_length=40)
    assert len(dataset_of([record]).tokens(record)[0]) > 40
    try:
        sample = dataset[0]
    except UserError:
        return  # refusing it is as good
    assert sample["input_ids"].count(template.image_token_id) == (0 if sample["pixel_values"] is None else N)


def test_a_record_without_an_image_is_text_alone(dataset_of, template):
    sample = dataset_of([record_of("Who?", "A cat .")])[0]
    assert sample["pixel_values"] is None and template.image_token_id not in sample["input_ids"]


def test_half_an_emoji_in_a_text_is_refused_or_read_but_does_not_end_the_training(dataset_of):
    """json.loads turns the escape \\ud83d, left over where somebody cut a text, into a lone surrogate."""
    from loading import check

    record = record_of("Who?", "A cat \ud83d")
    dataset = dataset_of([record, record_of("Who?", "A cat .")])
    assert 1 in check(dataset).usable
    assert dataset[0]["input_ids"]


def test_a_question_of_a_later_turn_is_asked_with_the_image_in_front(dataset_of, template):
    prompt, truth = dataset_of([LONG]).question(0, turn=1)
    assert truth == "on a table ." and prompt["pixel_values"].shape == (3, 28, 28)
    assert prompt["input_ids"] == template.encode_prompt([user("<image>\nWhere?")], N)


def test_padding_is_masked_by_length_so_that_ends_stay_though_pad_is_the_end_token(template):
    samples = [
        dict(zip(("input_ids", "labels"), template.encode(messages, N)), pixel_values=None)
        for messages in ([user("Who?"), assistant("A cat .")], [user("Who is it, then?"), assistant("I .")])
    ]
    # Cut after the end token, as drop_last_turns() does: the row's own last token is then the pad token.
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
    batch = collate(
        [{"input_ids": [5, 6, 7], "pixel_values": None}, {"input_ids": [8], "pixel_values": None}],
        2,
        padding_side="left",
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [False, False, True]]
    assert "labels" not in batch and len(batch["pixel_values"]) == 0


# -- pixels ------------------------------------------------------------------------------------------------


def noise(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize(
    "size",
    [
        (28, 28),
        (29, 28),
        (28, 29),
        (37, 91),
        (91, 37),
        (5, 3),
        (1, 1),
        (640, 427),
        (427, 640),
        (300, 11),
        (2, 300),
        (27, 28),
        (1001, 333),
    ],
)
def test_pixels_are_those_of_transformers(parts, image_processor, size):
    theirs = CLIPImageProcessorPil.from_pretrained(parts.clip)
    image = noise(size)
    torch.testing.assert_close(image_processor(image), pixels_of(theirs, image), atol=1e-6, rtol=0)


@pytest.mark.skipif(not (PHOTOS and REAL_CLIP.exists()), reason="needs shared/hub and shared/photos")
def test_pixels_of_photos_are_those_of_transformers_with_clips_own_settings():
    ours, theirs = ImageProcessor(REAL_CLIP), CLIPImageProcessorPil.from_pretrained(REAL_CLIP)
    for path in PHOTOS:
        image = Image.open(path).convert("RGB")
        pixels = ours(image)
        assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, pixels_of(theirs, image), atol=1e-6, rtol=0)


# -- records -----------------------------------------------------------------------------------------------

VALUE = [
    {"id": 1, "text": 'olive é 🙂 " ] } \\'},
    {"id": 2, "nested": {"a": [1, {"b": []}]}},
    {"id": "drei", "x": None},
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(VALUE),
        json.dumps(VALUE, ensure_ascii=False, indent=3),
        "\ufeff  " + json.dumps(VALUE, ensure_ascii=False) + "\n\n",
        json.dumps(VALUE).replace("}, {", "}\r\n,\t{"),
    ],
)
def test_records_are_those_of_json(tmp_path, text):
    path = tmp_path / "chat.json"
    path.write_bytes(text.encode())
    records = Records(path)
    assert [records[i] for i in range(len(records))] == VALUE
    again = pickle.loads(pickle.dumps(records))  # with its file mapped already; as a spawned worker gets it
    assert [again[i] for i in (2, 0)] == [VALUE[2], VALUE[0]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"[]",
        b"{}",
        b'{"a": 1}',
        b"[1, 2]",
        b'["a"]',
        b'[{"a": 1}, {"b"',
        b'[{"a": 1},',
        b'[{"a": 1}',
        b'[{"a": 1}, nonsense]',
        b'[{"a": "\xff\xfe"}]',
        b"<html>404</html>",
        '[{"ä": 1}'.encode("utf-16"),
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="chat.json") as error:
        Records(path)
    assert "\n" not in str(error.value)


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
    for colour in COLOURS:
        name = f"{colour}.png"
        one, other = folder.open({}, name), archive.open({}, name)
        assert one.size == other.size and one.tobytes() == other.tobytes()
        assert one.tobytes() == Image.open(drawn / "images" / name).convert("RGB").tobytes()


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


@pytest.mark.parametrize(
    "name",
    [
        "missing.png",
        "../red.png",
        "/etc/hostname",
        "C:\\red.png",
        "a\\..\\..\\red.png",
        "",
        "half.png",
        "text.png",
        "bomb.png",
    ],
)
def test_an_image_that_cannot_be_read_is_a_sentence_about_the_record(tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    draw("red").save(tmp_path / "red.png")
    (root / "text.png").write_text("<html>404</html>")
    noise((60, 60)).save(root / "half.png")
    (root / "half.png").write_bytes((root / "half.png").read_bytes()[:3000])
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    for store in (ImageStore(root), ImageStore(zip_of(tmp_path / "images.zip", root))):
        with pytest.raises(UserError, match="'number 17'"):
            store.open({"id": "number 17"}, name)


def test_a_damaged_member_of_a_zip_is_noticed(tmp_path):
    (tmp_path / "images").mkdir()
    draw("red").save(tmp_path / "images" / "red.bmp")  # which would open all the same, with another pixel
    path = zip_of(tmp_path / "images.zip", tmp_path / "images")
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="'number 17'.*checksum"):
        ImageStore(path).open({"id": "number 17"}, "red.bmp")


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
    indices = np.random.default_rng(0).integers(0, 8, 24 if method == "spawn" else 200)
    dataset = ChatDataset(
        Records(drawn / "chat.json"),
        ImageStore(drawn / "images.zip"),
        indices,
        template,
        image_processor,
        N,
        500,
    )
    expected = [dataset[i] for i in range(len(dataset))]  # and opens the file here, before the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    for sample, own in zip(loader, expected, strict=True):
        assert torch.equal(sample["pixel_values"], own["pixel_values"])
        assert sample["input_ids"] == own["input_ids"] and not sample["bad"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_does_not_move_the_handle_of_its_parent(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    file = PositionedFile(tmp_path / "file")
    file.read(0, 10)  # opens it, before the worker is forked
    before = os.lseek(file._file.fileno(), 0, os.SEEK_CUR)
    worker = multiprocessing.get_context("fork").Process(target=file.read, args=(500_000, 10))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert os.lseek(file._file.fileno(), 0, os.SEEK_CUR) == before


# -- the order of training ---------------------------------------------------------------------------------


class Numbers:
    """A dataset whose i-th sample is recognised by its id and its name."""

    def __init__(self, length, lengths=None):
        self.length = length
        self.lengths = np.zeros(length) if lengths is None else np.array(lengths)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return {"input_ids": [i], "labels": [i], "pixel_values": None, "name": str(i), "bad": []}


def windows_of(length, world=1, rank=0, samples_done=0, steps_done=0, lengths=None, **changes):
    """The windows as lists of micro-batches of sample numbers."""
    values = dict(batch_size=2, grad_accum=3, epochs=2, max_steps=None, seed=0, workers=0)
    processes = Namespace(world=world, rank=rank, device=torch.device("cpu"))
    windows = Windows(
        Numbers(length, lengths), Namespace(**{**values, **changes}), 2, processes, samples_done, steps_done
    )
    taken = [[batch["input_ids"].flatten().tolist() for batch in window.batches] for window in windows]
    assert windows.total_steps == steps_done + len(taken)
    return taken


def flat(windows):
    return [number for window in windows for batch in window for number in batch]


def test_every_epoch_sees_every_sample_once_with_its_last_window_kept():
    windows = windows_of(20)  # windows of 6: three whole ones and one of two, twice
    assert [sum(map(len, window)) for window in windows] == [6, 6, 6, 2] * 2
    assert all(len(batch) <= 2 for window in windows for batch in window)
    assert sorted(flat(windows[:4])) == sorted(flat(windows[4:])) == list(range(20))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    windows = windows_of(20)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert windows_of(20) == windows
    assert flat(windows_of(20, batch_size=6, grad_accum=1)) == flat(windows)  # nor on how a step is cut up
    assert flat(windows[:4]) != flat(windows[4:]) and windows_of(20, seed=1) != windows


def test_max_steps_counts_optimizer_steps_and_may_exceed_the_epochs():
    assert windows_of(20, max_steps=3) == windows_of(20)[:3]
    assert windows_of(20, max_steps=0) == []
    assert len(windows_of(20, max_steps=11, epochs=1)) == 11


def test_processes_share_a_window_without_overlap():
    alone = windows_of(20, batch_size=2, grad_accum=2, epochs=1)
    shares = [windows_of(20, world=2, rank=rank, batch_size=1, grad_accum=2, epochs=1) for rank in range(2)]
    assert [sorted(flat([window])) for window in alone] == [
        sorted(flat([one, other])) for one, other in zip(*shares, strict=True)
    ]


def test_micro_batches_hold_samples_of_like_length_and_windows_the_samples_that_they_held_anyway():
    lengths = np.random.default_rng(3).integers(1, 700, 20)
    windows, unsorted = windows_of(20, lengths=lengths), windows_of(20)
    assert [sorted(flat([window])) for window in windows] == [sorted(flat([window])) for window in unsorted]
    for window in windows:
        assert np.all(np.diff(lengths[flat([window])]) <= 0)  # the longest first
    assert windows[0] != unsorted[0]


@pytest.mark.parametrize("limits", [{}, {"max_steps": 7}])
def test_a_resumed_run_sees_the_rest_of_the_same_row(limits):
    windows = windows_of(20, **limits)
    for done in range(len(windows) + 1):
        seen = len(flat(windows[:done]))
        assert windows_of(20, samples_done=seen, steps_done=done, **limits) == windows[done:]


def test_pictures_can_be_read_from_memory():
    """load_image() gets a zip's members as open files."""
    from pixels import load_image

    file = io.BytesIO()
    draw("red").save(file, "PNG")
    assert load_image(io.BytesIO(file.getvalue())).tobytes() == draw("red").tobytes()
