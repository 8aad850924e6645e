"""A run that is killed and resumed ends exactly like one that was never killed."""

import os
import random
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from processes import SMALL, finish, metrics, start

from support import checkpoints, files, results

# 36 steps; the last step of each epoch takes what is left. The kills come in the first two thirds.
RUN = ["--limit", "90", "--epochs", "3", *SMALL]


def outcome(folder):
    """Returns everything that a stage leaves behind, except times."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
               if path.is_file() and path.name not in ("metrics.jsonl", "run.json", "README.md")}
    lines = metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return {**content, "metrics": lines, "finished": (folder / "run.json").exists()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    finish("stage1_align", ["--run", str(folder), *RUN], folder / "log")
    finish("stage2_instruct", ["--run", str(folder), *RUN], folder / "log")
    return folder


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return sum('"lr"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def kill_at(process, folder, step, while_writing, pause):
    """Sends SIGKILL `pause` seconds after a step or, if `while_writing`, as soon as the temporary file of a
    checkpoint exists."""
    while process.is_alive():
        if steps_logged(folder) >= step:
            if not while_writing:
                time.sleep(pause)
                break
            if (folder / ".checkpoint.pt.tmp").exists():
                break
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("script, stage, seed", [
    ("stage1_align", "stage1", 1), ("stage2_instruct", "stage2", 2)])
def test_a_run_killed_five_times_and_resumed_is_bit_identical_to_one_that_was_never_killed(
        script, stage, seed, unbroken, tmp_path):
    rng = random.Random(seed)
    if stage == "stage2":
        os.symlink(unbroken / "stage1", tmp_path / "stage1")
    arguments = ["--run", str(tmp_path), *RUN]
    for i, step in enumerate(sorted(rng.sample(range(4, 23), 5))):
        process = start(script, arguments + ["--resume"] * (i > 0), tmp_path / "log")
        kill_at(process, tmp_path / stage, step, while_writing=i in (1, 3), pause=rng.uniform(0, 0.1))
        # What has this name is always complete.
        checkpoint = torch.load(tmp_path / stage / "checkpoint.pt", weights_only=True)
        assert checkpoint["progress"]["step"] >= 3
    finish(script, arguments + ["--resume"], tmp_path / "log")
    assert (tmp_path / "log").read_text().count("resuming") >= 3  # some kills come before that line
    assert outcome(tmp_path / stage) == outcome(unbroken / stage)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the scripts catches it."""


@contextmanager
def killed_at(n):
    """Makes the nth operation on a file raise Killed; None only counts. Yields the list of operations."""
    patches, calls = pytest.MonkeyPatch(), []

    def watch(module, name):
        operation = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == n:
                raise Killed
            return operation(*args, **kwargs)

        patches.setattr(module, name, call)

    for module, name in ((os, "replace"), (torch, "save"), (results, "save_file"), (files, "delete"),
                         (checkpoints, "delete")):
        watch(module, name)
    try:
        yield calls
    finally:
        patches.undo()


def test_a_run_killed_at_any_operation_on_a_file_is_never_taken_for_another(script, flags, tmp_path):
    """The folder holds a finished run with another seed, which --restart discards. At every moment the folder
    holds that run untouched, or an unfinished run, or the new run complete."""
    script("stage1_align", *flags(1, max_steps=0))
    folder = tmp_path / "runs" / "toy" / "stage2"
    script("stage2_instruct", *flags(2, max_steps=1, seed=9))
    old = outcome(folder)
    shutil.copytree(folder, tmp_path / "old")
    arguments = flags(2, max_steps=3, save_every=2, eval_every=2)
    with killed_at(None) as operations:
        script("stage2_instruct", *arguments, "--restart")
    new = outcome(folder)
    assert len(operations) >= 20 and old["projector.safetensors"] != new["projector.safetensors"]

    for n in range(1, len(operations) + 1):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
        with killed_at(n), pytest.raises(Killed):
            script("stage2_instruct", *arguments, "--restart")
        left = outcome(folder)
        if left["finished"]:
            left.pop("checkpoint.pt", None)
            assert left in (old, new)
        try:
            script("stage2_instruct", *arguments, "--restart" if left == old else "--resume")
        except SystemExit as stop:  # the run was killed after it had written its run.json
            assert stop.code == 0 and left == new
        assert outcome(folder) == new


def test_a_stage_2_of_another_stage_1_is_pointed_out(script, refusal, flags, capsys):
    script("stage1_align", *flags(1, max_steps=0))
    script("stage2_instruct", *flags(2, max_steps=0))
    for seed, expected in ((0, False), (1, True)):
        script("stage1_align", *flags(1, max_steps=0, seed=seed), "--restart")
        capsys.readouterr()
        script("sanity_check", "--show-mask", 0)
        assert ("trained from another stage 1" in capsys.readouterr().out) == expected
    script("sanity_check", "--show-mask", 0, "--stage", 1)
    assert "another stage 1" not in capsys.readouterr().out


def test_stage_2_is_not_resumed_on_another_stage_1(script, refusal, flags, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    script("stage1_align", *flags(1, max_steps=0))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("stage2_instruct.save_result", interrupt)
        script("stage2_instruct", *flags(2, max_steps=1))
    script("stage1_align", *flags(1, max_steps=0, seed=1), "--restart")
    sentence = refusal("stage2_instruct", *flags(2, max_steps=1), "--resume")
    assert "stage 1 has been trained again" in sentence and "--restart" in sentence


def test_a_finished_run_is_not_overwritten_without_restart(script, refusal, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=2))
    folder = tmp_path / "runs" / "toy" / "stage1"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for change in ({}, {"vision_layer": -1}, {"lr": 0.5}):
        sentence = refusal("stage1_align", *flags(1, max_steps=1, **change))
        assert "finished run" in sentence and "--restart" in sentence and "--run" in sentence
    with pytest.raises(SystemExit) as stop:
        script("stage1_align", *flags(1, max_steps=2), "--resume")
    assert stop.value.code == 0
    # Otherwise a script would go on with a result that was trained with other settings.
    assert "--lr" in refusal("stage1_align", *flags(1, max_steps=2, lr=0.5), "--resume")
    assert "--grad-accum" in refusal("stage1_align", *flags(1, max_steps=2, batch_size=4), "--resume")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_resume_and_restart_together_are_refused_because_restart_would_discard_the_run(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script("stage1_align", *flags(1), "--resume", "--restart")
    assert stop.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_a_restarted_run_that_is_killed_early_leaves_nothing_of_the_run_before(unbroken, tmp_path):
    shutil.copytree(unbroken / "stage1", tmp_path / "stage1")
    shutil.copytree(unbroken / "stage2", tmp_path / "stage2")
    for script, stage in (("stage2_instruct", "stage2"), ("stage1_align", "stage1")):
        arguments = ["--run", str(tmp_path), *RUN, "--restart", "--save-every", "9999", "--seed", "1"]
        os.utime(tmp_path / stage / "metrics.jsonl", (0, 0))  # marks the file of the run before
        process = start(script, arguments, tmp_path / "log")

        def has_taken_a_step():
            metrics = tmp_path / stage / "metrics.jsonl"
            try:
                return metrics.stat().st_mtime > 0 and steps_logged(tmp_path / stage) > 0
            except FileNotFoundError:  # deleted, and not yet written again
                return False

        while process.is_alive() and not has_taken_a_step():
            time.sleep(0.005)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert {path.name for path in (tmp_path / stage).iterdir()} == {"metrics.jsonl", ".lock"}
