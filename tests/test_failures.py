"""What goes wrong while a run is under way ends in one sentence, and loses nothing."""

import json
import os
import shutil
import zipfile
from itertools import count

import pytest
import torch
from conftest import command, draw, metrics
from safetensors.torch import load_file, save_file

import model
from support import records as records_module
from support.errors import UserError, run_script
from support.files import atomic_write


@pytest.fixture
def poison(monkeypatch):
    """poison(condition, factor) multiplies the losses of a forward pass in train mode by `factor` if
    condition(number of such passes) is true."""
    forward = model.Llava.forward

    def replace(condition, factor):
        calls = count(1)

        def poisoned_forward(self, **batch):
            losses = forward(self, **batch)
            return losses * factor if self.training and condition(next(calls)) else losses

        monkeypatch.setattr(model.Llava, "forward", poisoned_forward)

    return replace


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step_and_names_the_records(
        refusal, flags, tmp_path, poison):
    poison(lambda number: number == 4, float("nan"))  # after the longest: the first of the second step
    sentence = refusal("stage1_align", *flags(1, batch_size=4, grad_accum=2, save_every=1, max_steps=3))
    assert "step 2: loss nan" in sentence and sentence.count("drawn_") == 8
    checkpoint = torch.load(tmp_path / "runs" / "toy" / "stage1" / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["steps_taken"] == 1
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())


def test_ten_overflows_in_a_row_stop_an_fp16_run_and_nine_do_not(script, refusal, flags, tmp_path, poison):
    arguments = flags(1, max_steps=20, precision="fp16")
    poison(lambda number: number not in (11, 21), float("inf"))  # nine, then one good step, then nine
    script("stage1_align", *arguments)
    lines = (tmp_path / "runs" / "toy" / "stage1" / "metrics.jsonl").read_text()
    assert "Infinity" not in lines and "NaN" not in lines and '"loss": null' in lines
    poison(lambda number: number != 6, float("inf"))
    sentence = refusal("stage1_align", *arguments, "--restart")
    assert "step 15: loss inf" in sentence and "--precision fp32" in sentence


def test_a_held_out_record_that_overflows_is_left_out_counted_and_named_and_the_result_is_saved(
        script, flags, parts, template, drawn, tmp_path, capsys):
    """The token "▁olive" of this LLM overflows in fp16, and not in fp32."""
    llm = shutil.copytree(parts.llm, tmp_path / "llm")
    weights = load_file(llm / "model.safetensors")
    olive = template.tokenizer.convert_tokens_to_ids("▁olive")
    weights["model.embed_tokens.weight"][olive] = 65472 * torch.randn(48).sign()
    weights["model.layers.0.mlp.down_proj.weight"] *= 200
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    records = json.loads((drawn / "chat.json").read_text())[:3]
    records[1]["conversations"][0]["value"] += " olive"
    (tmp_path / "held.json").write_text(json.dumps(records))
    for precision, left_out in (("fp16", ["green.png"]), ("fp32", None)):
        script("stage1_align", *flags(1, llm=llm, heldout_data=tmp_path / "held.json", run=precision, lr=1e-5,
                                      precision=precision, max_steps=1))
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0: ")]
        assert all((words in line) == bool(left_out) for words in ("green.png", "fp32", "not finite"))
        heldout = json.loads((tmp_path / precision / "stage1" / "run.json").read_text())["heldout"]
        assert heldout.get("not_finite") == left_out and 0 < heldout["loss"] < 1000 and "nan" not in line


def test_trained_weights_that_are_not_finite_are_not_saved(refusal, flags, tmp_path):
    assert "weights are not finite" in refusal("stage1_align", *flags(1, max_steps=1, lr=1e39))
    folder = tmp_path / "runs" / "toy" / "stage1"
    assert not (folder / "run.json").exists() and not (folder / "projector.safetensors").exists()


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. 2 GiB.\nmore"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_a_lack_of_memory_says_which_flags_to_change(error):
    def main():
        raise error

    with pytest.raises(SystemExit, match=r"out of memory \(.*--batch-size.*--grad-accum"):
        run_script(main)


