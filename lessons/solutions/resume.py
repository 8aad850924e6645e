"""Saving and resuming a training loop.

    python -m lessons.solutions.resume

Four things decide the next step: the weights, the optimizer's state, the step number (for the learning rate)
and the state of the random numbers (for the order of the samples and for dropout).
"""

import os
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig

from data import collate
from lessons.toy_parts import load_datasets, load_model
from model import LORA_TARGETS
from support.errors import run_script

TOTAL_STEPS = 6


def save(path, model, optimizer, step):
    state = {"weights": model.trainable_parameters(), "optimizer": optimizer.state_dict(), "step": step,
             "rng": torch.get_rng_state()}
    torch.save(state, path.with_suffix(".unfinished"))
    # A kill while the file is written must not destroy the older checkpoint. os.replace() is atomic.
    os.replace(path.with_suffix(".unfinished"), path)


def load(path, model, optimizer, random_state=True):
    """Restores everything that save() wrote and returns the step. random_state=False leaves out the state of
    the random numbers, to show that it matters."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["weights"], strict=False)  # the frozen weights are not in the checkpoint
    optimizer.load_state_dict(state["optimizer"])
    if random_state:
        torch.set_rng_state(state["rng"])
    return state["step"]


def train(path, seed, until=TOTAL_STEPS, **load_settings):
    """Trains to step `until`, from the checkpoint if there is one. Returns the trained weights."""
    model, template = load_model(seed=seed)
    model.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=LORA_TARGETS,
                              task_type="CAUSAL_LM"))
    model.projector.requires_grad_(True)
    train_dataset, _ = load_datasets(template, stage=1)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), weight_decay=0.0)
    # Load after everything that draws random numbers, such as the new projector and adapter.
    step = load(path, model, optimizer, **load_settings) if path.exists() else 0
    model.train()
    while step < until:
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / TOTAL_STEPS)
        chosen = torch.randint(len(train_dataset), (4,)).tolist()
        batch = collate([train_dataset[i] for i in chosen], template.pad_token_id)
        del batch["skipped"]
        model(**batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    save(path, model, optimizer, step)
    return {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}


def main():
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder, "whole.pt"), seed=0)
        path = Path(folder, "killed.pt")
        half = train(path, seed=0, until=3)
        checkpoint = path.read_bytes()
        resumed = train(path, seed=1)  # a new process would start with other random weights
        path.write_bytes(checkpoint)
        other_numbers = train(path, seed=1, random_state=False)

    def count_equal(weights):
        return sum(torch.equal(weights[name], tensor) for name, tensor in whole.items())

    assert count_equal(half) == 0, "the last three steps changed nothing"
    assert count_equal(resumed) == len(whole), "3 + 3 steps do not give the weights of 6 steps"
    assert count_equal(other_numbers) == 0, "the random state makes no difference"
    print(f"3 + 3 steps: {count_equal(resumed)} of {len(whole)} tensors are bit-equal to those after 6; "
          f"without the random state: {count_equal(other_numbers)}")


if __name__ == "__main__":
    run_script(main)
