"""The stages and the sanity check: they train what they should, and nothing else, and say clearly what is
wrong.

Two scripts are started as commands of their own, once for all tests; the others run in this process.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import N, command, draw, metrics
from data import collate
from model import LORA_TARGETS
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

import stage1_align
import stage2_instruct

MODULES = {1: stage1_align, 2: stage2_instruct}
NAMES = {1: "stage1_align", 2: "stage2_instruct"}


# -- learning ----------------------------------------------------------------------------------------------


def test_one_batch_can_be_learned_by_heart_and_hangs_on_its_images(tiny):
    """The whole path must carry: four pictures, one question, four answers, so only the picture tells them
    apart."""
    model, template, image_processor = tiny()
    model.add_lora(LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    model.projector.requires_grad_(True)
    samples = []
    question = {"role": "user", "content": "<image>\nWhat is it?"}
    answers = {"red": "a cat .", "green": "olive oil", "blue": "a live band", "white": "Yes"}
    for colour, answer in answers.items():
        ids, labels = template.encode([question, {"role": "assistant", "content": answer}], N)
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": image_processor(draw(colour))})
    batch = collate(samples, template.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(50):
        loss = model(**batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert model(**batch).mean() < 0.05
        others = {**batch, "pixel_values": batch["pixel_values"].roll(1, dims=0)}
        assert model(**others).mean() > 1
        ids = template.encode_prompt([question], N)
        prompts = collate([{"input_ids": ids, "pixel_values": s["pixel_values"]} for s in samples], 2)
        said = model.generate(**prompts, end_token_ids=[template.end_token_id])
    assert [template.decode(row) for row in said] == list(answers.values())


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def watched(monkeypatch):
    """watched(stage) → a dict that the script fills: "model", its parameters "before" the first step, and the
    "gradients" of every step, as they are before clipping."""

    def watch(stage):
        seen = {"gradients": []}
        windows, clip = MODULES[stage].Windows, torch.nn.utils.clip_grad_norm_
        build = MODULES[stage].build

        def watching_build(*args):
            seen["model"], *others = build(*args)
            return seen["model"], *others

        def watching_windows(*args):
            seen["before"] = snapshot(seen["model"])
            return windows(*args)

        def watching_clip(parameters, *args):
            parameters = list(parameters)
            seen["gradients"].append([parameter.grad.clone() for parameter in parameters])
            return clip(parameters, *args)

        monkeypatch.setattr(MODULES[stage], "build", watching_build)
        monkeypatch.setattr(MODULES[stage], "Windows", watching_windows)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watching_clip)
        return seen

    return watch


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_moves_all_it_trains_and_not_a_byte_of_what_is_frozen(script, flags, watched, stage):
    script("stage1_align", *flags(1, max_steps=0, seed=1))
    aligned = load_file(Path("runs/toy/stage1/projector.safetensors"))  # script() has changed the folder
    seen = watched(stage)
    if stage == 1:
        script("stage1_align", *flags(1, max_steps=1))
    else:  # two steps: LoRA's A has no gradient as long as B is zero
        script("stage2_instruct", *flags(2, max_steps=2, lr=1e-2, projector_lr=1e-2))
        assert torch.equal(seen["before"]["projector.weight"], aligned["weight"])  # where stage 1 ended
    for name, parameter in seen["model"].named_parameters():
        trained = name.startswith("projector.") or ".lora_" in name
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, seen["before"][name]) != trained, name
    assert any(".lora_A." in name for name in seen["before"]) == (stage == 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_gives_the_gradient_of_the_large_batch(script, flags, watched, stage):
    """To fp32's rounding; a mean of the micro-batches' means would be off, since answers' lengths differ."""
    script("stage1_align", *flags(1, max_steps=0))
    gradients, losses = [], []
    for batch_size, grad_accum in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        seen = watched(stage)
        more = {"lora_dropout": 0} if stage == 2 else {}
        script(NAMES[stage], *flags(stage, max_steps=1, batch_size=batch_size, grad_accum=grad_accum, **more))
        gradients.append(torch.cat([gradient.flatten() for gradient in seen["gradients"][0]]))
        losses.append(metrics(Path(f"runs/toy/stage{stage}"))[0][-1]["loss"])
    assert gradients[0].norm() > 0.01
    for gradient, loss in zip(gradients[1:], losses[1:]):
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)
        assert abs(loss - losses[0]) < 1e-5


