"""What goes wrong while a run is under way ends in one sentence, and loses nothing."""

import errno
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from conftest import N, REPOSITORY, command, draw
from processes import SMALL, finish, metrics, start
from torch.utils.data import DataLoader

import model
import stage1_align
import toy.world
from data import ChatDataset, collate
from support import checkpoints, files, metrics_log, results, step_batches
from support.check_records import note_skipped_images
from support.errors import UserError, run_script
from support.images import ImageStore
from support.records import RecordFile, RecordSet


def wait_for(process, condition):
    while process.is_alive() and not condition():
        time.sleep(0.005)
    assert process.is_alive(), "the run ended too early for this test"


def failure(script, arguments, log, max_file_size=None):
    """Returns the sentence with which a script ends that runs in a child process."""
    process = start(script, arguments, log, max_file_size=max_file_size)
    process.join(120)
    text = log.read_text()
    assert process.exitcode == 1, text[-3000:]
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def first_step_is_logged(folder):
    path = folder / "metrics.jsonl"
    return path.exists() and '"lr"' in path.read_text()


# -- stopping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_its_step_saves_and_says_how_to_continue(number, tmp_path):
    """A terminal and a cluster's scheduler send the signal to the workers too."""
    arguments = ["--run", str(tmp_path), *SMALL, "--save-every", "9999", "--workers", "1"]
    process = start("stage1_align", arguments, tmp_path / "log")
    wait_for(process, lambda: first_step_is_logged(tmp_path / "stage1"))
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    step = torch.load(tmp_path / "stage1" / "checkpoint.pt", weights_only=True)["progress"]["step"]
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert f"at step {step} of" in last and "--resume" in last
    assert metrics(tmp_path / "stage1")[-1]["step"] == step


def test_a_stage_leaves_the_signal_handlers_as_they_were(script, flags):
    before = {number: signal.getsignal(number) for number in checkpoints.STOP_SIGNALS}
    script("stage1_align", *flags(1, max_steps=1))
    interrupt_after_step(1, script, flags(1, max_steps=3, run="interrupted"))
    assert {number: signal.getsignal(number) for number in checkpoints.STOP_SIGNALS} == before


def test_a_second_interrupt_stops_at_once(tmp_path):
    # Every step is followed by a long evaluation, in which the signals come.
    arguments = ["--run", str(tmp_path), *SMALL, "--eval-every", "1", "--heldout", "240"]
    process = start("stage1_align", arguments, tmp_path / "log")
    wait_for(process, lambda: first_step_is_logged(tmp_path / "stage1"))
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGINT
    assert "saved" not in (tmp_path / "log").read_text()


def test_a_second_process_in_the_same_folder_is_refused_until_the_first_has_ended(tmp_path):
    arguments = ["--run", str(tmp_path), *SMALL]
    first = start("stage1_align", arguments, tmp_path / "log")
    wait_for(first, lambda: (tmp_path / "stage1" / "checkpoint.pt").exists())
    for flag in ("--resume", "--restart"):
        sentence = failure("stage1_align", [*arguments, flag], tmp_path / "second log")
        assert "another process is training" in sentence and "stage1" in sentence and "--run" in sentence
    assert first.is_alive()
    first.kill()  # leaves .lock behind
    first.join()
    resumed = start("stage1_align", [*arguments, "--resume"], tmp_path / "log")
    wait_for(resumed, lambda: "resuming" in (tmp_path / "log").read_text())
    resumed.kill()
    resumed.join()


# -- resuming, or not --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run that was stopped at its first checkpoint."""
    folder = tmp_path_factory.mktemp("unfinished")
    process = start("stage1_align", ["--run", str(folder), *SMALL], folder / "log")
    wait_for(process, lambda: (folder / "stage1" / "checkpoint.pt").exists())
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    return folder


