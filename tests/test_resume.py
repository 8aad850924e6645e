"""A run that is killed or interrupted and resumed ends exactly like one that was never stopped."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
import zipfile
from conftest import REPOSITORY
from processes import SMALL, finish, metrics, start

from support import checkpoints, files, results

# 24 steps; the last step of each epoch takes what is left. The kills come in the first two thirds.
RUN = ["--limit", "90", "--epochs", "2", *SMALL]


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


def wait_for(process, condition, pause=0.005):
    while process.is_alive() and not condition():
        time.sleep(pause)
    assert process.is_alive(), "the run ended too early for this test"


@pytest.mark.parametrize("script, stage, seed, kills", [
    ("stage1_align", "stage1", 1, 2), ("stage2_instruct", "stage2", 2, 4)])
def test_a_run_killed_several_times_and_resumed_is_bit_identical_to_one_that_was_never_killed(
        script, stage, seed, kills, unbroken, tmp_path):
    rng = random.Random(seed)
    if stage == "stage2":
        os.symlink(unbroken / "stage1", tmp_path / "stage1")
    arguments = ["--run", str(tmp_path), *RUN]
    for i, step in enumerate(sorted(rng.sample(range(4, 15), kills))):
        process = start(script, arguments + ["--resume"] * (i > 0), tmp_path / "log")
        wait_for(process, lambda: steps_logged(tmp_path / stage) >= step)
        if i in (1, 3):  # while a checkpoint is written
            wait_for(process, (tmp_path / stage / ".checkpoint.pt.tmp").exists, pause=0)
        else:
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join(60)
        # What has this name is always complete.
        checkpoint = torch.load(tmp_path / stage / "checkpoint.pt", weights_only=True)
        assert checkpoint["progress"]["steps_taken"] >= 3
    finish(script, arguments + ["--resume"], tmp_path / "log")
    assert (tmp_path / "log").read_text().count("resuming") >= kills - 1  # some kills come before that line
    assert outcome(tmp_path / stage) == outcome(unbroken / stage)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the scripts catches it."""


@contextmanager
def killed_at(n):
    """Makes the nth operation on a file raise Killed; None only counts. Yields the list of operations."""
    patches, calls = pytest.MonkeyPatch(), []

    def watch(operation):
        def call(*args, **kwargs):
            calls.append(operation)
            if len(calls) == n:
                raise Killed
            return operation(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (torch, "save"), (results, "save_file"), (files, "delete"),
                         (checkpoints, "delete"), (results, "delete")):
        patches.setattr(module, name, watch(getattr(module, name)))
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
    arguments = flags(2, max_steps=2, save_every=1)
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


def test_stage_2_is_not_resumed_on_another_stage_1(script, refusal, flags, monkeypatch):
    script("stage1_align", *flags(1, max_steps=0))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("support.results.save_result", Mock(side_effect=Killed))
        script("stage2_instruct", *flags(2, max_steps=1))
    script("stage1_align", *flags(1, max_steps=0, seed=1), "--restart")
    sentence = refusal("stage2_instruct", *flags(2, max_steps=1), "--resume")
    assert "stage1_projector" in sentence


def test_a_finished_run_is_not_overwritten_without_restart(script, refusal, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=2))
    folder = tmp_path / "runs" / "toy" / "stage1"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    sentence = refusal("stage1_align", *flags(1, max_steps=1, lr=0.5))
    assert "finished run" in sentence and "--restart" in sentence
    with pytest.raises(SystemExit) as stop:
        script("stage1_align", *flags(1, max_steps=2), "--resume")
    assert stop.value.code == 0
    # Otherwise a script would go on with a result that was trained with other settings.
    assert "lr" in refusal("stage1_align", *flags(1, max_steps=2, lr=0.5), "--resume")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_an_interrupted_run_finishes_its_step_saves_and_says_how_to_continue(tmp_path):
    """A cluster's scheduler sends the signal to the workers too."""
    arguments = ["--run", str(tmp_path), *SMALL, "--save-every", "9999", "--workers", "1"]
    process = start("stage1_align", arguments, tmp_path / "log")
    wait_for(process, lambda: steps_logged(tmp_path / "stage1"))
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "log").read_text()[-3000:]
    step = torch.load(tmp_path / "stage1" / "checkpoint.pt", weights_only=True)["progress"]["steps_taken"]
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert f"at step {step} of" in last and "--resume" in last
    assert metrics(tmp_path / "stage1")[-1]["step"] == step


def test_a_second_interrupt_stops_at_once(tmp_path):
    # Every step is followed by a long evaluation, in which the signals come.
    arguments = ["--run", str(tmp_path), *SMALL, "--eval-every", "1", "--heldout", "240"]
    process = start("stage1_align", arguments, tmp_path / "log")
    wait_for(process, lambda: steps_logged(tmp_path / "stage1"))
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGINT
    assert "saved" not in (tmp_path / "log").read_text()


