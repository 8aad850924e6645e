"""Which samples each optimizer step uses, what a run logs, and whether a step fits."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics

from support import metrics_log
from support.checkpoints import Progress
from support.errors import UserError
from support.step_batches import plan_steps, prefetch_factor, try_longest_batch


def plan(length, rank=0, world_size=1, samples_done=0, steps_done=0, lengths=None, **changes):
    """Returns the steps: lists of micro-batches, which are lists of sample numbers."""
    settings = {**dict(batch_size=2, grad_accum=3, epochs=2, max_steps=None, seed=0), **changes}
    lengths = np.zeros(length) if lengths is None else np.array(lengths)
    steps = plan_steps(lengths, SimpleNamespace(**settings),
                       SimpleNamespace(rank=rank, world_size=world_size),
                       Progress(steps_taken=steps_done, samples_seen=samples_done))
    assert world_size > 1 or all(step.num_samples == len(flat([step.sample_lists])) for step in steps)
    return [step.sample_lists for step in steps]


def flat(steps):
    return [number for step in steps for batch in step for number in batch]


def test_every_epoch_sees_every_sample_once_and_keeps_its_last_partial_step():
    steps = plan(20)  # steps of 6: three whole ones and one of two, twice
    assert [sum(map(len, step)) for step in steps] == [6, 6, 6, 2] * 2
    assert all(len(batch) <= 2 for step in steps for batch in step)
    assert sorted(flat(steps[:4])) == sorted(flat(steps[4:])) == list(range(20))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    steps = plan(20)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert plan(20) == steps
    assert flat(plan(20, batch_size=6, grad_accum=1)) == flat(steps)  # nor on how a step is cut
    assert flat(steps[:4]) != flat(steps[4:]) and plan(20, seed=1) != steps


def test_max_steps_counts_optimizer_steps_and_may_exceed_the_epochs():
    assert plan(20, max_steps=3) == plan(20)[:3] and plan(20, max_steps=0) == []
    assert len(plan(20, max_steps=11, epochs=1)) == 11


def test_processes_share_a_step_without_overlap():
    alone = plan(20, batch_size=2, grad_accum=2, epochs=1)
    parts = [plan(20, world_size=2, rank=rank, batch_size=1, grad_accum=2, epochs=1) for rank in range(2)]
    assert [sorted(flat([step])) for step in alone] == [
        sorted(flat([one, other])) for one, other in zip(*parts, strict=True)]


def test_micro_batches_hold_samples_of_similar_length_and_no_sample_changes_its_step():
    lengths = np.random.default_rng(3).integers(1, 700, 20)
    steps, unsorted = plan(20, lengths=lengths), plan(20)
    assert [sorted(flat([step])) for step in steps] == [sorted(flat([step])) for step in unsorted]
    for step in steps:
        assert np.all(np.diff(lengths[flat([step])]) <= 0)  # the longest first
    assert steps[0] != unsorted[0]


@pytest.mark.parametrize("limits", [{}, {"max_steps": 7}])
def test_a_resumed_run_sees_the_rest_of_the_same_order(limits):
    steps = plan(20, **limits)
    for done in range(len(steps) + 1):
        samples = len(flat(steps[:done]))
        assert plan(20, samples_done=samples, steps_done=done, **limits) == steps[done:]


def test_the_line_without_a_terminal_says_loss_speed_waiting_and_time_left(tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(metrics_log, "time", clock)
    monkeypatch.setattr(metrics_log, "LOG_EVERY", 2)
    processes = SimpleNamespace(rank=0, device=torch.device("cpu"), sum=lambda x: x)
    folder = SimpleNamespace(path=tmp_path, processes=processes, checkpoint=None)
    progress = Progress()
    log = metrics_log.MetricsLog(folder, progress, total_steps=100)
    clock.now += 100  # before the first step, so it says nothing about the time left
    log.log_heldout({"loss": 1.0, "loss_different": 2.0, "correct_more_likely": 0.5}, "a", "b", [])
    for step in (1, 2, 4):
        clock.now += 10
        progress.steps_taken = step
        log.log_step(SimpleNamespace(param_groups=[]),
                     [{"attention_mask": torch.ones(8, 50)}], 2.5, loss=1.5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    # Not at step 4: once a minute is enough.
    assert lines == ["step 2 of 100: loss 1.500, 40 tokens/s, waiting for data 25%, 16:20 left"]
    line = metrics(tmp_path)[0][0]
    assert (line["tokens_per_s"], line["waiting"], line["seconds_left"]) == (40, 0.25, 980)


@pytest.mark.parametrize("batch_size, recompute, advice", [
    (9, False, "--batch-size 3 --grad-accum 24"),
    (1, False, "add --activation-checkpointing"), (1, True, "lower --max-length")])
def test_a_longest_batch_that_does_not_fit_names_the_flags_in_numbers(batch_size, recompute, advice):
    class Model:
        llm = SimpleNamespace(device=torch.device("cpu"))

        def __call__(self, **batch):
            raise RuntimeError("CUDA error: out of memory")

    class Samples(list):
        template = SimpleNamespace(pad_token_id=0, image_token_id=-1)

    samples = Samples({"input_ids": [1] * n, "labels": [1] * n, "pixel_values": None} for n in range(1, 31))
    settings = SimpleNamespace(batch_size=batch_size, grad_accum=8, activation_checkpointing=recompute)
    with pytest.raises(UserError, match="up to 30 tokens") as error:
        try_longest_batch(Model(), samples, np.arange(30), nullcontext, None, settings)
    assert advice in str(error.value)


@pytest.mark.parametrize("accumulation, workers, prefetched", [(1, 1, 2), (64, 2, 64), (256, 2, 64)])
def test_workers_prepare_a_whole_step_but_at_most_64_micro_batches(accumulation, workers, prefetched):
    """Else the GPU would wait for half of every step of stage 2. Every tensor of a prepared micro-batch is an
    open file. One more than needed is always prepared by each worker."""
    assert (prefetch_factor(workers, accumulation) - 1) * workers == prefetched