def test_an_unfinished_run_is_not_overwritten_by_accident(unfinished, tmp_path):
    before = (unfinished / "stage1" / "checkpoint.pt").read_bytes()
    sentence = failure("stage1_align", ["--run", str(unfinished), *SMALL], tmp_path / "log")
    assert "unfinished run" in sentence and "--resume" in sentence and "--restart" in sentence
    assert (unfinished / "stage1" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flag, value", [("--lr", "0.5"), ("--seed", "3"), ("--max-length", "99"),
                                         ("--data", "toy/data/instruct.json"), ("--precision", "bf16"),
                                         ("--decode", "True")])
def test_resuming_with_another_setting_names_it(unfinished, flag, value, tmp_path):
    arguments = ["--run", str(unfinished), *SMALL, "--resume", flag, *[value] * (flag != "--decode")]
    sentence = failure("stage1_align", arguments, tmp_path / "log")
    assert "--resume" in sentence and flag in sentence and value in sentence


def test_a_resumed_run_may_divide_its_effective_batch_differently_but_not_change_it(unfinished, tmp_path):
    shutil.copytree(unfinished / "stage1", tmp_path / "stage1")
    arguments = ["--run", str(tmp_path), *SMALL, "--resume", "--batch-size", "2"]
    assert "--grad-accum" in failure("stage1_align", [*arguments, "--grad-accum", "2"], tmp_path / "log")
    process = start("stage1_align", [*arguments, "--grad-accum", "4"], tmp_path / "log")
    wait_for(process, lambda: "resuming" in (tmp_path / "log").read_text())
    process.kill()
    process.join()


def test_a_run_is_not_resumed_on_other_records(script, refusal, flags, drawn, tmp_path):
    """Its order of samples would be lost."""
    shutil.copy(drawn / "chat.json", tmp_path / "chat.json")
    arguments = flags(1, data=tmp_path / "chat.json", max_steps=4, save_every=1, batch_size=2)
    interrupt_after_step(2, script, arguments)
    records = json.loads((tmp_path / "chat.json").read_text())
    (tmp_path / "chat.json").write_text(json.dumps(records[1:]))
    assert "records have changed" in refusal("stage1_align", *arguments, "--resume")
    (tmp_path / "chat.json").write_text(json.dumps(records))
    script("stage1_align", *arguments, "--resume")


def interrupt_after_step(step, script, arguments):
    """Runs stage 1 and interrupts it when it logs that step."""
    log_step = metrics_log.MetricsLog.log_step

    def interrupting(self, number, **values):
        log_step(self, number, **values)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patches, pytest.raises(SystemExit) as stop:
        patches.setattr(metrics_log.MetricsLog, "log_step", interrupting)
        script("stage1_align", *arguments)
    assert stop.value.code == 128 + signal.SIGTERM


class Dangerous:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return open, ("created by a pickle", "w")


