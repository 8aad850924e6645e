"""Which samples each optimizer step uses, in which micro-batches, and whether the longest of them fits."""

import time
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

from data import collate
from model import IGNORE_INDEX
from support.errors import UserError, is_out_of_memory
from support.processes import ignore_signals_in_worker


class Step(NamedTuple):
    """One optimizer step, as one process sees it."""
    indices: list  # of the samples of this process, one list per micro-batch
    num_samples: int  # of all processes


def plan_steps(lengths, settings, processes, progress):
    """Returns the rest of the training of one process as a list of Steps. lengths[i]: approximate number of
    tokens of sample i.

    The samples of all epochs form one long sequence, each epoch in a random order drawn from (seed, epoch). A
    step takes the next batch_size × grad_accum × world_size of them; the last step of an epoch takes what is
    left. So a run can be resumed after progress.samples samples, even with another number of processes.
    """
    batch_size, rank, world_size = settings.batch_size, processes.rank, processes.world_size
    effective, n = batch_size * settings.grad_accum * world_size, len(lengths)
    epochs, remaining = settings.epochs, None
    if settings.max_steps is not None:  # the steps of the whole run; they replace the epochs
        remaining = max(0, settings.max_steps - progress.step)
        epochs = ceil((progress.samples + remaining * effective) / n)
    steps = []
    for epoch in range(progress.samples // n, epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(n)
        begin = max(0, progress.samples - epoch * n)
        steps += [order[i:i + effective] for i in range(begin, n, effective)]
    steps = steps[:remaining]
    sizes = [len(step) for step in steps]
    print(f"batch: {batch_size} (micro-batch) × {settings.grad_accum} (accumulation) × {world_size} "
          f"(processes) = {effective} samples per step; "
          f"{progress.step + len(steps):,} steps on {n:,} samples")
    # Sorted by length, a micro-batch needs little padding. The gradient stays the same, because the loss is
    # one mean over the labeled tokens of the step. (Sorting a whole epoch would remove the randomness.)
    if effective > batch_size:
        steps = [step[np.argsort(-lengths[step], kind="stable")] for step in steps]
    # Process r of P takes samples r, r + P, r + 2P, … so that all processes get samples of similar lengths.
    steps = [step[rank::world_size].tolist() for step in steps]
    return [Step([step[i:i + batch_size] for i in range(0, len(step), batch_size)], size)
            for step, size in zip(steps, sizes)]


def loader_options(workers, grad_accum, device):
    """Returns the arguments of the DataLoader that have nothing to do with the samples."""
    # A generator of its own, because the loader would otherwise draw a seed from the global one, and a
    # resumed run of stage 2 would then draw different dropout masks.
    options = {"num_workers": workers, "generator": torch.Generator(), "pin_memory": device.type == "cuda"}
    if workers:
        # While the GPU computes a step, the workers prepare the next one, or about 64 micro-batches of it.
        options |= {"prefetch_factor": 1 + ceil(min(max(2, grad_accum), 64) / workers),
                    "worker_init_fn": ignore_signals_in_worker}
    return options


def next_micro_batches(batches, count):
    """Takes the next `count` micro-batches from a DataLoader's iterator. Returns them, the sentences about
    images that could not be decoded, and the seconds spent waiting."""
    started, micro_batches, skipped = time.perf_counter(), [], []
    for _ in range(count):
        batch = next(batches)
        skipped += batch.pop("skipped")
        # A copy, because every tensor that comes from a worker is an open file.
        micro_batches.append({name: tensor.clone() if tensor.is_shared() else tensor
                              for name, tensor in batch.items()})
    return micro_batches, skipped, time.perf_counter() - started


def try_longest_batch(model, dataset, autocast, settings):
    """Takes one forward and backward pass of the micro-batch that is probably the longest, with a label on
    every token of text, so that hardly any micro-batch of the run needs more memory. Prints the peak.
    (AdamW's two numbers per trained parameter come on top, from the first step on.) Raises UserError if it
    does not fit, so that a run does not fail hours later. Changes nothing in the run: weights
    and random numbers stay, and gradients are None afterwards."""
    device = model.llm.device
    longest = np.argsort(-dataset.approx_lengths, kind="stable")[:settings.batch_size].tolist()
    batch = collate([dataset[i] for i in longest], dataset.template.pad_token_id)
    # A shorter sample can have more labels than the longest, and logits can take more memory than the blocks.
    is_text = batch["attention_mask"] & (batch["input_ids"] != dataset.template.image_token_id)
    batch["labels"] = batch["input_ids"].masked_fill(~is_text, IGNORE_INDEX)
    size, length = batch["input_ids"].shape
    text = f"longest micro-batch: {size} samples of up to {length:,} tokens"
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from it
            with autocast():
                losses = model(**{name: batch[name].to(device) for name in batch if name != "skipped"})
            losses.sum().backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "lower --max-length" if settings.activation_checkpointing else \
            "add --activation-checkpointing"
        if settings.batch_size > 1:
            parts = next(n for n in range(2, settings.batch_size + 1) if settings.batch_size % n == 0)
            advice = (f"pass --batch-size {settings.batch_size // parts} --grad-accum "
                      f"{settings.grad_accum * parts}, which gives the same gradient, or {advice}")
        raise UserError(f"out of memory; {text}: {advice}") from error
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        text += (f"; peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB, and "
                 f"{torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GiB of the GPU are still free")
    print(text)
