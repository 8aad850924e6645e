"""Tiny models with random weights, in folders laid out as on the hub, and data of small drawn pictures.

Everything is made here from fixed seeds, in seconds, and nothing is downloaded. Tests that use the folder
shared/, which lies outside the repository, are skipped if it is missing.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
sys.path.insert(0, str(REPOSITORY))

from data import ChatDataset, ChatTemplate, collate
from model import Llava, count_patches
from support import metrics_log
from support.checkpoints import STOP_SIGNALS
from support.errors import run_script
from support.images import ImageStore
from support.pretrained import load_image_processor, load_language_model, load_vision_tower
from support.records import read_records

torch.set_num_threads(1)  # models this small are slower with more threads

# nohup and the background jobs of a shell ignore some of these signals. The scripts that tests start would
# inherit this, and the tests of Ctrl-C would fail.
for number in STOP_SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

N = 4  # image positions of the tiny CLIP: (28 / 14)²

# TinyLlama's template, character by character.
CHAT_TEMPLATE = (REPOSITORY / "toy" / "llama-chat" / "chat_template.jinja").read_text()

# The tiny tokenizer learns its merges from this text. It is enough for "olive" to begin with another token
# after a space.
CORPUS = ["olive oil is a healthy ingredient used liberally .", "the olives and the oil are on a table .",
          "Provide a brief description of the given image.", "What object is shown?",
          "Yes, it is a red circle.", "a live concert of the live band", "follow the old solid cold road",
          "a photo of a cat in the middle of the picture , a blue square and a green triangle ."] * 4


def make_tokenizer(folder, chat_template=CHAT_TEMPLATE):
    """Saves a small tokenizer of Llama's kind and returns it: BPE over the whole text, ▁ for spaces and one
    at the start, bytes for unknown characters, no <s> of its own, and </s> as its padding."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(words.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
             *sorted(learned["vocab"], key=learned["vocab"].get)]
    vocabulary = {name: i for i, name in enumerate(names)}
    llama = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in learned["merges"]], byte_fallback=True,
                                 fuse_unk=True, unk_token="<unk>"))
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama, unk_token="<unk>", bos_token="<s>",
                                        eos_token="</s>", pad_token="</s>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llm(folder, **config):
    """Saves a random LlamaForCausalLM with grouped queries, and its tokenizer. Returns the folder."""
    vocab_size = len(make_tokenizer(folder))
    torch.manual_seed(1)
    # Weights are initialized with 0.3 instead of 0.02. With small weights in the frozen head, no token could
    # become probable.
    settings = dict(vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                    initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
                    tie_word_embeddings=False)
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


def make_clip(folder):
    """Saves a random CLIPModel, vision and text, with the extra buffers of old files on the hub."""
    torch.manual_seed(2)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    text = dict(sizes, vocab_size=50, max_position_embeddings=8, bos_token_id=48, eos_token_id=49)
    vision = dict(sizes, image_size=28, patch_size=14)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(N + 1)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 28}))
    return folder


Parts = namedtuple("Parts", "clip llm")


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a tiny CLIP and a tiny chat model."""
    folder = tmp_path_factory.mktemp("hub")
    return Parts(make_clip(folder / "clip"), make_llm(folder / "llm"))


@pytest.fixture(scope="session")
def template(parts):
    return ChatTemplate(parts.llm, N)


@pytest.fixture(scope="session")
def image_processor(parts):
    return load_image_processor(parts.clip)


def preprocess(image_processor, image):
    """Returns the pixel values of one image: (3, H, W)."""
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def batch_of(samples, template):
    """Returns a training batch of samples as the loop passes it to the model: tensors only."""
    batch = collate(samples, template.pad_token_id)
    return {name: value for name, value in batch.items() if torch.is_tensor(value)}


def build(vision_tower, llm, projector="linear", vision_layer=-2):
    """Returns (model, template) from folders of pretrained models, as the stages build them."""
    tower = load_vision_tower(vision_tower, torch.float32)
    template = ChatTemplate(llm, count_patches(tower.config))
    language_model = load_language_model(llm, torch.float32, torch.device("cpu"))
    model = Llava(tower, language_model, template.image_token_id, projector, vision_layer)
    return model.eval(), template


@pytest.fixture
def tiny(parts, image_processor):
    """tiny(projector="mlp", vision_layer=-1) returns (model, template, image_processor) of the tiny
    models."""
    def make(projector="linear", vision_layer=-2, seed=0):
        torch.manual_seed(seed)
        return *build(parts.clip, parts.llm, projector, vision_layer), image_processor

    return make


# -- data --------------------------------------------------------------------------------------------------

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220), "yellow": (240, 210, 20),
          "black": (10, 10, 10), "white": (250, 250, 250), "orange": (250, 140, 20), "purple": (130, 40, 160)}


def draw(color, size=(40, 30)):
    image = Image.new("RGB", size, COLORS[color])
    width, height = size
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(128, 128, 128))
    return image


def record_of(*texts, **more):
    """Returns a record whose turns, human first, have these values."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "one", "conversations": turns, **more}