def damaged_checkpoints(content):
    yield "truncated", content[:len(content) // 2]
    yield "a bit flipped in its pickle", content.replace(b"weights", b"weight\xff")
    yield "empty", b""
    yield "no checkpoint", b"<html>404</html>"
    for name, value in (("a list", []), ("a dict", {}), ("without progress", {"settings": {}}),
                        ("with other progress", {"settings": {}, "progress": {"steps": 1}})):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        yield name, buffer.getvalue()
    yield "a pickle", pickle.dumps(Dangerous(), protocol=2)
    buffer = io.BytesIO()
    torch.save(Dangerous(), buffer)
    yield "a pickle in a checkpoint", buffer.getvalue()


def test_a_damaged_checkpoint_is_refused_and_its_code_is_not_run(script, refusal, flags, tmp_path):
    arguments = flags(1, max_steps=4, save_every=1, batch_size=2)
    interrupt_after_step(2, script, arguments)
    path = tmp_path / "runs" / "toy" / "stage1" / "checkpoint.pt"
    for name, content in damaged_checkpoints(path.read_bytes()):
        path.write_bytes(content)
        sentence = refusal("stage1_align", *arguments, "--resume")
        assert "checkpoint.pt is damaged" in sentence and "--restart" in sentence, name
    assert not (tmp_path / "created by a pickle").exists()


@pytest.mark.parametrize("name", results.RESULT_FILES)
def test_a_flipped_bit_or_a_missing_file_of_a_finished_stage_is_noticed(
        name, script, refusal, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=0))
    script("stage2_instruct", *flags(2, max_steps=0))
    folder = tmp_path / "runs" / "toy" / "stage2"
    content = bytearray((folder / name).read_bytes())
    content[len(content) * 3 // 4] ^= 1
    (folder / name).write_bytes(content)
    sentence = refusal("sanity_check", "--sample", "0")
    assert "stage2 is damaged" in sentence and name in sentence
    (folder / name).unlink()
    assert "stage2 is damaged" in refusal("sanity_check", "--sample", "0")


def test_stage_2_does_not_begin_with_a_damaged_projector(script, refusal, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=0))
    path = tmp_path / "runs" / "toy" / "stage1" / "projector.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "stage1 is damaged" in refusal("stage2_instruct", *flags(2, max_steps=0))


@pytest.mark.parametrize("change", [lambda run: run.pop("settings"), lambda run: run.pop("records"),
                                    lambda run: run.update(checksums=7)])
def test_a_run_json_that_lacks_a_part_is_one_sentence(change, script, refusal, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=0))
    path = tmp_path / "runs" / "toy" / "stage1" / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))
    assert "is damaged" in refusal("sanity_check")


def test_a_vision_layer_that_does_not_exist_is_one_sentence(script, refusal, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=0))
    path = tmp_path / "runs" / "toy" / "stage1" / "run.json"
    path.write_text(path.read_text().replace('"vision_layer": -2', '"vision_layer": 99'))
    assert "run.json: ValueError: vision layer 99" in refusal("sanity_check")


def test_more_tokens_than_the_llm_can_read_are_refused(script, refusal, flags, tmp_path):
    assert "--max-length" in refusal("stage1_align", *flags(1, max_length=100_000))
    script("stage1_align", *flags(1, max_steps=0))
    image = tmp_path / "a.png"
    draw("red").save(image)
    assert "ask a shorter question" in refusal("sanity_check", "--image", image, "--question", "word " * 5000)


def test_a_name_that_no_file_can_have_is_one_sentence(refusal):
    name = "a" * 300
    for script, flag in (("stage1_align", "--run"), ("stage1_align", "--data"), ("stage1_align", "--llm"),
                         ("sanity_check", "--run")):
        assert name in refusal(script, flag, name)


