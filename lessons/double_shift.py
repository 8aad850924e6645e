"""The labels are shifted twice: position t learns to predict the token at t + 2."""

import torch.nn.functional as F

from lessons.experiment import measure, replaced, train, training_loss, train_baseline
from model import IGNORE_INDEX, Llava

MINUTES, DIFFICULTY = 8, "easy"
EXPECTED = """The training loss falls, and nothing raises an error. But the model always generates the token
after the next one, so its answers leave out tokens and are wrong."""
MEANING = """No error is raised. The training loss stays far above that of the baseline, and no answer is
right. transformers' models shift the labels themselves, so a script that shifts them once more has this
bug."""

forward = Llava.forward


def shift_twice(self, input_ids, labels, pixel_values, attention_mask):
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T); forward() shifts them again
    return forward(self, input_ids, labels, pixel_values, attention_mask)


def run(seed):
    after = train_baseline(1, seed)  # before anything is replaced
    with replaced(Llava, forward=shift_twice):
        changed = train(2, seed, "double-shift", after=after)
    return {name: {"training loss": training_loss(trained)} | measure(trained)
            for name, trained in (("baseline", train_baseline(2, seed)), ("shifted twice", changed))}
