"""Which samples each optimizer step uses, in which order, and in which micro-batches."""

from math import ceil

import numpy as np


def plan_steps(lengths, batch_size, grad_accum, epochs, max_steps, seed, rank=0, world_size=1, samples_done=0,
               steps_done=0):
    """Returns (steps, sizes): the plan of the whole training for one process.

    steps[k] lists the micro-batches of an optimizer step, and each micro-batch lists its samples. sizes[k] is
    the number of samples of that step over all processes.

    The samples of all epochs form one long sequence, each epoch in a random order drawn from (seed, epoch). A
    step takes the next batch_size × grad_accum × world_size of them; the last step of an epoch takes what is
    left. The sequence depends on the seed alone. So a run can be resumed after `samples_done` samples, even
    with another number of processes.

    Within a step, samples are sorted by length, so that a micro-batch needs little padding. This changes
    nothing in the gradient, because the loss is a sum over the whole step. (Sorting a whole epoch would
    remove the randomness.) The longest samples of a step come first.

    Args:
        lengths: (samples,) approximate number of tokens of each sample.
        max_steps: None, or the number of steps of the whole run; it then replaces `epochs`.
    """
    effective, n = batch_size * grad_accum * world_size, len(lengths)
    remaining = None
    if max_steps is not None:
        remaining = max(0, max_steps - steps_done)
        epochs = ceil((samples_done + remaining * effective) / n)
    steps = []
    for epoch in range(samples_done // n, epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        begin = max(0, samples_done - epoch * n)
        steps += [order[i:i + effective] for i in range(begin, n, effective)]
    steps = steps[:remaining]
    sizes = [len(step) for step in steps]
    if effective > batch_size:
        steps = [step[np.argsort(-lengths[step], kind="stable")] for step in steps]
    # Process r of P takes samples r, r + P, r + 2P, … so that all processes get samples of similar lengths.
    steps = [step[rank::world_size].tolist() for step in steps]
    return [[step[i:i + batch_size] for i in range(0, len(step), batch_size)] for step in steps], sizes