def test_another_chat_template_than_that_of_the_training_is_refused(tmp_path):
    """A projector works best with the prompts it was trained with, and nothing would show the difference."""
    llm = shutil.copytree(REPOSITORY / "toy" / "llama-chat", tmp_path / "llm")
    arguments = ["--run", str(tmp_path), *SMALL, "--llm", str(llm), "--max-steps", "0"]
    finish("stage1_align", arguments, tmp_path / "log")
    template = llm / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "USER:"))
    assert "chat template" in failure("stage2_instruct", arguments, tmp_path / "log")


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(condition, factor) multiplies the losses of a forward pass by `factor` if condition(number of
    forward passes in train mode, whether the model is in train mode) is true."""
    forward, calls = model.Llava.forward, []

    def poison(condition, factor):
        calls.clear()

        def poisoned_forward(self, **batch):
            calls.extend([batch] * self.training)
            losses = forward(self, **batch)
            return losses * factor if condition(len(calls), self.training) else losses

        monkeypatch.setattr(model.Llava, "forward", poisoned_forward)

    return poison


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step_and_names_the_records(
        tmp_path, monkeypatch, poisoned):
    # The third micro-batch is in the second step of two.
    poisoned(lambda number, training: training and number == 3, float("nan"))
    monkeypatch.setattr(sys, "argv", ["stage1_align.py", "--run", str(tmp_path), *SMALL, "--save-every", "1"])
    with pytest.raises(UserError, match="step 2: loss nan.*--lr.*GCC_train_") as error:
        stage1_align.main()
    assert str(error.value).count("GCC_train_") == 8
    checkpoint = torch.load(tmp_path / "stage1" / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["step"] == 1
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())


def test_ten_overflows_in_a_row_stop_an_fp16_run_and_nine_do_not(script, refusal, flags, tmp_path, poisoned):
    arguments = flags(1, max_steps=20, precision="fp16")
    # Nine, then one good step, after which the count begins again.
    poisoned(lambda number, training: training and number not in (10, 20), float("inf"))
    script("stage1_align", *arguments)
    lines = (tmp_path / "runs" / "toy" / "stage1" / "metrics.jsonl").read_text()
    assert "Infinity" not in lines and "NaN" not in lines and '"loss": null' in lines
    poisoned(lambda number, training: training and number != 5, float("inf"))
    sentence = refusal("stage1_align", *arguments, "--restart")
    assert "step 15: loss inf" in sentence and "drawn_0" in sentence


def test_one_overflow_stops_a_run_in_fp32(refusal, flags, poisoned):
    poisoned(lambda number, training: training and number == 3, float("inf"))
    assert "step 3: loss inf" in refusal("stage1_align", *flags(1, max_steps=9))


def test_a_model_whose_last_step_made_it_useless_is_not_saved_as_a_result(refusal, flags, tmp_path, poisoned):
    poisoned(lambda number, training: number == 2 and not training, float("nan"))
    assert "not finite" in refusal("stage1_align", *flags(1, max_steps=2))
    folder = tmp_path / "runs" / "toy" / "stage1"
    assert not (folder / "run.json").exists() and not (folder / "projector.safetensors").exists()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """learned(precision) returns the held-out losses before and after 40 steps of the toy."""
    folder = tmp_path_factory.mktemp("precision")

    def run(precision):
        arguments = ["--run", str(folder / precision), *SMALL, "--max-steps", "40", "--heldout", "32",
                     "--eval-every", "9999"]
        if not (folder / precision).exists():
            finish("stage1_align", [*arguments, "--precision", precision], folder / "log")
        losses = [line["heldout_loss"] for line in metrics(folder / precision / "stage1")
                  if "heldout_loss" in line]
        return losses[0], losses[-1]

    return run


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_what_fp32_learns(learned, precision):
    """fp16 begins with overflows, because the first scale is too large. Those steps are skipped."""
    before, after = learned(precision)
    assert after < 0.8 * before
    assert after == pytest.approx(learned("fp32")[1], rel=0.1)


# -- resources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory\nmore"),
    MemoryError(),
], ids=["CUDA", "CPU", "Python"])
def test_out_of_memory_says_which_flags_to_change(monkeypatch, error):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["stage1_align.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    for words in ("out of memory", *str(error).splitlines()[:1], "--batch-size", "--grad-accum",
                  "--activation-checkpointing", "--max-length"):
        assert words in stop.value.code
    assert "\n" not in stop.value.code


def test_out_of_memory_of_a_tool_names_no_flag_of_the_stages(monkeypatch):
    def main():
        raise MemoryError

    monkeypatch.setattr(sys, "argv", ["sanity_check.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert "out of memory" in stop.value.code and "--device cpu" in stop.value.code
    assert "--grad-accum" not in stop.value.code


@pytest.mark.parametrize("error, flag", [
    ("DataLoader worker (pid 12) is killed by signal: Killed. ", "--workers"),
    ("DataLoader worker (pid(s) 1, 2) exited unexpectedly", "--workers"),
    ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers "
     "are out of shared memory. Please try to raise your shared memory limit.", "--shm-size"),
])
def test_a_lost_worker_says_what_to_change(monkeypatch, error, flag):
    def main():
        raise RuntimeError(error)

    monkeypatch.setattr(sys, "argv", ["stage1_align.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert flag in stop.value.code and "--workers" in stop.value.code and "\n" not in stop.value.code


def test_too_little_shared_memory_is_one_sentence_and_no_endless_wait(monkeypatch):
    """As in Docker with its 64 MB. A worker that fails while it sends a batch would only print the error."""
    def too_little(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr(torch.Tensor, "share_memory_", too_little)  # workers are forked and inherit it
    monkeypatch.setattr(sys, "argv", ["stage1_align.py"])
    samples = [{"input_ids": [1, 2], "labels": [1, 2], "pixel_values": None}] * 4
    loader = DataLoader(samples, batch_size=2, num_workers=1, collate_fn=partial(collate, pad_token_id=0),
                        multiprocessing_context="fork")
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: next(iter(loader)))
    assert "too little shared memory" in stop.value.code and "--workers 0" in stop.value.code


def test_an_error_in_a_worker_ends_the_command(flags, tmp_path, drawn):
    """The exception keeps the workers alive. They ignore SIGTERM, so multiprocessing would wait forever."""
    shutil.copytree(drawn / "images", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        path.write_text("<html>404</html>")
    done = command("stage1_align", *flags(1, images=tmp_path / "images", workers=2), cwd=tmp_path)
    assert done.returncode == 1 and "8 records in a row cannot be used" in done.stderr.splitlines()[-1]


def test_many_micro_batches_of_a_worker_need_few_open_files(tmp_path):
    """Every tensor that a worker sends is an open file: 32 micro-batches have 128. The files of two steps
    would be more than this process may open."""
    arguments = ["--run", str(tmp_path), *SMALL, "--limit", "70", "--epochs", "1", "--batch-size", "1",
                 "--grad-accum", "32", "--workers", "1"]
    process = start("stage1_align", arguments, tmp_path / "log", max_open_files=256)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]


@pytest.mark.parametrize("accumulation, prefetched", [(1, 2), (8, 8), (128, 16)])
def test_a_worker_prepares_at_most_16_micro_batches(accumulation, prefetched, monkeypatch):
    """With pinned memory only the worker's files are open, four for each micro-batch."""
    settings = {}
    loader = ({"skipped": []} for _ in itertools.count())
    monkeypatch.setattr(step_batches, "DataLoader", lambda *_, **named: settings.update(named) or loader)
    next(step_batches.load_steps([], [[[0]] * accumulation] * 2, 0, 1, torch.device("cpu")))
    assert settings["prefetch_factor"] == prefetched