# -- the whole way, as commands ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags):
    """A folder in which stage 1 and stage 2 have been run, and what they printed."""
    folder = tmp_path_factory.mktemp("trained")
    printed = {
        1: command("stage1_align", *flags(1, epochs=30, lr=2e-2, eval_every=10), cwd=folder),
        2: command(
            "stage2_instruct", *flags(2, epochs=40, lr=1e-2, projector_lr=1e-2, lora_dropout=0), cwd=folder
        ),
    }
    for stage, done in printed.items():
        assert done.returncode == 0, done.stderr
    return folder, printed


def test_stage_1_writes_its_projector_alone_and_stage_2_its_adapter_too(trained):
    folder = trained[0] / "runs" / "toy"
    assert {path.name for path in (folder / "stage1").iterdir()} == {
        "projector.safetensors",
        "run.json",
        "metrics.jsonl",
    }
    assert {path.name for path in (folder / "stage2").iterdir()} == {
        "projector.safetensors",
        "run.json",
        "metrics.jsonl",
        "adapter",
    }
    assert set(load_file(folder / "stage1" / "projector.safetensors")) == {"weight", "bias"}
    adapter = load_file(folder / "stage2" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    run = json.loads((folder / "stage2" / "run.json").read_text())
    assert (run["stage"], run["steps"], run["settings"]["lr"]) == (2, 40, 1e-2)


@pytest.mark.parametrize("stage, steps", [(1, 30), (2, 40)])
def test_the_loss_falls_and_every_step_is_logged(trained, stage, steps):
    lines, held_out = metrics(trained[0] / "runs" / "toy" / f"stage{stage}")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    expected = {"step", "samples", "loss", "lr", "grad_norm", "samples_per_s"}
    assert all(line.keys() >= expected for line in lines)
    assert lines[-1]["samples"] == 8 * steps
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert held_out[0]["step"] == 0 and held_out[-1]["step"] == steps
    assert held_out[-1]["heldout_loss"] < 0.8 * held_out[0]["heldout_loss"]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(trained):
    lines, _ = metrics(trained[0] / "runs" / "toy" / "stage1")
    rates = [line["lr"] for line in lines]
    assert rates[0] == pytest.approx(2e-2)  # 3% of 30 steps: one step of warm-up, at full rate
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3
    assert rates[15] == pytest.approx(1e-2, rel=0.15)


def test_a_stage_prints_its_plan_and_what_is_trained(trained):
    out = trained[1][2].stdout
    assert "8 (micro-batch) × 1 (accumulation) × 1 (processes) = 8 samples" in out
    assert f"<image>×{N}" in out and "</s>]]" in out  # a sample, its answers marked with their end tokens
    assert "UNEXPECTED" not in trained[1][1].stderr and "MISSING" not in trained[1][1].stderr


def test_the_sanity_check_answers_a_held_out_sample(trained):
    done = command("sanity_check", "--sample", 1, "--device", "cpu", cwd=trained[0])
    assert done.returncode == 0, done.stderr
    for word in ("PROMPT", f"<image>×{N}", "GENERATED", "TRUE", "a blank one", "another record's"):
        assert word in done.stdout
    said = done.stdout.split("GENERATED\n")[1].split("TRUE\n")
    # Learned by heart, to the end.
    assert said[0].strip() == said[1].splitlines()[0] == "a green picture , a green picture ."


def test_the_sanity_check_shows_the_mask_and_answers_about_any_picture(script, trained, tmp_path, capsys):
    run = trained[0] / "runs" / "toy"
    script("sanity_check", "--run", run, "--show-mask", 0)
    assert "[[a red picture .</s>]]" in capsys.readouterr().out
    draw("red").save(tmp_path / "mine.png")
    script("sanity_check", "--run", run, "--image", "mine.png", "--question", "What object is shown?")
    assert "What object is shown?" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [1, 2])
