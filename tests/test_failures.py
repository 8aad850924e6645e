"""What goes wrong while a run is under way ends in one sentence, and loses nothing."""

import json
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import command, draw, metrics

import model
from support import results
from support.errors import run_script


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
        refusal, flags, tmp_path, poisoned):
    # The third micro-batch is in the second step of two.
    poisoned(lambda number, training: training and number == 3, float("nan"))
    sentence = refusal("stage1_align", *flags(1, batch_size=4, grad_accum=2, save_every=1, max_steps=3))
    assert "step 2: loss nan" in sentence and "--lr" in sentence and sentence.count("drawn_") == 8
    checkpoint = torch.load(tmp_path / "runs" / "toy" / "stage1" / "checkpoint.pt", weights_only=True)
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


def test_a_model_whose_last_step_made_it_useless_is_not_saved_as_a_result(refusal, flags, tmp_path, poisoned):
    poisoned(lambda number, training: number == 2 and not training, float("nan"))
    assert "not finite" in refusal("stage1_align", *flags(1, max_steps=2))
    folder = tmp_path / "runs" / "toy" / "stage1"
    assert not (folder / "run.json").exists() and not (folder / "projector.safetensors").exists()


# -- resources ---------------------------------------------------------------------------------------------

LOST = {  # name: (script, error, what the sentence says)
    "memory of the GPU": ("stage1_align.py", torch.OutOfMemoryError("CUDA out of memory. 2 GiB.\nmore"), (
        "out of memory (CUDA out of memory. 2 GiB.)", "--batch-size", "--grad-accum",
        "docs/memory_and_speed.md")),
    "memory of the CPU": ("stage1_align.py", RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"),
                          ("out of memory", "--batch-size")),
    "memory of a tool": ("sanity_check.py", MemoryError(), ("out of memory", "--device cpu")),
    "a worker": ("stage1_align.py", RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
                 ("--workers",)),
    "shared memory": ("stage1_align.py", RuntimeError(
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers "
        "are out of shared memory."), ("--shm-size", "--workers 0")),
}


@pytest.mark.parametrize("script, error, expected", LOST.values(), ids=LOST)
def test_a_lack_of_memory_and_a_lost_worker_say_which_flags_to_change(monkeypatch, script, error, expected):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert "\n" not in stop.value.code and all(words in stop.value.code for words in expected)
    assert ("--grad-accum" in stop.value.code) == ("--batch-size" in expected)


def test_a_bug_still_shows_its_traceback():
    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")  # no lack of memory

    with pytest.raises(RuntimeError, match="illegal"):
        run_script(main)


def test_an_error_in_a_worker_ends_the_command(flags, tmp_path, drawn):
    """The exception keeps the workers alive. They ignore SIGTERM, so multiprocessing would wait forever."""
    shutil.copytree(drawn / "images", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        path.write_text("<html>404</html>")
    done = command("stage1_align", *flags(1, images=tmp_path / "images", workers=2), cwd=tmp_path)
    assert done.returncode == 1 and "8 records in a row cannot be used" in done.stderr.splitlines()[-1]


def test_more_tokens_than_the_llm_can_read_are_refused(script, refusal, flags, tmp_path):
    assert "--max-length" in refusal("stage1_align", *flags(1, max_length=100_000))
    script("stage1_align", *flags(1, max_steps=0))
    draw("red").save(tmp_path / "a.png")
    sentence = refusal("sanity_check", "--image", "a.png", "--question", "word " * 5000)
    assert "ask a shorter question" in sentence


# -- what a stage has left, and was changed since ----------------------------------------------------------


def test_a_flipped_bit_or_a_missing_file_of_a_finished_stage_is_noticed(script, refusal, flags, tmp_path):
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, max_steps=0))
    for stage, names in ((2, results.RESULT_FILES), (1, ["projector.safetensors"])):
        for name in names:
            path = tmp_path / "runs" / "toy" / f"stage{stage}" / name
            content = path.read_bytes()
            for damaged in (content[:-1] + bytes([content[-1] ^ 1]), None):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                sentence = (refusal("sanity_check", "--sample", "0") if stage == 2 else
                            refusal("stage2_instruct", *flags(2, max_steps=0), "--restart"))
                assert f"stage{stage} is damaged" in sentence and name in sentence
            path.write_bytes(content)