def test_a_bug_still_shows_its_traceback():
    illegal_access = "CUDA error: an illegal memory access was encountered"  # no lack of memory
    for bug in (ZeroDivisionError(), RuntimeError(illegal_access)):
        def main():
            raise bug

        with pytest.raises(type(bug)):
            run_script(main)


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(unfinished, tmp_path):
    """The child process may write only 60 kB to a file, and a checkpoint has 200 kB."""
    shutil.copytree(unfinished / "stage1", tmp_path / "stage1")
    before = (tmp_path / "stage1" / "checkpoint.pt").read_bytes()
    assert len(before) > 100_000
    arguments = ["--run", str(tmp_path), *SMALL, "--resume"]
    sentence = failure("stage1_align", arguments, tmp_path / "log", max_file_size=60_000)
    assert "cannot write" in sentence and "checkpoint.pt" in sentence
    assert (tmp_path / "stage1" / "checkpoint.pt").read_bytes() == before


def test_a_disk_that_fills_up_while_the_result_is_written_is_one_sentence(tmp_path):
    """Without a step there is no checkpoint, and the projector has 66 kB."""
    arguments = ["--run", str(tmp_path), *SMALL, "--max-steps", "0"]
    sentence = failure("stage1_align", arguments, tmp_path / "log", max_file_size=40_000)
    assert "cannot write" in sentence and "projector.safetensors" in sentence
    assert not (tmp_path / "stage1" / "run.json").exists()


