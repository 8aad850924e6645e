"""The labels are shifted twice, so position t learns to predict the token at t + 2. `Llava.forward` shifts
them once already; a script that passes shifted labels shifts them again."""

import torch.nn.functional as F

from lessons.experiment import measure, replaced, train, training_loss, train_baseline
from model import IGNORE_INDEX, Llava

MINUTES, DIFFICULTY, CHANGE = 8, "easy", ["shift_twice"]
EXPECTED = """The training loss falls, and nothing raises an error. But the model now always generates the
token after the next one, so its answers skip tokens and come out wrong."""
MEASURES = """The "training loss" is the mean of the last five logged steps. Every fifth step is logged."""
MEANING = """No error is raised, but the training loss stays far above that of the baseline, and not a single
answer is right. The models of transformers shift the labels, too, so the same happens if you pass them
shifted labels."""

forward = Llava.forward


# Replaces Llava.forward.
def shift_twice(self, input_ids, labels, pixel_values, attention_mask):
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T); forward() shifts them again
    return forward(self, input_ids, labels, pixel_values, attention_mask)


def run(seed):
    after = train_baseline(1, seed)  # before anything is replaced
    with replaced(Llava, forward=shift_twice):
        changed = train(2, seed, "double-shift", after=after)
    return {name: {"training loss": training_loss(trained)} | measure(trained)
            for name, trained in (("baseline", train_baseline(2, seed)), ("shifted twice", changed))}