def test_a_second_process_in_the_same_folder_is_refused(refusal, tmp_path):
    """Until the first one has ended. The tests above resume runs whose .lock is left by a killed process."""
    arguments = ["--run", str(tmp_path), *SMALL]
    first = start("stage1_align", arguments, tmp_path / "log")
    wait_for(first, (tmp_path / "stage1" / "checkpoint.pt").exists)
    for flag in ("--resume", "--restart"):
        assert "another process is training" in refusal("stage1_align", *arguments, flag)
    assert first.is_alive()
    first.kill()
    first.join()


@pytest.fixture
def interrupted(script, flags, drawn, tmp_path, monkeypatch):
    """A run of stage 1 that ended before its third step was saved. Returns its flags and its checkpoint."""
    save = checkpoints.StageFolder.save_checkpoint

    def save_two(folder, progress, *args):
        if progress.steps_taken == 3:
            raise KeyboardInterrupt
        save(folder, progress, *args)

    for name in ("chat.json", "heldout.json"):
        shutil.copy(drawn / "chat.json", tmp_path / name)
    arguments = flags(1, data=tmp_path / "chat.json", heldout_data=tmp_path / "heldout.json", max_steps=4,
                      batch_size=4, grad_accum=1, save_every=1)
    with monkeypatch.context() as patches, pytest.raises(SystemExit):
        patches.setattr(checkpoints.StageFolder, "save_checkpoint", save_two)
        script("stage1_align", *arguments)
    return arguments, tmp_path / "runs" / "toy" / "stage1" / "checkpoint.pt"


def test_an_unfinished_run_is_resumed_only_with_the_same_settings_samples_per_step_and_records(
        interrupted, refusal, script, tmp_path):
    """With other training records, its order of samples would be lost. With other held-out records, the
    losses before and after would not belong together."""
    arguments, checkpoint = interrupted
    before = checkpoint.read_bytes()
    sentence = refusal("stage1_align", *arguments)  # never by accident
    assert "unfinished run" in sentence and "--resume" in sentence and "--restart" in sentence
    for flag, value, named in (("--lr", "0.5", "lr"), ("--max-length", "99", "max.length"),
                               ("--precision", "bf16", "precision"),
                               ("--batch-size", "2", "samples.per.step")):
        sentence = refusal("stage1_align", *arguments, "--resume", flag, value)
        assert re.search(f"{named}.* not {value}", sentence)
    for path in (tmp_path / "chat.json", tmp_path / "heldout.json"):
        records = path.read_text()
        path.write_text(json.dumps(json.loads(records)[1:]))
        assert "records have changed" in refusal("stage1_align", *arguments, "--resume")
        path.write_text(records)
    assert checkpoint.read_bytes() == before
    # On a CPU, "auto" is fp32.
    script("stage1_align", *arguments, *"--resume --batch-size 2 --grad-accum 2 --precision auto".split())
    assert [line["samples"] for line in metrics(checkpoint.parent) if "loss" in line] == [4, 8, 12, 16]
    saved = json.loads((checkpoint.parent / "run.json").read_text())
    assert (saved["settings"]["precision"], saved["versions"]["gpu"]) == ("fp32", None)


def test_a_damaged_checkpoint_is_refused_in_one_sentence(interrupted, refusal):
    arguments, checkpoint = interrupted
    content = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size)
    at = weights.header_offset + weights.file_size // 2  # within the largest tensor
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    for damaged in (flipped, content[:len(content) // 2], b"", b"<html>404</html>"):
        checkpoint.write_bytes(damaged)
        assert "checkpoint.pt (if it is damaged" in refusal("stage1_align", *arguments, "--resume")


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(interrupted, tmp_path):
    """The child process may write fewer bytes to a file than a checkpoint has."""
    arguments, checkpoint = interrupted
    before = checkpoint.read_bytes()
    checkpoint = shutil.copytree(checkpoint.parent, tmp_path / "copy" / "stage1") / "checkpoint.pt"
    child = start("stage1_align", [*arguments, "--run", str(tmp_path / "copy"), "--resume"], tmp_path / "log",
                  limit=(resource.RLIMIT_FSIZE, len(before) // 2))
    child.join(120)
    text = (tmp_path / "log").read_text()
    assert child.exitcode == 1 and "Traceback" not in text, text
    assert "cannot write" in text.splitlines()[-1] and "checkpoint.pt" in text.splitlines()[-1]
    assert checkpoint.read_bytes() == before


def test_many_micro_batches_of_workers_need_few_open_files(flags, drawn, tmp_path):
    """Every tensor that a worker sends is an open file, and those of 256 micro-batches would be 1,024."""
    records = json.loads((drawn / "chat.json").read_text())
    (tmp_path / "many.json").write_text(json.dumps(records * 32))
    arguments = flags(1, data=tmp_path / "many.json", run=tmp_path, batch_size=1, grad_accum=256, epochs=1)
    process = start("stage1_align", [*arguments, "--workers", "2"], tmp_path / "log",
                    limit=(resource.RLIMIT_NOFILE, 256))
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    assert [line["samples"] for line in metrics(tmp_path / "stage1") if "loss" in line] == [256]