def test_a_disk_that_fills_up_while_the_log_is_written_is_one_sentence(refusal, flags, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_log, "open", FullDisk, raising=False)
    sentence = refusal("stage1_align", *flags(1, max_steps=1))
    assert "cannot write" in sentence and "metrics.jsonl" in sentence and "No space left" in sentence


def test_a_disk_that_fills_up_while_skipped_images_are_listed_is_one_sentence(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    os.symlink("/dev/full", tmp_path / "skipped.txt")
    with pytest.raises(UserError, match="cannot write .*skipped.txt: No space left on device"):
        note_skipped_images([], ["an image"], tmp_path, 1.0, 1)


def test_a_folder_that_vanishes_during_the_run_is_one_sentence(refusal, flags, monkeypatch, tmp_path):
    log_step = metrics_log.MetricsLog.log_step

    def vanishing(self, *args, **values):
        log_step(self, *args, **values)
        shutil.rmtree(tmp_path / "runs")

    monkeypatch.setattr(metrics_log.MetricsLog, "log_step", vanishing)
    assert "cannot write" in refusal("stage1_align", *flags(1, max_steps=1))


# -- images that cannot be decoded -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_an_image(tmp_path_factory):
    """A folder with 40 records in chat.json and their images in images/ and images.zip. One image is cut off
    in the middle. Returns its record and the folder."""
    folder = tmp_path_factory.mktemp("data")
    toy.world.draw_if_missing()
    records = json.loads((REPOSITORY / "toy" / "data" / "instruct.json").read_text())[:40]
    (folder / "chat.json").write_text(json.dumps(records))
    (folder / "images").mkdir()
    for record in records:
        shutil.copy(REPOSITORY / "toy" / "data" / "images" / record["image"], folder / "images")
    bad = folder / "images" / records[7]["image"]
    bad.write_bytes(bad.read_bytes()[:700])
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in (folder / "images").iterdir():
            archive.write(path, path.name)
    return records[7], folder


HELD_OUT = ["--heldout-data", "toy/data/heldout_chat.json", "--heldout-images", "toy/data/heldout.zip"]


@pytest.mark.parametrize("images, workers", [("images", 0), ("images", 2), ("images.zip", 0)])
def test_an_image_that_cannot_be_decoded_is_replaced_named_and_counted_once(
        half_an_image, images, workers, tmp_path):
    record, folder = half_an_image
    arguments = ["--run", str(tmp_path), *SMALL, "--data", str(folder / "chat.json"), "--epochs", "3",
                 "--images", str(folder / images), "--allow-bad", "0.03", "--workers", str(workers), *HELD_OUT]
    finish("stage1_align", arguments, tmp_path / "log")
    [line] = (tmp_path / "stage1" / "skipped.txt").read_text().splitlines()
    assert record["id"] in line and record["image"] in line
    assert json.loads((tmp_path / "stage1" / "run.json").read_text())["skipped_images"] == 1
    assert metrics(tmp_path / "stage1")[-2]["samples"] == 3 * 40


@pytest.mark.parametrize("workers", [0, 2])
def test_decode_finds_an_image_that_cannot_be_decoded_before_the_training(
        half_an_image, workers, script, refusal, tmp_path, capsys):
    record, folder = half_an_image
    arguments = [*SMALL, "--data", str(folder / "chat.json"), "--images", str(folder / "images"),
                 "--check-data", "--workers", workers, *HELD_OUT]
    script("stage1_align", *arguments)
    out = capsys.readouterr().out
    assert "40 usable" in out and "not opened; --decode" in out
    script("stage1_align", *arguments, "--decode", "--allow-bad", "0.03")
    out = capsys.readouterr().out
    assert "39 usable" in out and "1 unusable: image cannot be decoded" in out and "not opened" not in out
    assert record["id"] in out and record["image"] in out
    assert "1 of 44 records cannot be used" in refusal("stage1_align", *arguments, "--decode")


def test_more_undecodable_images_than_allowed_stop_the_run(half_an_image, tmp_path):
    record, folder = half_an_image
    arguments = ["--run", str(tmp_path), *SMALL, "--data", str(folder / "chat.json"), "--epochs", "1",
                 "--images", str(folder / "images")]
    sentence = failure("stage1_align", arguments, tmp_path / "log")
    assert "the images of 1 records cannot be decoded" in sentence and record["image"] in sentence


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_broken_images_is_one_sentence_also_from_a_worker(
        template, image_processor, tmp_path, monkeypatch, workers):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    records = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(30)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    for i in range(30):
        (tmp_path / f"{i}.png").write_text("<html>404</html>")
    records = RecordSet(RecordFile(tmp_path / "chat.json"), ImageStore(tmp_path), np.arange(30))
    loader = DataLoader(ChatDataset(records, template, image_processor, N, 500), num_workers=workers,
                        batch_size=None)
    monkeypatch.setattr(sys, "argv", ["stage1_align.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: next(iter(loader)))
    sentence = stop.value.code
    assert sentence.startswith("stage1_align.py: 20 records in a row cannot be used; the last: record 19")
    assert "\n" not in sentence and "19.png" in sentence


@pytest.fixture
def broken_held_out(drawn, tmp_path):
    """Six held-out records. The image of the first is a web page, and the second is no conversation. Returns
    the settings for flags()."""
    records = json.loads((drawn / "instruct.json").read_text())[:6]
    shutil.copytree(drawn / "images", tmp_path / "held out")
    (tmp_path / "held out" / records[0]["image"]).write_text("<html>404</html>")
    records[1]["conversations"] = []
    (tmp_path / "heldout.json").write_text(json.dumps(records))
    return dict(heldout_data=tmp_path / "heldout.json", heldout_images=tmp_path / "held out", heldout=6)


def test_a_held_out_record_that_cannot_be_used_is_dropped_counted_and_named(
        script, flags, broken_held_out, tmp_path, capsys):
    arguments = flags(1, max_steps=1, allow_bad=0.2, **broken_held_out)
    for check in (["--check-data"], []):
        script("stage1_align", *arguments, *check)
        out = capsys.readouterr().out
        assert "6 records" in out and "4 usable" in out
        assert "1 unusable: image cannot be decoded" in out and "'drawn_0'" in out and "red.png" in out
        assert "1 unusable: no human turn with a gpt turn after it" in out and "'drawn_1'" in out
    assert "8 samples to train on, 4 held out" in out
    assert "reference: a blue picture" in out  # record 2 is the first that is left
    script("stage2_instruct", *flags(2, max_steps=1, allow_bad=0.2, **broken_held_out))
    capsys.readouterr()
    for i in (0, 3):
        script("sanity_check", "--sample", i, "--max-new-tokens", 2)
        out = capsys.readouterr().out
        assert f"held-out record {i} of 4: id drawn_{i + 2}," in out and "different image" in out
    script("sanity_check", "--show-mask", 0)
    assert "a blue picture" in capsys.readouterr().out


def test_too_few_usable_held_out_records_are_refused(refusal, flags, broken_held_out, tmp_path):
    assert "2 of 14 records cannot be used" in refusal("stage1_align", *flags(1, **broken_held_out))
    records = json.loads((tmp_path / "heldout.json").read_text())[:3]
    (tmp_path / "heldout.json").write_text(json.dumps(records))
    sentence = refusal("stage1_align", *flags(1, **broken_held_out), "--allow-bad", "1", "--check-data")
    assert "fewer than two usable held-out records have an image" in sentence
