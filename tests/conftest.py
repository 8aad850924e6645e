"""Tiny parts with random weights, in folders laid out as on the hub, and data of little drawn pictures.

Everything is made on the fly, in seconds, from fixed seeds; nothing is downloaded. What is in shared/ (the
real tokenizer, the real preprocessor, real photos) lies outside the repository; tests that use it skip
without it."""

import importlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"
sys.path.insert(0, str(REPOSITORY))

torch.set_num_threads(1)  # parts this small only wait for each other on several
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # for the scripts that tests start; see find_pretrained()

N = 4  # image positions of the tiny CLIP: (28 / 14)²

# TinyLlama's, to the letter.
CHAT_TEMPLATE = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# What the tiny tokenizer learns its merges from; enough for "olive" to begin with another token after a
# space.
CORPUS = [
    "olive oil is a healthy ingredient used liberally .",
    "the olives and the oil are on a table .",
    "Provide a brief description of the given image.",
    "What object is shown?",
    "Yes, it is a red circle.",
    "a live concert of the live band",
    "follow the old solid cold road",
    "a photo of a cat in the middle of the picture , a blue square and a green triangle .",
] * 4


def make_tokenizer(folder, chat_template=CHAT_TEMPLATE):
    """A small tokenizer of Llama's kind: BPE over the whole text, ▁ for spaces and one at the very start,
    bytes for unknown characters, no bos of its own, and </s> as its padding."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(words.to_str())["model"]
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    merges = [tuple(pair) for pair in learned["merges"]]
    llama = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex("^ "), ""),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llm(folder, **config):
    """A random LlamaForCausalLM with grouped queries, and its tokenizer."""
    vocab_size = len(make_tokenizer(folder))
    torch.manual_seed(1)
    # A wide start (0.3 instead of 0.02): with small weights in the frozen head, no word could become
    # probable.
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


def make_clip(folder):
    """A random CLIPModel, both halves, with the buffers and the int sizes that old files on the hub have."""
    torch.manual_seed(2)
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    CLIPModel(
        CLIPConfig(
            text_config=dict(
                part, vocab_size=50, max_position_embeddings=8, bos_token_id=48, eos_token_id=49
            ),
            vision_config=dict(part, image_size=28, patch_size=14),
            projection_dim=16,
        )
    ).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(N + 1)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 28,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 28,
            }
        )
    )
    return folder


Parts = namedtuple("Parts", "clip llm")


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a tiny CLIP and a tiny chat model."""
    folder = tmp_path_factory.mktemp("hub")
    return Parts(make_clip(folder / "clip"), make_llm(folder / "llm"))


@pytest.fixture(scope="session")
def template(parts):
    from data import ChatTemplate

    return ChatTemplate(parts.llm)


@pytest.fixture(scope="session")
def image_processor(parts):
    from pixels import ImageProcessor

    return ImageProcessor(parts.clip)


@pytest.fixture
def tiny(parts):
    """build() on the tiny parts: tiny(projector="mlp", vision_layer=-1) → (model, template,
    image_processor)."""
    from weights import build

    def make(projector="linear", vision_layer=-2, seed=0):
        torch.manual_seed(seed)
        return build(parts.clip, parts.llm, projector, vision_layer, torch.float32)

    return make


# -- data --------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 210, 20),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "orange": (250, 140, 20),
    "purple": (130, 40, 160),
}


def draw(colour, size=(40, 30)):
    image = Image.new("RGB", size, COLOURS[colour])
    width, height = size
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(128, 128, 128))
    return image


def write_data(folder, turns=1):
    """chat.json, images/ and images.zip of eight pictures; answers are of unequal lengths. Returns the
    records."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i, colour in enumerate(COLOURS):
        draw(colour, size=(30 + 3 * i, 40 - 2 * i)).save(folder / "images" / f"{colour}.png")
        conversations = []
        for turn in range(turns):
            question = ["Provide a brief description of the given image.", "What object is shown?"][turn]
            if turn == 0:
                question = f"<image>\n{question}" if i % 2 else f"{question}\n<image>"
            answer = " , ".join([f"a {colour} picture"] * (1 + (i + turn) % 3)) + " ."
            conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(
            {
                "id": f"drawn_{i}",
                "image": f"{colour}.png",
                "conversations": conversations,
                "kinds": ["description", "object"][:turns],
            }
        )
    (folder / "chat.json").write_text(json.dumps(records))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").iterdir()):
            archive.write(path, path.name)
    return records


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with data for stage 1, chat.json, and for stage 2, instruct.json; one set of images for
    both."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    captions = write_data(folder / "two", turns=2)
    (folder / "instruct.json").write_text(json.dumps(captions))
    for record in captions:
        del record["conversations"][2:], record["kinds"]
    (folder / "chat.json").write_text(json.dumps(captions))
    (folder / "two" / "images").rename(folder / "images")
    (folder / "two" / "images.zip").rename(folder / "images.zip")
    return folder


# -- running the scripts -----------------------------------------------------------------------------------

SMALL = ["--precision", "fp32", "--device", "cpu", "--workers", "0", "--log-every", "1"]


@pytest.fixture(scope="session")
def flags(parts, drawn):
    """flags(2) → the command line of stage 2 that makes it use the tiny parts and the drawn data."""

    def of(stage, **changes):
        data = drawn / ("chat.json" if stage == 1 else "instruct.json")
        values = {
            "vision_tower": parts.clip,
            "llm": parts.llm,
            "data": data,
            "images": drawn / "images.zip",
            "heldout_data": data,
            "heldout_images": drawn / "images",
            "held_out": 4,
            "batch_size": 8,
            **changes,
        }
        return SMALL + [
            str(word) for name, value in values.items() for word in ("--" + name.replace("_", "-"), value)
        ]

    return of


@pytest.fixture
def script(monkeypatch, tmp_path):
    """script("stage1_align", flag, …) runs a script here and now, as its command line would; see launch()."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *words):
        from plumbing import launch

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name + ".py", *map(str, words)])
        launch(importlib.import_module(name).main)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def command(name, *words, cwd, **environment):
    """The same as a command of its own → CompletedProcess."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / f"{name}.py"), *map(str, words)],
        cwd=cwd,
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def metrics(folder):
    """metrics.jsonl: (the lines about training, the lines about the held-out records)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "heldout_loss" in line]


def pytest_configure(config):
    # As in launch(): peft asks transformers for an attribute under its old name.
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )
