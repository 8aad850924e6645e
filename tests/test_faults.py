"""What goes wrong while a run is under way ends in one sentence, and loses nothing."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import SMALL, finish, metrics, start
from safetensors.torch import load_file

import model
import plumbing
import runs
import stage1_align

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Puts pytest's own back where a test has run a stage in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wait_for(process, condition):
    while process.is_alive() and not condition():
        time.sleep(0.005)
    assert process.is_alive(), "the run ended too early for this test"


def failure(script, arguments, log, code=1):
    """The sentence with which a script in a child process ends."""
    process = start(script, arguments, log)
    process.join(120)
    text = log.read_text()
    assert process.exitcode == code, text[-3000:]
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


# -- stopping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_its_step_saves_and_says_how_to_go_on(number, tmp_path):
    process = start(
        "stage1_align", ["--run", str(tmp_path), *SMALL, "--save-every", "9999"], tmp_path / "log"
    )
    wait_for(
        process,
        lambda: (
            (tmp_path / "stage1" / "metrics.jsonl").exists()
            and '"lr"' in (tmp_path / "stage1" / "metrics.jsonl").read_text()
        ),
    )
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    [checkpoint] = (tmp_path / "stage1").glob("checkpoint-*")
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert f"stopped at step {step}" in last and "--resume" in last
    assert metrics(tmp_path / "stage1")[-1]["step"] == step


def test_a_second_interrupt_stops_at_once(tmp_path):
    process = start(
        "stage1_align",
        ["--run", str(tmp_path), *SMALL, "--eval-every", "1", "--held-out", "240"],
        tmp_path / "log",
    )  # every step is followed by a long look, in which the signals come
    wait_for(
        process,
        lambda: (
            (tmp_path / "stage1" / "metrics.jsonl").exists()
            and '"lr"' in (tmp_path / "stage1" / "metrics.jsonl").read_text()
        ),
    )
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGINT
    assert "stopped at step" not in (tmp_path / "log").read_text()


# -- going on, or not --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run that was stopped at its first checkpoint."""
    folder = tmp_path_factory.mktemp("unfinished")
    process = start("stage1_align", ["--run", str(folder), *SMALL], folder / "log")
    wait_for(process, lambda: list((folder / "stage1").glob("checkpoint-*")))
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    return folder


def test_an_unfinished_run_is_not_overwritten_by_accident(unfinished, tmp_path):
    sentence = failure("stage1_align", ["--run", str(unfinished), *SMALL], tmp_path / "log")
    assert "unfinished run" in sentence and "--resume" in sentence and "--restart" in sentence


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--lr", "0.5"),
        ("--seed", "3"),
        ("--max-length", "99"),
        ("--data", "toy/data/instruct.json"),
        ("--precision", "bf16"),
    ],
)
def test_resuming_with_another_setting_names_it(unfinished, flag, value, tmp_path):
    sentence = failure(
        "stage1_align", ["--run", str(unfinished), *SMALL, "--resume", flag, value], tmp_path / "log"
    )
    assert "--resume" in sentence and flag in sentence and value in sentence


def test_resuming_with_another_effective_batch_is_refused_and_another_cut_of_it_is_not(unfinished, tmp_path):
    shutil.copytree(unfinished / "stage1", tmp_path / "stage1")
    arguments = ["--run", str(tmp_path), *SMALL, "--resume", "--batch-size", "2"]
    assert "--grad-accum" in failure("stage1_align", [*arguments, "--grad-accum", "2"], tmp_path / "log")
    process = start("stage1_align", [*arguments, "--grad-accum", "4"], tmp_path / "log")
    wait_for(process, lambda: "resumed" in (tmp_path / "log").read_text())
    process.kill()
    process.join()


def test_a_finished_run_of_other_parts_is_not_overwritten(tmp_path):
    finish("stage1_align", ["--run", str(tmp_path), *SMALL, "--max-steps", "0"], tmp_path / "log")
    sentence = failure(
        "stage1_align", ["--run", str(tmp_path), *SMALL, "--vision-layer", "-1"], tmp_path / "log"
    )
    assert "vision_layer" in sentence and "--run" in sentence


def test_another_chat_template_is_refused(tmp_path):
    """The projector was trained to speak in one form; asked in another it would answer worse, and nobody
    know."""
    llm = shutil.copytree(ROOT / "toy" / "llama-chat", tmp_path / "llm")
    arguments = ["--run", str(tmp_path), *SMALL, "--llm", str(llm), "--max-steps", "0"]
    finish("stage1_align", arguments, tmp_path / "log")
    template = llm / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "USER:"))
    assert "chat template" in failure("stage2_instruct", arguments, tmp_path / "log")


# -- numbers -----------------------------------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run_before_the_step_and_names_the_records(tmp_path, monkeypatch):
    forward, calls = model.Llava.forward, []

    def poisoned(self, **batch):
        losses = forward(self, **batch)
        if not self.training:
            return losses
        calls.append(batch)
        return losses * float("nan") if len(calls) == 3 else losses  # in the second step of two micro-batches

    monkeypatch.setattr(model.Llava, "forward", poisoned)
    monkeypatch.setattr(sys, "argv", ["stage1_align.py", "--run", str(tmp_path), *SMALL, "--save-every", "1"])
    with pytest.raises(plumbing.UserError, match="step 2: loss nan.*--lr.*GCC_train_") as error:
        stage1_align.main()
    assert str(error.value).count("GCC_train_") == 8
    tensors = load_file(runs.newest_checkpoint(tmp_path / "stage1") / "tensors.safetensors")
    assert all(bool(tensor.isfinite().all()) for name, tensor in tensors.items() if "rng" not in name)


def test_ten_overflows_in_a_row_stop_an_fp16_run_and_nine_do_not():
    run = object.__new__(runs.Run)
    run.failures, run.step = 0, 4
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    window = type("Window", (), {"names": ["a", "b"]})
    for _ in range(9):
        run.check_finite(float("inf"), float("nan"), window)
    run.check_finite(1.0, 1.0, window)  # recovered: counting starts anew
    for _ in range(9):
        run.check_finite(1.0, float("inf"), window)
    with pytest.raises(plumbing.UserError, match="10 in a row.*a, b"):
        run.check_finite(1.0, float("inf"), window)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_what_fp32_learns(precision, tmp_path):
    """fp16 begins with overflows, since the first scale is too large: those steps are left out."""
    losses = {}
    for name in ("fp32", precision):
        finish(
            "stage1_align",
            [
                "--run",
                str(tmp_path / name),
                *SMALL,
                "--max-steps",
                "40",
                "--precision",
                name,
                "--held-out",
                "32",
            ],
            tmp_path / "log",
        )
        lines = [line for line in metrics(tmp_path / name / "stage1") if "heldout_loss" in line]
        losses[name] = lines[-1]["heldout_loss"]
        assert losses[name] < 0.8 * lines[0]["heldout_loss"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.1)


# -- resources ---------------------------------------------------------------------------------------------


def test_out_of_memory_says_which_flags_to_lower_with_their_values(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage1_align.py", "--batch-size", "24", "--grad-accum", "3"])

    def main():
        plumbing.parse_settings("", stage1_align.PRESETS)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    with pytest.raises(SystemExit) as stop:
        plumbing.launch(main)
    for words in ("Tried to allocate 2.00 GiB", "--batch-size 24", "--grad-accum 3", "--max-length 256"):
        assert words in stop.value.code
    assert "\n" not in stop.value.code


def test_a_full_disk_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(sys, "argv", ["stage1_align.py", "--run", str(tmp_path), *SMALL])
    with pytest.raises(plumbing.UserError, match="disk has 0 MiB left"):
        stage1_align.main()


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(unfinished, tmp_path, monkeypatch):
    shutil.copytree(unfinished / "stage1", tmp_path / "stage1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*checkpoint*/*")}

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "save_file", full)
    monkeypatch.setattr(sys, "argv", ["stage1_align.py", "--run", str(tmp_path), *SMALL, "--resume"])
    with pytest.raises(plumbing.UserError, match="No space left"):
        stage1_align.main()
    assert before and {path: path.read_bytes() for path in before} == before
    assert runs.newest_checkpoint(tmp_path / "stage1").name in str(next(iter(before)))


# -- images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_an_image(tmp_path_factory):
    """40 records in a folder of images, one of which is cut off in the middle: flags for stage 1."""
    folder = tmp_path_factory.mktemp("data")
    plumbing.find_file("toy/data/instruct.json")
    records = json.loads((ROOT / "toy" / "data" / "instruct.json").read_text())[:40]
    (folder / "chat.json").write_text(json.dumps(records))
    for record in records:
        shutil.copy(ROOT / "toy" / "data" / "images" / record["image"], folder)
    bad = folder / records[7]["image"]
    bad.write_bytes(bad.read_bytes()[:700])
    return records[7], ["--data", str(folder / "chat.json"), "--images", str(folder), *SMALL, "--epochs", "1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_replaced_counted_and_named(half_an_image, workers, tmp_path):
    record, flags = half_an_image
    arguments = ["--run", str(tmp_path), *flags, "--allow-bad", "0.1", "--workers", str(workers)]
    finish("stage1_align", arguments, tmp_path / "log")
    [line] = (tmp_path / "stage1" / "bad_images.txt").read_text().splitlines()
    assert record["id"] in line and record["image"] in line
    assert json.loads((tmp_path / "stage1" / "run.json").read_text())["bad_images"] == 1
    assert "1 images could not be decoded" in (tmp_path / "log").read_text()
    assert metrics(tmp_path / "stage1")[-2]["samples"] == 40


def test_more_undecodable_images_than_allowed_stop_the_run(half_an_image, tmp_path):
    record, flags = half_an_image
    sentence = failure("stage1_align", ["--run", str(tmp_path), *flags], tmp_path / "log")
    assert "1 images could not be decoded" in sentence and record["image"] in sentence
