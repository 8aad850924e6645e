"""The labels are shifted twice, so position t learns to predict the token at t + 2. This happens if a script
shifts the labels and passes them to `Llava.forward`, which shifts them itself."""

import torch.nn.functional as F

from lessons.experiment import measure, replaced, train, training_loss, train_baseline
from model import IGNORE_INDEX, Llava

MINUTES, DIFFICULTY, CHANGE = 8, "easy", ["shift_twice"]
EXPECTED = """The training loss falls, but the model now always generates the token after the next one, so its
answers skip tokens and come out wrong."""
MEASURES = """The "training loss" is the mean of the last five logged steps, and every fifth step is
logged."""
MEANING = """The training loss stays far above that of the baseline, and not a single answer is right. The
models of transformers shift the labels, too, so do not pass them shifted labels."""

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