@pytest.fixture
def dataset_of(tmp_path, template, image_processor):
    """dataset_of([record, …], max_length=…) returns a ChatDataset with red.png among its images."""
    (tmp_path / "images").mkdir()
    draw("red").save(tmp_path / "images" / "red.png")

    def make(records, max_length=500):
        (tmp_path / "chat.json").write_text(json.dumps(records))
        records = read_records(tmp_path / "chat.json", ImageStore(tmp_path / "images"))
        return ChatDataset(records, template, image_processor, max_length)

    return make


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with chat.json for stage 1, instruct.json for stage 2, and images/ and images.zip for both:
    eight pictures, and answers of unequal lengths."""
    folder, chat, instruct = tmp_path_factory.mktemp("data"), [], []
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, color in enumerate(COLORS):
            draw(color, size=(30 + 3 * i, 40 - 2 * i)).save(folder / "images" / f"{color}.png")
            archive.write(folder / "images" / f"{color}.png", f"{color}.png")
            question = "Provide a brief description of the given image."
            question = f"<image>\n{question}" if i % 2 else f"{question}\n<image>"
            first, second = (" , ".join([f"a {color} picture"] * (1 + k % 3)) + " ." for k in (i, i + 1))
            more = {"image": f"{color}.png", "id": f"drawn_{i}"}
            chat.append(record_of(question, first, **more))
            instruct.append(record_of(question, first, "What object is shown?", second, **more,
                                      kinds=["description", "object"]))
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    return folder


# -- running the scripts -----------------------------------------------------------------------------------

SMALL = ["--precision", "fp32", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="session")
def flags(parts, drawn):
    """flags(2, lr=0.1) returns the command line of stage 2 with the tiny models and the drawn data."""
    def of(stage, **changes):
        data = drawn / ("chat.json" if stage == 1 else "instruct.json")
        values = {"vision_tower": parts.clip, "llm": parts.llm, "data": data, "images": drawn / "images.zip",
                  "heldout_data": data, "heldout_images": drawn / "images", "heldout": 4, "batch_size": 8,
                  **changes}
        return SMALL + [str(word) for name, value in values.items()
                        for word in ("--" + name.replace("_", "-"), value)]

    return of


@pytest.fixture
def script(monkeypatch, tmp_path):
    """script("stage1_align", flag, …) runs a script in this process, as its command line would.
    "tools.evaluate" stands for python -m tools.evaluate."""
    def run(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name.replace(".", "/") + ".py", *map(str, words)])
        run_script(importlib.import_module(name).main)

    return run


@pytest.fixture
def refusal(script):
    """refusal(script, flag, …) returns the sentence with which the script ends. Every other exception is a
    failure."""
    def run(name, *words):
        with pytest.raises(SystemExit) as error:
            script(name, *words)
        sentence = error.value.code  # a text means exit code 1
        assert isinstance(sentence, str), f"exit code {sentence} is not that of a UserError"
        assert sentence.startswith(f"{name.split('.')[-1]}.py: ") and "\n" not in sentence
        return sentence

    return run


def command(name, *words, cwd, **environment):
    """Runs a script as a command of its own and returns the CompletedProcess."""
    start = ["-m", name] if "." in name else [str(REPOSITORY / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, *start, *map(str, words)], cwd=cwd, timeout=300, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(metrics_log, "LOG_EVERY", 1)


def metrics(folder):
    """Returns the lines of metrics.jsonl: (those of training steps, those of evaluations)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "heldout_loss" in line]


def pytest_configure(config):
    # As in support/pretrained.py: old names of transformers.
    config.addinivalue_line("filterwarnings", "ignore:`.*gradient_checkpointing.*` is depr:FutureWarning")
