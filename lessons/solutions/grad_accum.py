"""Gradient accumulation: which loss gives the gradient of the whole batch?

    python -m lessons.solutions.grad_accum

The loss of a batch is the mean over its labeled tokens. Micro-batches have different numbers of them, so the
mean over the micro-batches' means is a different number.
"""

import torch

from data import collate
from lessons.toy_parts import load_datasets, load_model
from model import IGNORE_INDEX
from support.errors import run_script


def gradient(model, micro_batches, mean_of_means):
    """Returns the gradient of the projector's weight, added up over the micro-batches."""
    n = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in micro_batches)
    model.zero_grad()
    for batch in micro_batches:
        losses = model(**batch)  # (K,)
        loss = losses.mean() / len(micro_batches) if mean_of_means else losses.sum() / n
        loss.backward()
    return model.projector.weight.grad.clone()


def main():
    model, template = load_model()
    model.projector.requires_grad_(True)
    train_dataset, _ = load_datasets(template, stage=2)
    samples = [train_dataset[i] for i in range(8)]

    def split(size):
        batches = [collate(samples[i:i + size], template.pad_token_id) for i in range(0, 8, size)]
        return [{name: value for name, value in batch.items() if name != "skipped"} for batch in batches]

    whole = gradient(model, split(8), mean_of_means=False)
    errors = {}
    for mean_of_means in (False, True):
        accumulated = gradient(model, split(2), mean_of_means)
        errors[mean_of_means] = ((accumulated - whole).norm() / whole.norm()).item()
    assert torch.equal(whole, gradient(model, split(8), mean_of_means=True))  # one micro-batch: no difference
    assert errors[False] < 1e-5 and errors[True] > 0.05
    print(f"4 micro-batches of 2 instead of 1 of 8: the gradient changes by {errors[False]:.1e} of its "
          f"length with losses.sum() / n, by {errors[True]:.0%} with losses.mean() / grad_accum")


if __name__ == "__main__":
    run_script(main)