def test_the_evaluation_writes_its_figures_and_a_sheet_of_pictures(script, trained, tmp_path, stage):
    run = shutil.copytree(trained[0] / "runs", tmp_path / "runs") / "toy"
    script("sanity_check", "--eval", "--stage", stage)
    result = json.loads((run / "eval.json").read_text())
    assert result.keys() >= {
        "stage",
        "counts",
        "image_match",
        "captions_loss",
        "captions_loss_shuffled",
        "captions_loss_blank",
    }
    assert result["captions_loss"] > 0
    if stage == 2:
        assert result.keys() >= {"answers_loss", "answers_loss_shuffled", "qa_exact", "qa_exact_shuffled"}
        assert result["counts"]["answers_by_kind"] == {"description": 4, "object": 4}
        assert 0.5 <= result["qa_exact"] <= 1 and result["qa_exact_shuffled"] < result["qa_exact"]
    with Image.open(run / "sheet.png") as sheet:
        assert sheet.width > 500 and sheet.height > 200


def test_rows_of_text_alone_train_and_are_evaluated(script, flags, drawn, tmp_path):
    """LLaVA-1.5's mix has 40,000 of them."""
    records = json.loads((drawn / "instruct.json").read_text())
    for record in records:
        del record["kinds"]  # as in all data but the toy world's
    for i in (0, 4):
        del records[i]["image"]
        records[i]["conversations"] = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Yes ."}]
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    mixed = dict(data=tmp_path / "mixed.json", heldout_data=tmp_path / "mixed.json", held_out=8)
    script("stage1_align", *flags(1, max_steps=1))
    script("stage2_instruct", *flags(2, max_steps=2, batch_size=1, grad_accum=8, **mixed))
    script("sanity_check", "--sample", 0)
    script("sanity_check", "--eval")
    result = json.loads((tmp_path / "runs" / "toy" / "eval.json").read_text())
    assert result["answers_loss"] > 0 and "qa_exact" not in result


def test_no_steps_save_the_untrained_parts(script, flags, watched, tmp_path):
    seen = watched(1)
    script("stage1_align", *flags(1, max_steps=0))
    saved = load_file(tmp_path / "runs" / "toy" / "stage1" / "projector.safetensors")
    assert torch.equal(saved["weight"], seen["before"]["projector.weight"]) and seen["gradients"] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_what_is_trained_in_fp32(script, flags, watched, tmp_path, precision):
    script("stage1_align", *flags(1, max_steps=4, lr=2e-2, precision=precision))
    seen = watched(2)
    script("stage2_instruct", *flags(2, max_steps=8, lr=1e-2, precision=precision))
    for name, parameter in seen["model"].named_parameters():
        half = torch.bfloat16 if precision == "bf16" else torch.float16
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else half), name
    assert all(torch.isfinite(tensor).all() for gradients in seen["gradients"][-1:] for tensor in gradients)
    lines, _ = metrics(tmp_path / "runs" / "toy" / "stage2")
    assert lines[-1]["loss"] < lines[0]["loss"]
    script("sanity_check", "--precision", precision, "--max-new-tokens", 4)