def test_another_error_of_cuda_shows_its_traceback():
    def main():
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    with pytest.raises(torch.AcceleratorError, match="illegal"):
        run_script(main)


def test_an_error_in_a_worker_ends_the_command(flags, tmp_path, drawn):
    """The exception keeps the workers alive. They ignore SIGTERM, so multiprocessing would wait forever."""
    many = json.loads((drawn / "chat.json").read_text()) * 300  # so many that the check does not open images
    (tmp_path / "many.json").write_text(json.dumps(many))
    shutil.copytree(drawn / "images", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        path.write_text("<html>404</html>")
    changes = dict(data=tmp_path / "many.json", images=tmp_path / "images", workers=2)
    done = command("stage1_align", *flags(1, **changes), cwd=tmp_path)
    assert done.returncode == 1 and "20 records in a row cannot be used" in done.stderr.splitlines()[-1]


def test_more_tokens_than_the_llm_can_read_are_refused(script, refusal, flags, tmp_path):
    assert "--max-length" in refusal("stage1_align", *flags(1, max_length=100_000))
    script("stage1_align", *flags(1, max_steps=0))
    draw("red").save(tmp_path / "a.png")
    assert "shorter question" in refusal("sanity_check", "--image", "a.png", "--question", "word " * 5000)


def test_a_file_never_replaces_a_folder_or_a_pipe_and_a_link_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match=name), atomic_write(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    with pytest.raises(RuntimeError, match="a bug"), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError("a bug")  # shows its traceback, unlike an error of writing
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize("images, workers", [("images", 2), ("images.zip", 0)])
def test_an_image_that_cannot_be_decoded_is_replaced_named_and_counted_once(
        drawn, tmp_path, images, workers, script, refusal, flags, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_CHECKED", 1)  # as for many records, the check opens no image
    folder = shutil.copytree(drawn / "images", tmp_path / "images")
    (folder / "green.png").write_bytes((folder / "green.png").read_bytes()[:90])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    changes = dict(images=tmp_path / images, workers=workers, epochs=3)
    script("stage1_align", *flags(1, allow_bad=0.2, **changes))
    folder = tmp_path / "runs" / "toy" / "stage1"
    [sentence] = json.loads((folder / "run.json").read_text())["skipped"]
    assert "drawn_1" in sentence and "green.png" in sentence
    assert metrics(folder)[0][-1]["samples"] == 3 * 8
    sentence = refusal("stage1_align", *flags(1, **changes), "--restart")
    assert "1 of 8 records cannot be used" in sentence and "green.png" in sentence


def test_held_out_records_that_cannot_be_used_are_left_out_counted_and_named(
        script, refusal, flags, drawn, tmp_path, capsys):
    """The image of the first is a web page."""
    records = json.loads((drawn / "instruct.json").read_text())[:4]
    shutil.copytree(drawn / "images", tmp_path / "held out")
    (tmp_path / "held out" / records[0]["image"]).write_text("<html>404</html>")
    (tmp_path / "heldout.json").write_text(json.dumps(records))
    arguments = flags(1, max_steps=1, heldout_data="heldout.json", heldout_images="held out")
    script("stage1_align", *arguments)
    out = capsys.readouterr().out
    assert "3 usable" in out and "1 unusable: image cannot be decoded" in out and "'drawn_0'" in out
    assert "reference: a green picture" in out  # of record 1, the first that is left
    script("sanity_check", "--sample", 2, "--max-new-tokens", 2)
    assert "held-out record 2 of 3: id drawn_3," in capsys.readouterr().out
    (tmp_path / "heldout.json").write_text(json.dumps(records[:2]))
    assert "fewer than two different images" in refusal("stage1_align", *arguments, "--restart")
