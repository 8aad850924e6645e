"""Trains short runs of the toy, replaces functions, and measures, for all lessons.

A lesson trains fewer steps than the toy's presets (250 of 376 in stage 1, 50 of 188 in stage 2) and evaluates
120 held-out pictures, so that a lesson with three seeds takes minutes.
"""

from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from shutil import copytree, rmtree
from typing import NamedTuple
from unittest.mock import patch

import stage1_align
import stage2_instruct
from data import ChatDataset, ChatTemplate
from model import Llava
from support.evaluation import make_heldout_batches, measure_heldout
from support.pretrained import load_image_processor
from support.results import read_result
from support.trained import load_heldout_dataset
from tools.evaluate import answer_questions, list_questions, score_answers, score_captions
from tools.page import read_metrics

STAGES = {1: stage1_align, 2: stage2_instruct}
STEPS = {1: 250, 2: 50, "clip": 150}
HELDOUT = 120  # pictures
LIMIT = 0  # training records; 0: all
RUNS = Path("runs/lessons")

# `with replaced(Llava, encode_images=f):` makes f the method Llava.encode_images, for every user of Llava.
# After the block, the original method is back.
replaced = patch.multiple


class Trained(NamedTuple):
    """A model after a stage, as it was in memory when its training ended."""
    stage: int
    model: Llava
    template: ChatTemplate
    heldout_dataset: ChatDataset
    folder: Path  # of the run


def train(stage, seed, name, after=None, **settings):
    """Trains a stage of the toy and returns it as Trained.

    Args:
        name: the run's folder is runs/lessons/<name>-seed<seed>. What the stage prints is also written there,
            to stage1.txt or stage2.txt.
        after: for stage 2, the Trained stage 1 to continue from.
        settings: changes to the settings of the stage; see its PRESETS.
    """
    folder = RUNS / f"{name}-seed{seed}"
    if after and after.folder != folder:  # stage 2 reads the result of stage 1 from its own run folder
        rmtree(folder / "stage1", ignore_errors=True)
        copytree(after.folder / "stage1", folder / "stage1")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"run": folder, "seed": seed, "max_steps": STEPS[stage], "limit": LIMIT,
                "heldout": HELDOUT, "eval_every": 10**6, "precision": "fp32", **settings}
    if stage == 2:  # as for the real models; the toy's preset has none, to be faster
        settings.setdefault("lora_dropout", 0.05)
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]

    with open(folder / f"stage{stage}.txt", "w", encoding="utf-8") as file, redirect_stdout(file):
        model = STAGES[stage].main([*flags, "--restart"])
    run = read_result(folder / f"stage{stage}")
    template = ChatTemplate(run["llm"], model.num_image_tokens)
    image_processor = load_image_processor(run["vision_tower"])
    dataset = load_heldout_dataset(folder / f"stage{stage}", template, image_processor)
    return Trained(stage, model.eval(), template, dataset, folder)


@cache  # many lessons compare with it, and `all` trains it only once per seed
def train_baseline(stage, seed):
    """Trains a stage without any change. Returns it as Trained. Stage 2 continues from stage 1."""
    return train(stage, seed, "baseline", after=train_baseline(1, seed) if stage == 2 else None)


def answer(trained, questions):
    """Returns the generated answers to some held-out questions; see list_questions()."""
    return answer_questions(trained.model, trained.template, trained.heldout_dataset, questions,
                            batch_size=60, max_new_tokens=64)


def measure(trained, different_image=False):
    """Returns what a lesson compares, as a dict.

    "captions" (stage 1): F1 of color, shape and place in the generated captions.
    "answers" (stage 2): fraction of the generated answers that equal the reference answer.
    "loss": held-out loss with the correct image, in nats per token.
    "loss with a different image": held-out loss with a different image, only if it is asked for.
    """
    model, dataset, measured = trained.model, trained.heldout_dataset, {}
    questions = list_questions(dataset)
    if trained.stage == 1:
        scores = score_captions(answer(trained, questions), [question.reference for question in questions])
        measured["captions"] = scores["caption_f1"]
    else:
        measured["answers"] = score_answers(questions, answer(trained, questions))["qa_exact"]
    batches = make_heldout_batches(dataset, batch_size=40)
    losses = measure_heldout(model, batches)
    measured["loss"] = losses["loss"]
    if different_image:
        measured["loss with a different image"] = losses["loss_different"]
    return measured


def training_loss(trained):
    """Returns the mean training loss of the last five logged steps."""
    losses = [line["loss"] for line in read_metrics(trained.folder / f"stage{trained.stage}")[0]][-5:]
    return sum(losses) / len(losses)


def labels_changed(function):
    """Returns a context manager. In it, the labels of each sample are function(template, ids, labels)."""
    encode = ChatTemplate.encode_record

    def encode_with_other_labels(template, record, max_length):
        ids, labels = encode(template, record, max_length)
        return ids, function(template, ids, labels)
    return replaced(ChatTemplate, encode_record=encode_with_other_labels)
