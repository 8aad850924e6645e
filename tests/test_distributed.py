"""Several processes, and accumulated micro-batches, compute what one large batch computes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from processes import SMALL, finish, metrics, start_all
from safetensors.torch import load_file

from support.devices import choose_device
from support.errors import UserError
from support.processes import Processes


def test_processes_and_micro_batches_give_the_gradient_of_the_large_batch(tmp_path):
    """One epoch of 17 samples, 8 in a step: two full steps, and a last one with a single sample, of which the
    second process gets nothing. With plain SGD and lr 1, the weights move by the sum of the gradients. A mean
    of means would be wrong by some percent."""
    one_epoch = [*SMALL, *"--limit 17 --epochs 1 --warmup 0 --lr 1 --max-grad-norm 1e9".split()]
    weights, lines = [], []
    for world_size, batch_size, grad_accum in [(1, "8", "1"), (2, "2", "2")]:
        run = tmp_path / str(world_size)
        arguments = ["--run", str(run), *one_epoch, "--batch-size", batch_size, "--grad-accum", grad_accum]
        finish("stage1_align", arguments, tmp_path / "log", world_size, plain_sgd=True)
        weights.append(load_file(run / "stage1" / "projector.safetensors"))
        lines.append(metrics(run / "stage1"))
    for name, expected in weights[0].items():
        largest = expected.abs().max().item()
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-6 * largest)
    one, two = ([line for line in part if "loss" in line] for part in lines)
    assert [line["samples"] for line in one] == [line["samples"] for line in two] == [8, 16, 17]
    for key in ("labeled_tokens", "loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5)


def test_processes_that_choose_different_precisions_agree_on_fp16(tmp_path):
    """A T4 chooses fp16 and a newer GPU bf16. Only the gradients of fp16 are scaled, so their sum would be
    wrong. Of the second step, the second process gets no sample."""
    lines = []
    for i, precisions in enumerate([("fp16", "fp16"), ("fp16", "bf16")]):
        arguments = ["--run", str(tmp_path / str(i)), *SMALL, "--limit", "17", "--epochs", "1"]
        finish("stage1_align", arguments, tmp_path / "log", world_size=2,
               own_arguments=[("--precision", precision) for precision in precisions])
        lines.append(metrics(tmp_path / str(i) / "stage1"))
    assert lines[0] == lines[1]
    assert [line["samples"] for line in lines[0] if "samples" in line] == [16, 17]


def test_a_process_whose_first_step_has_no_sample_takes_part_in_fp16(tmp_path):
    """So it is if a run is resumed at the short last step of an epoch."""
    finish("stage1_align", ["--run", str(tmp_path), *SMALL, *"--limit 1 --epochs 2 --precision fp16".split()],
           tmp_path / "log", world_size=2)
    assert [line["samples"] for line in metrics(tmp_path / "stage1") if "samples" in line] == [1, 2]


def test_ranks_that_another_launcher_than_torchrun_has_set_are_ignored(monkeypatch):
    """Schedulers and notebooks set them, and waiting for other processes would never end."""
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29777").items():
        monkeypatch.setenv(name, value)
    processes = Processes("cpu", "auto")
    assert (processes.rank, processes.world_size, processes.dtype) == (0, 1, torch.float32)


def test_processes_of_torchrun_cannot_all_have_the_same_gpu():
    with pytest.raises(UserError, match="pass --device cuda instead of cuda:0"):
        choose_device("cuda:0", local_rank=1)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in Linux's /proc")
def test_under_torchrun_a_run_with_a_killed_worker_is_resumed_and_ends_as_if_unbroken(tmp_path):
    """In stage 2 the processes draw different dropout masks, which depend on the step."""
    def torchrun():
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--",  # without this, torchrun takes our --run for a part of its own --run-path
             str(REPOSITORY / "stage2_instruct.py"), "--run", str(broken), *arguments, "--resume"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    arguments = [*SMALL, "--limit", "90", "--epochs", "2", "--batch-size", "2"]  # 24 steps of 2 × 2 × 2
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish("stage1_align", ["--run", str(unbroken), *SMALL, "--max-steps", "2"], tmp_path / "log")
    broken.mkdir()
    os.symlink(unbroken / "stage1", broken / "stage1")
    arguments += ["--lora-dropout", "0.2"]
    finish("stage2_instruct", ["--run", str(unbroken), *arguments], tmp_path / "log", world_size=2)

    first = torchrun()
    while not (broken / "stage2" / "checkpoint.pt").exists() and first.poll() is None:
        time.sleep(0.01)
    *_, worker = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert first.communicate(timeout=240) and first.returncode == 1
    second = torchrun()
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0 and "resuming" in output, output[-3000:]
    for name in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        assert (broken / "stage2" / name).read_bytes() == (unbroken / "stage2" / name).read_bytes()
    # The commands of torchrun log every fifth step.
    assert metrics(broken / "stage2") == [line for line in metrics(unbroken / "stage2") if "loss" not in line
                                          or line["step"] in (5, 10, 15, 20, 24)]


def test_a_run_of_two_processes_is_continued_by_one_from_the_same_sample(tmp_path):
    """Every sample of the epoch is seen once, however many processes share the work."""
    arguments = ["--run", str(tmp_path), *SMALL, "--limit", "60", "--epochs", "1", "--batch-size", "2"]
    children = start_all("stage1_align", arguments, tmp_path / "log", world_size=2)
    while not (tmp_path / "stage1" / "checkpoint.pt").exists():
        time.sleep(0.01)
        assert all(child.is_alive() for child in children), (tmp_path / "log").read_text()[-3000:]
    for child in children:
        os.kill(child.pid, signal.SIGTERM)
    for child in children:
        child.join(60)
        assert child.exitcode == 128 + signal.SIGTERM
    # One process with twice the accumulation has the same effective batch.
    finish("stage1_align", [*arguments, "--resume", "--grad-accum", "4"], tmp_path / "log")
    steps = [line for line in metrics(tmp_path / "stage1") if "samples" in line]
    assert [line["samples"] for line in steps] == [8, 16, 24, 32, 40, 48, 56, 60]
    resumed = int((tmp_path / "log").read_text().split("at step ")[-1].split()[0].rstrip(":,"))
    assert 3 <= resumed < 8