def test_another_chat_template_than_that_of_the_training_is_refused(script, refusal, flags, parts, tmp_path):
    """A projector works best with the prompts it was trained with, and nothing would show the difference."""
    llm = shutil.copytree(parts.llm, tmp_path / "llm")
    script("stage1_align", *flags(1, llm=llm, max_steps=0))
    template = llm / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "USER:"))
    assert "chat template" in refusal("stage2_instruct", *flags(2, llm=llm))


# -- images that cannot be decoded -------------------------------------------------------------------------


@pytest.fixture
def half_an_image(drawn, tmp_path):
    """Copies of the drawn images in images/ and images.zip. "green.png" is cut off in the middle."""
    folder = shutil.copytree(drawn / "images", tmp_path / "images")
    (folder / "green.png").write_bytes((folder / "green.png").read_bytes()[:90])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return tmp_path


@pytest.mark.parametrize("images, workers", [("images", 2), ("images.zip", 0)])
def test_an_image_that_cannot_be_decoded_is_replaced_named_and_counted_once(
        half_an_image, images, workers, script, refusal, flags):
    changes = dict(images=half_an_image / images, workers=workers, epochs=3)
    script("stage1_align", *flags(1, allow_bad=0.2, **changes))
    folder = half_an_image / "runs" / "toy" / "stage1"
    [line] = (folder / "skipped.txt").read_text().splitlines()
    assert "drawn_1" in line and "green.png" in line
    assert json.loads((folder / "run.json").read_text())["skipped_images"] == 1
    assert metrics(folder)[0][-1]["samples"] == 3 * 8
    sentence = refusal("stage1_align", *flags(1, **changes), "--restart")
    assert "1 records cannot be used" in sentence and "green.png" in sentence


@pytest.mark.parametrize("workers", [0, 2])
def test_decode_finds_an_image_that_cannot_be_decoded_before_the_training(
        half_an_image, workers, script, refusal, flags, capsys):
    arguments = [*flags(1, images=half_an_image / "images", workers=workers), "--check-data"]
    script("stage1_align", *arguments)
    out = capsys.readouterr().out
    assert "8 usable" in out and "not opened; --decode" in out
    script("stage1_align", *arguments, "--decode", "--allow-bad", "0.2")
    out = capsys.readouterr().out
    assert "7 usable" in out and "1 unusable: image cannot be decoded" in out and "not opened" not in out
    assert "drawn_1" in out and "green.png" in out
    assert "1 of 12 records cannot be used" in refusal("stage1_align", *arguments, "--decode")


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
    script("stage1_align", *flags(1, max_steps=1, allow_bad=0.2, **broken_held_out))
    out = capsys.readouterr().out
    assert "6 records" in out and "4 usable" in out
    assert "1 unusable: image cannot be decoded" in out and "'drawn_0'" in out and "red.png" in out
    assert "1 unusable: no human turn with a gpt turn after it" in out and "'drawn_1'" in out
    assert "8 samples to train on, 4 held out" in out
    assert "reference: a blue picture" in out  # record 2 is the first that is left
    script("sanity_check", "--sample", 3, "--max-new-tokens", 2)
    assert "held-out record 3 of 4: id drawn_5," in capsys.readouterr().out


def test_too_few_usable_held_out_records_are_refused(refusal, flags, broken_held_out, tmp_path):
    assert "2 of 14 records cannot be used" in refusal("stage1_align", *flags(1, **broken_held_out))
    records = json.loads((tmp_path / "heldout.json").read_text())[:3]
    (tmp_path / "heldout.json").write_text(json.dumps(records))
    sentence = refusal("stage1_align", *flags(1, **broken_held_out), "--allow-bad", "1", "--check-data")
    assert "fewer than two different images" in sentence and "heldout.json" in sentence
