"""Which samples each optimizer step uses, in which micro-batches, and whether the longest of them fits."""

import time
from functools import partial
from itertools import chain
from math import ceil

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import collate
from support.processes import ignore_signals_in_worker
from support.errors import UserError, is_out_of_memory


def plan_steps(lengths, settings, processes, progress):
    """Returns the rest of the training of one process as (sample_indices, sizes). sample_indices[k] lists the
    micro-batches of an optimizer step. Each micro-batch lists the indices of its samples. sizes[k] is the
    number of samples of that step over all processes. lengths[i]: approximate number of tokens of sample i.

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
    # Sorted by length, a micro-batch needs little padding. The gradient stays the same, because the loss is a
    # sum over the whole step. (Sorting a whole epoch would remove the randomness.)
    if effective > batch_size:
        steps = [step[np.argsort(-lengths[step], kind="stable")] for step in steps]
    # Process r of P takes samples r, r + P, r + 2P, … so that all processes get samples of similar lengths.
    steps = [step[rank::world_size].tolist() for step in steps]
    return [[step[i:i + batch_size] for i in range(0, len(step), batch_size)] for step in steps], sizes


def plan_events(settings, total_steps):
    """Returns three sets of steps: after which to log, to evaluate, and to save a checkpoint. An evaluation
    follows the last step in any case."""
    automatic = max(1, ceil(total_steps / 20))
    eval_every, save_every = settings.eval_every or automatic, settings.save_every or min(100, automatic)
    log_at, eval_at, save_at = (set(range(every, total_steps, every))
                                for every in (settings.log_every, eval_every, save_every))
    return log_at | {total_steps}, eval_at, save_at | {total_steps}


def print_plan(settings, world_size, training, heldout, total_steps):
    """Prints the sizes of the batch and of the data."""
    product = settings.batch_size * settings.grad_accum * world_size
    print(f"batch: {settings.batch_size} (micro-batch) × {settings.grad_accum} (accumulation) × {world_size} "
          f"(processes) = {product} samples per step\n"
          f"data: {training:,} samples to train on, {heldout:,} held out; {total_steps:,} steps")


def load_steps(dataset, sample_indices, pad_token_id, workers, device):
    """Yields (micro-batches, sentences about skipped images, seconds spent waiting) of each step.
    `sample_indices` is from plan_steps(). See collate() for what a micro-batch contains."""
    # Every tensor that a worker has prepared is an open file, so it prepares at most 16 micro-batches.
    loader = DataLoader(dataset, batch_sampler=list(chain(*sample_indices)),
                        collate_fn=partial(collate, pad_token_id=pad_token_id), num_workers=workers,
                        prefetch_factor=min(max([2, *map(len, sample_indices)]), 16) if workers else None,
                        worker_init_fn=ignore_signals_in_worker, pin_memory=device.type == "cuda",
                        # Without its own generator, the loader draws a seed from the global one. A resumed
                        # run of stage 2 would then draw different dropout masks.
                        generator=torch.Generator())
    batches = iter(loader)
    for step in sample_indices:
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in step]
        seconds = time.perf_counter() - started
        skipped = [sentence for batch in micro_batches for sentence in batch.pop("skipped")]
        yield micro_batches, skipped, seconds
        del micro_batches  # frees their memory before the next ones are loaded


def try_longest_batch(model, dataset, lengths, pad_token_id, device, autocast, settings):
    """Takes one forward and backward pass of the micro-batch that is probably the longest, and prints the
    peak memory. Raises UserError if it does not fit, so that a run does not fail hours later.
    Changes nothing in the run: weights and random numbers stay, and gradients are None afterwards."""
    longest = np.argsort(-lengths, kind="stable")[:settings.batch_size].tolist()
    batch = collate([dataset[i] for i in longest], pad_token_id)
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
