"""Which samples each optimizer step uses, in which micro-batches, whether the longest of them fits into the
memory, and whether a step has diverged."""

import time
from math import ceil, isfinite
from typing import NamedTuple

import numpy as np
import torch

from data import collate
from model import IGNORE_INDEX
from support.errors import UserError, is_out_of_memory


class Step(NamedTuple):
    """One optimizer step, as one process sees it."""
    sample_lists: list  # indices of the samples of this process, one list per micro-batch
    num_samples: int  # number of samples, of all processes


def plan_steps(lengths, args, processes, progress):
    """Returns the rest of the training of one process as a list of Steps. lengths[i]: approximate number of
    tokens of sample i.

    The samples of all epochs form one long sequence, each epoch in a random order drawn from (seed, epoch). A
    step takes the next batch_size × grad_accum × world_size of them; the last step of an epoch takes what is
    left. So a run can be resumed after progress.samples_seen samples, even with another number of processes.
    """
    batch_size, rank, world_size = args.batch_size, processes.rank, processes.world_size
    samples_per_step, n = batch_size * args.grad_accum * world_size, len(lengths)
    epochs, remaining = args.epochs, None
    if args.max_steps is not None:  # the steps of the whole run; they replace the epochs
        remaining = max(0, args.max_steps - progress.steps_taken)
        epochs = ceil((progress.samples_seen + remaining * samples_per_step) / n)
    all_steps = []  # the samples of each step, of all processes
    for epoch in range(progress.samples_seen // n, epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(n)
        begin = max(0, progress.samples_seen - epoch * n)
        all_steps += [order[i:i + samples_per_step] for i in range(begin, n, samples_per_step)]
    all_steps = all_steps[:remaining]
    print(f"batch: {batch_size} (micro-batch) × {args.grad_accum} (accumulation) × {world_size} "
          f"(processes) = {samples_per_step} samples per step; "
          f"{progress.steps_taken + len(all_steps):,} steps on {n:,} samples")
    plan = []
    for samples in all_steps:
        # Sorted by length, a micro-batch needs little padding. The gradient stays the same, because the loss
        # is one mean over the labeled tokens of the step. (Sorting a whole epoch would remove the
        # randomness.)
        if samples_per_step > batch_size:
            samples = samples[np.argsort(-lengths[samples], kind="stable")]
        # Process r of P takes samples r, r + P, r + 2P, … so that all processes get similar lengths.
        own = samples[rank::world_size].tolist()
        plan.append(Step([own[i:i + batch_size] for i in range(0, len(own), batch_size)], len(samples)))
    return plan


def prefetch_factor(workers, grad_accum):
    """Returns how many micro-batches each worker prepares. While the GPU computes a step, the workers prepare
    the next one, or about 64 micro-batches of it."""
    return 1 + ceil(min(max(2, grad_accum), 64) / workers) if workers else None


def next_micro_batches(batches, step):
    """Takes the micro-batches of a step from a DataLoader's iterator. Returns them, the sentences about
    records that turned out to be unusable, and the seconds spent waiting."""
    started, micro_batches, skipped = time.perf_counter(), [], []
    for _ in step.sample_lists:
        batch = next(batches)
        skipped += batch.pop("skipped")
        # A copy, because every tensor that comes from a worker is an open file.
        micro_batches.append({name: tensor.clone() if tensor.is_shared() else tensor
                              for name, tensor in batch.items()})
    return micro_batches, skipped, time.perf_counter() - started


def stop_if_diverged(progress, loss, grad_norm, scaler, records, step):
    """Raises UserError if the loss or the gradient is not finite, because the step would spoil all weights.
    In fp16 it allows nine such steps in a row, counted in progress.bad_steps, because scaler.step() skips
    them and scaler.update() lowers the scale."""
    progress.bad_steps = 0 if isfinite(loss + grad_norm) else progress.bad_steps + 1
    if progress.bad_steps >= (10 if scaler.is_enabled() else 1):
        ids = [str(records[i].get("id")) for samples in step.sample_lists for i in samples]
        advice = "--precision fp32, " if scaler.is_enabled() else ""
        raise UserError(f"step {progress.steps_taken + 1}: loss {loss:g}, gradient norm {grad_norm:g}; try "
                        f"{advice}a lower --lr, or look at the records of this step, such as "
                        f"{', '.join(ids[:16])}")


def try_longest_batch(model, dataset, lengths, autocast, scaler, args):
    """Takes one forward and backward pass of the micro-batch that is probably the longest, with a label on
    every token of text, so that hardly any micro-batch of the run needs more memory. Prints the peak.
    (AdamW's two numbers per trained parameter come on top, from the first step on.) Raises UserError if it
    does not fit, so that a run does not fail hours later. Weights stay as they are, and gradients are None
    afterwards. (It also lets the scaler create its scale, which unscale_() needs even in a process that has
    no sample in its first step.)"""
    device = model.llm.device
    longest = np.argsort(-lengths, kind="stable")[:args.batch_size].tolist()
    batch = collate([dataset[i] for i in longest], dataset.template.pad_token_id)
    # A shorter sample can have more labels than the longest, and logits can take more memory than the blocks.
    is_text = batch["attention_mask"] & (batch["input_ids"] != dataset.template.image_token_id)
    batch["labels"] = batch["input_ids"].masked_fill(~is_text, IGNORE_INDEX)
    size, length = batch["input_ids"].shape
    text = f"longest micro-batch: {size} samples of up to {length:,} tokens"
    try:
        with autocast():
            losses = model(**{name: batch[name].to(device) for name in batch if name != "skipped"})
        scaler.scale(losses.sum()).backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "lower --max-length" if args.activation_checkpointing else \
            "add --activation-checkpointing"
        if args.batch_size > 1:
            parts = next(n for n in range(2, args.batch_size + 1) if args.batch_size % n == 0)
            advice = (f"pass --batch-size {args.batch_size // parts} --grad-accum "
                      f"{args.grad_accum * parts}, which gives the same gradient, or {advice}")
        raise UserError(f"out of memory; {text}: {advice}") from error
    model.zero_grad()
    if device.type == "cuda":
        text += (f"; peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB, and "
                 f"{torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GiB of the GPU are still free")
    print(text)