def test_the_same_seed_gives_the_same_projector(script, flags, tmp_path):
    saved = []
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        script("stage1_align", *flags(1, max_steps=2, run=run, seed=seed))
        saved.append((tmp_path / run / "stage1" / "projector.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


# -- what is wrong, in one sentence ------------------------------------------------------------------------


@pytest.fixture
def refusal(script):
    """refusal(script, flag, …) → the sentence with which launch() ends it; any other exception is a
    failure."""

    def run(name, *words):
        with pytest.raises(SystemExit) as error:
            script(name, *words)
        sentence = error.value.code
        assert isinstance(sentence, str), "argparse or a stop, and no refusal"
        assert sentence.startswith(f"{name}.py: ") and "\n" not in sentence
        return sentence

    return run


def test_a_stage_before_its_predecessor_names_the_command_to_run_first(refusal, flags):
    assert "python stage1_align.py --run mine" in refusal("stage2_instruct", *flags(2, run="mine"))
    assert "python stage1_align.py first" in refusal("sanity_check")
    sentence = refusal("sanity_check", "--stage", 2, "--preset", "tinyllama")
    assert "python stage2_instruct.py --preset tinyllama first" in sentence


@pytest.mark.parametrize("change", ["llm", "vision_layer", "projector"])
def test_stage_2_refuses_a_projector_made_for_other_parts(refusal, script, flags, parts, tmp_path, change):
    script("stage1_align", *flags(1, max_steps=0))
    copy = shutil.copytree(parts.llm, tmp_path / "other")
    other = {"llm": copy, "vision_layer": -1, "projector": "mlp"}[change]
    sentence = refusal("stage2_instruct", *flags(2, **{change: other}))
    for words in ("stage1 was made for", f"--{change.replace('_', '-')}", str(other)):
        assert words in sentence


@pytest.mark.parametrize(
    "change, names",
    [
        ({"data": "nowhere.json"}, "nowhere.json"),
        ({"images": "nowhere"}, "nowhere"),
        ({"heldout_data": "nowhere.json"}, "nowhere.json"),
        ({"llm": "nobody/nothing"}, "nobody/nothing"),
        ({"vision_tower": "no such folder"}, "no such folder"),
        ({"vision_tower": "{llm}"}, "CLIP"),
        ({"llm": "{clip}"}, "clip"),
        ({"data": "{images}"}, "images.zip"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"vision_layer": 7}, "vision"),
        ({"vision_layer": -9}, "vision"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(refusal, flags, parts, drawn, change, names):
    values = {
        name: str(value).format(llm=parts.llm, clip=parts.clip, images=drawn / "images.zip")
        for name, value in change.items()
    }
    assert names in refusal("stage1_align", *flags(1, **values))


def test_too_small_a_max_length_is_refused_with_its_reason(refusal, flags, capsys):
    assert "8 of 8 records" in refusal("stage1_align", *flags(1, max_length=6))
    out = capsys.readouterr().out
    assert "8 unusable: nothing left to learn within --max-length" in out and "'drawn_0'" in out


def test_records_that_training_could_do_without_do_not_end_the_evaluation(script, flags, drawn, tmp_path):
    records = json.loads((drawn / "chat.json").read_text())
    records[1]["image"], records[2]["conversations"] = "missing.png", []
    (tmp_path / "chat.json").write_text(json.dumps(records))
    bad = dict(data=tmp_path / "chat.json", heldout_data=tmp_path / "chat.json", held_out=8, allow_bad=0.5)
    script("stage1_align", *flags(1, max_steps=1, **bad))
    script("sanity_check", "--eval")
    script("stage2_instruct", *flags(2, max_steps=1, lora_r=2))
    script("sanity_check", "--eval")
    result = json.loads((tmp_path / "runs" / "toy" / "eval.json").read_text())
    assert result["counts"]["captions"] == 6


def test_a_folder_without_the_images_is_refused_and_the_likely_one_named(refusal, flags, drawn, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(drawn / "images", tmp_path / "elsewhere" / "pictures")
    sentence = refusal("stage1_align", *flags(1, images=tmp_path / "elsewhere"))
    assert "8 of 8 records" in sentence and str(tmp_path / "elsewhere" / "pictures") in sentence


def test_a_run_that_cannot_be_written_is_refused_before_any_work(refusal, flags, tmp_path):
    (tmp_path / "taken").write_text("a file, where the folder should go")
    assert "--run" in refusal("stage1_align", *flags(1, run="taken", llm="nobody/nothing"))


def test_absent_pretrained_weights_are_named_with_their_size_and_how_to_get_them(tmp_path):
    done = command("stage1_align", "--preset", "tinyllama", cwd=tmp_path, HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in ("openai/clip-vit-large-patch14", "1.7 GB", "hf download openai/clip-vit-large-patch14"):
        assert word in last


def test_a_broken_adapter_and_a_sample_out_of_range_are_refused(refusal, trained, tmp_path):
    run = shutil.copytree(trained[0] / "runs", tmp_path / "runs") / "toy"
    assert "0 to 3" in refusal("sanity_check", "--sample", 99)
    assert "nothing.png" in refusal("sanity_check", "--image", "nothing.png")
    (run / "stage2" / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter" in refusal("sanity_check")
    (run / "stage2" / "projector.safetensors").write_bytes(b"half")
    assert "projector.safetensors" in refusal("sanity_check")
    (run / "stage2" / "run.json").write_text("{")
    assert "run.json" in refusal("sanity_check")
