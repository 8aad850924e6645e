"""A run that is killed and resumed ends exactly like one that never was."""

import json
import os
import random
import signal
import time

import pytest
from processes import SMALL, finish, metrics, start
from safetensors.torch import load_file

# 48 steps, the last of each epoch on what is left over; the kills come in the first half, in good time.
RUN = ["--limit", "90", "--epochs", "4", *SMALL]


def outcome(folder):
    """Everything that a stage leaves behind, times aside."""
    tensors = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return {**tensors, "metrics": metrics(folder)}


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
    """SIGKILL, some time after a step or, `while_writing`, as soon as a checkpoint's temporary name shows."""
    while process.is_alive():
        if steps_logged(folder) >= step:
            if not while_writing:
                time.sleep(pause)
                break
            if any(folder.glob(".checkpoint-*.tmp")):
                break
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "script, stage, seed", [("stage1_align", "stage1", 1), ("stage2_instruct", "stage2", 2)]
)
def test_a_run_killed_five_times_and_resumed_is_bit_identical_to_one_that_never_was(
    script, stage, seed, unbroken, tmp_path
):
    rng = random.Random(seed)
    if stage == "stage2":
        os.symlink(unbroken / "stage1", tmp_path / "stage1")
    arguments = ["--run", str(tmp_path), *RUN]
    for i, step in enumerate(sorted(rng.sample(range(4, 23), 5))):
        process = start(script, arguments + ["--resume"] * (i > 0), tmp_path / "log")
        kill_at(process, tmp_path / stage, step, while_writing=i in (1, 3), pause=rng.uniform(0, 0.1))
        for checkpoint in (tmp_path / stage).glob("checkpoint-*"):  # whatever has this name is whole
            json.loads((checkpoint / "state.json").read_text())
            load_file(checkpoint / "tensors.safetensors")
    finish(script, arguments + ["--resume"], tmp_path / "log")
    assert (tmp_path / "log").read_text().count("resumed") >= 3
    assert outcome(tmp_path / stage) == outcome(unbroken / stage)
    assert not list((tmp_path / stage).glob(".*"))  # no litter of the kills


def test_a_checkpoint_whose_deletion_was_cut_short_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    import shutil

    import runs

    (tmp_path / "checkpoint-00000003").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.discard_checkpoints(tmp_path)
    assert runs.newest_checkpoint(tmp_path) is None
    monkeypatch.undo()
    runs.discard_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())
