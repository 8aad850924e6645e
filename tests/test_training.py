"""The stages and the sanity check: what they train, what they write, and how they refuse what is wrong.

Both stages are started once as commands, for all tests. The other runs are in this process.
"""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import N, batch_of, command, draw, refresh_checksums, metrics, preprocess
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import stage1_align
import stage2_instruct
from data import collate
from model import LORA_TARGETS
from support import metrics_log
from support.checkpoints import STOP_SIGNALS, Progress
from support.settings import print_settings
from support.step_batches import try_longest_batch

NAMES = {1: "stage1_align", 2: "stage2_instruct"}


# -- learning ----------------------------------------------------------------------------------------------


def test_one_batch_can_be_memorized_and_its_answers_depend_on_the_images(tiny):
    """Four pictures, one question, four answers: only the picture tells them apart."""
    model, template, image_processor = tiny()
    model.add_lora(LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    model.projector.requires_grad_(True)
    samples = []
    question = {"role": "user", "content": "<image>\nWhat is it?"}
    answers = {"red": "a cat .", "green": "olive oil", "blue": "a live band", "white": "Yes"}
    for color, answer in answers.items():
        ids, labels = template.encode([question, {"role": "assistant", "content": answer}], N)
        samples.append({"input_ids": ids, "labels": labels,
                        "pixel_values": preprocess(image_processor, draw(color))})
    batch = batch_of(samples, template)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(50):
        model(**batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert model(**batch).mean() < 0.05
        different = {**batch, "pixel_values": batch["pixel_values"].roll(1, dims=0)}
        assert model(**different).mean() > 1
    ids = template.encode_prompt([question], N)
    prompts = collate([{"input_ids": ids, "pixel_values": s["pixel_values"]} for s in samples], 2)
    generated = model.generate(**prompts, end_token_ids=[template.end_token_id])
    assert [template.decode(row) for row in generated] == list(answers.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_changes_all_that_it_trains_and_not_a_byte_of_what_is_frozen(script, flags, watched, stage):
    script("stage1_align", *flags(1, max_steps=0, seed=1))
    aligned = load_file(Path("runs/toy/stage1/projector.safetensors"))  # script() has changed the folder
    seen = watched(stage)
    if stage == 1:
        script("stage1_align", *flags(1, max_steps=1), "--restart")
    else:  # two steps, because LoRA's A has no gradient as long as B is zero
        script("stage2_instruct", *flags(2, max_steps=2, lr=1e-2, projector_lr=1e-2))
        assert torch.equal(seen["before"]["projector.weight"], aligned["weight"])  # where stage 1 ended
    for name, parameter in seen["model"].named_parameters():
        trained = name.startswith("projector.") or ".lora_" in name
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, seen["before"][name]) != trained, name
    assert any(".lora_A." in name for name in seen["before"]) == (stage == 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_gives_the_gradient_of_the_large_batch(script, flags, watched, stage):
    """Up to rounding in fp32. A mean of the micro-batches' means would be wrong, because the answers have
    different lengths."""
    script("stage1_align", *flags(1, max_steps=0))
    gradients, losses = [], []
    for batch_size, grad_accum in [(8, 1), (4, 2), (1, 8)]:
        seen = watched(stage)
        more = {"lora_dropout": 0} if stage == 2 else {}
        more |= dict(max_steps=1, batch_size=batch_size, grad_accum=grad_accum)
        script(NAMES[stage], *flags(stage, **more), "--restart")
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
    stage2 = dict(epochs=40, lr=1e-2, projector_lr=5e-3, lora_dropout=0)
    printed = {1: command("stage1_align", *flags(1, epochs=30, lr=2e-2, eval_every=10), cwd=folder),
               2: command("stage2_instruct", *flags(2, **stage2), cwd=folder)}
    for done in printed.values():
        assert done.returncode == 0, done.stderr
    return folder, printed


def test_stage_1_writes_a_projector_and_stage_2_an_adapter_too(trained):
    folder = trained[0] / "runs" / "toy"
    files = {"projector.safetensors", "run.json", "metrics.jsonl", ".lock"}
    assert {path.name for path in (folder / "stage1").iterdir()} == files
    assert {path.name for path in (folder / "stage2").iterdir()} == {*files, "adapter"}
    assert set(load_file(folder / "stage1" / "projector.safetensors")) == {"weight", "bias"}
    adapter = load_file(folder / "stage2" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    run = json.loads((folder / "stage2" / "run.json").read_text())
    assert (run["stage"], run["steps"], run["settings"]["lr"]) == (2, 40, 1e-2)


@pytest.mark.parametrize("preset, device, loud", [
    ("tinyllama", "auto", True), ("tinyllama", "cpu", False), ("toy", "auto", False)])
def test_a_real_model_on_a_cpu_is_pointed_out_before_it_starts(capsys, preset, device, loud):
    print_settings(SimpleNamespace(preset=preset, device=device), torch.device("cpu"), torch.float32)
    assert ("WARNING: no GPU was found" in capsys.readouterr().out) == loud


@pytest.mark.parametrize("stage, steps", [(1, 30), (2, 40)])
def test_the_loss_falls_and_every_step_is_logged(trained, stage, steps):
    lines, heldout = metrics(trained[0] / "runs" / "toy" / f"stage{stage}")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    expected = {"step", "samples", "loss", "lr", "grad_norm", "labeled_tokens", "samples_per_s",
                "tokens_per_s", "waiting", "seconds_left"}
    assert all(line.keys() >= expected for line in lines)
    assert all(N < line["tokens_per_s"] / line["samples_per_s"] < 200 for line in lines)
    assert lines[0]["seconds_left"] > lines[-1]["seconds_left"] == 0
    assert lines[-1]["samples"] == 8 * steps
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert heldout[0]["step"] == 0 and heldout[-1]["step"] == steps
    assert heldout[-1]["heldout_loss"] < 0.8 * heldout[0]["heldout_loss"]


def test_the_learning_rate_rises_in_the_warm_up_and_falls_along_a_cosine(trained):
    lines, _ = metrics(trained[0] / "runs" / "toy" / "stage1")
    rates = [line["lr"] for line in lines]
    assert rates[0] == pytest.approx(2e-2)  # 3% of 30 steps is one step of warm-up, which has the full rate
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3
    assert rates[15] == pytest.approx(1e-2, rel=0.15)
    lines, _ = metrics(trained[0] / "runs" / "toy" / "stage2")
    assert lines[0]["lr"] == pytest.approx(1e-2)
    assert all(line["projector_lr"] == pytest.approx(line["lr"] / 2) for line in lines)


def test_a_stage_prints_its_plan_what_is_trained_and_its_first_steps(trained):
    assert "step 1 of 30: loss " in trained[1][1].stdout and " left\n" in trained[1][1].stdout
    out = trained[1][2].stdout
    assert "8 (micro-batch) × 1 (accumulation) × 1 (processes) = 8 samples" in out
    assert f"<image>×{N}" in out and "</s>]]" in out  # a sample, its answers marked with their end tokens
    assert "python sanity_check.py --run runs/toy" in out.splitlines()[-1]
    assert "UNEXPECTED" not in trained[1][1].stderr and "MISSING" not in trained[1][1].stderr


def test_the_sanity_check_answers_a_held_out_sample(trained, script, capsys):
    script("sanity_check", "--run", trained[0] / "runs" / "toy", "--sample", 1, "--device", "cpu")
    out = capsys.readouterr().out
    for words in ("PROMPT", f"<image>×{N}", "GENERATED", "REFERENCE", "correct image", "blank image",
                  "different image"):
        assert words in out
    generated, reference = out.split("GENERATED\n")[1].split("REFERENCE\n")
    # Memorized, to the end token.
    assert generated.strip() == reference.splitlines()[0] == "a green picture , a green picture ."
    losses = {line.rsplit(maxsplit=1)[0].strip(): float(line.split()[-1]) for line in out.splitlines()
              if line.startswith("  ") and "image" in line}
    assert losses["correct image"] < min(losses["different image"], losses["blank image"])
    assert "almost no difference" not in out


def test_the_sanity_check_says_when_the_image_makes_no_difference(script, flags, capsys):
    script("stage1_align", *flags(1, max_steps=0))
    path = Path("runs/toy/stage1/projector.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    refresh_checksums(path.parent)
    script("sanity_check", "--sample", 0)
    assert "The image makes almost no difference for this record." in capsys.readouterr().out


def test_the_sanity_check_shows_the_mask_and_answers_about_any_picture(script, trained, tmp_path, capsys):
    run = trained[0] / "runs" / "toy"
    script("sanity_check", "--run", run, "--show-mask", 0)
    assert "[[a red picture .</s>]]" in capsys.readouterr().out
    draw("red", size=(30, 40)).save(tmp_path / "mine.png")
    script("sanity_check", "--run", run, "--image", "mine.png", "--question", "What object is shown?")
    assert "What object is shown?" in capsys.readouterr().out
    script("sanity_check", "--run", run, "--image", "mine.png")
    assert "GENERATED\na red picture" in capsys.readouterr().out
    torch.manual_seed(0)
    script("sanity_check", "--run", run, "--image", "mine.png", "--temperature", 50, "--max-new-tokens", 5)
    assert "a red picture" not in capsys.readouterr().out.split("GENERATED")[1]


def test_records_of_only_text_are_trained_and_evaluated(script, flags, drawn, tmp_path, capsys):
    """LLaVA-1.5's mix has 40,000 of them."""
    records = json.loads((drawn / "instruct.json").read_text())
    for i in (0, 4):
        del records[i]["image"]
        records[i]["conversations"] = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Yes ."}]
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    mixed = dict(data=tmp_path / "mixed.json", heldout_data=tmp_path / "mixed.json", heldout=8)
    script("stage1_align", *flags(1, max_steps=1))
    script("stage2_instruct", *flags(2, max_steps=2, batch_size=1, grad_accum=8, **mixed))
    capsys.readouterr()
    for i in (0, 1):  # only text, and with an image
        script("sanity_check", "--sample", i)
        assert ("different image" in capsys.readouterr().out) == (i == 1)


def test_half_precision_learns_what_fp32_learns_and_keeps_what_is_trained_in_fp32(script, flags, watched):
    after, seen = {}, watched(2)
    for precision, frozen in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        changes = dict(precision=precision, run=precision, max_steps=12)
        script("stage1_align", *flags(1, lr=2e-2, **changes))
        script("stage2_instruct", *flags(2, lr=1e-2, **changes))
        for name, parameter in seen["model"].named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen), name
        assert all(gradient.isfinite().all() for gradient in seen["gradients"][-1])
        for stage in (1, 2):
            _, [before, *_, last] = metrics(Path(f"{precision}/stage{stage}"))
            after.setdefault(stage, []).append(last["heldout_loss"])
            assert last["heldout_loss"] < 0.9 * before["heldout_loss"]
        script("sanity_check", "--run", precision, "--precision", precision, "--max-new-tokens", 4)
    for losses in after.values():
        assert losses[1:] == pytest.approx(2 * losses[:1], rel=0.2)


def test_the_same_seed_gives_the_same_projector(script, flags, tmp_path):
    saved = []
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        script("stage1_align", *flags(1, max_steps=2, run=run, seed=seed))
        saved.append((tmp_path / run / "stage1" / "projector.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


def test_trying_the_longest_batch_changes_no_bit_of_the_run(script, flags, watched, tmp_path, monkeypatch,
                                                             capsys):
    """In stage 2 dropout draws random numbers. On a CPU the stages leave this step out, so the test adds it
    where the stage makes its loader."""
    script("stage1_align", *flags(1, max_steps=0))
    outcomes, seen = [], watched(2)
    load_steps, folder = stage2_instruct.load_steps, tmp_path / "runs" / "toy" / "stage2"

    def try_and_load(dataset, steps, pad_token_id, workers, device):
        settings = SimpleNamespace(batch_size=3, grad_accum=1, activation_checkpointing=False)
        lengths = np.array([len(dataset.encode_record(record)[0]) for record in dataset.records])
        model = seen["model"].train()
        try_longest_batch(model, dataset, lengths, pad_token_id, device, nullcontext, settings)
        assert all(parameter.grad is None for parameter in model.parameters())
        return load_steps(dataset, steps, pad_token_id, workers, device)

    for load in (load_steps, try_and_load):
        monkeypatch.setattr(stage2_instruct, "load_steps", load)
        script("stage2_instruct", *flags(2, max_steps=2, batch_size=4), "--restart")
        outcomes.append([(folder / "projector.safetensors").read_bytes(),
                         [(line["loss"], line["grad_norm"]) for line in metrics(folder)[0]]])
    assert outcomes[0] == outcomes[1]
    assert "longest micro-batch: 3 samples of up to " in capsys.readouterr().out


def test_activation_checkpointing_changes_no_loss(script, flags, watched, tmp_path):
    script("stage1_align", *flags(1, max_steps=0))
    losses, seen = [], watched(2)
    for switch in ([], ["--activation-checkpointing"]):
        script("stage2_instruct", *flags(2, max_steps=3), "--restart", *switch)
        assert seen["model"].llm.is_gradient_checkpointing == bool(switch)
        losses.append([line["loss"] for line in metrics(tmp_path / "runs" / "toy" / "stage2")[0]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 3


def test_a_norm_of_zero_means_no_clipping(script, flags, tmp_path):
    saved = []
    for run, max_grad_norm in (("none", 0), ("large", 1e9), ("small", 1e-3)):
        script("stage1_align", *flags(1, max_steps=3, run=run, max_grad_norm=max_grad_norm, batch_size=4))
        saved.append((tmp_path / run / "stage1" / "projector.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


def test_main_takes_flags_returns_the_trained_model_and_leaves_the_signal_handlers_alone(
        flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    model = stage1_align.main(flags(1, max_steps=1))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    saved = load_file(tmp_path / "runs" / "toy" / "stage1" / "projector.safetensors")
    assert torch.equal(model.projector.weight, saved["weight"])


# -- what a run shows --------------------------------------------------------------------------------------


class Clock(float):
    """Stands for the module time."""
    now = 0.0

    def time(self):
        return self.now


@pytest.fixture
def timed_log(tmp_path, monkeypatch):
    """A MetricsLog of 100 steps, and the clock that it reads."""
    clock, measured = Clock(), {"loss": 1.0, "loss_different": 2.0, "correct_more_likely": 0.5}
    monkeypatch.setattr(metrics_log, "time", clock)
    processes = SimpleNamespace(rank=0, device=torch.device("cpu"), sum=lambda x: x, max=lambda x: x)
    log = metrics_log.MetricsLog(tmp_path, processes, None, 100)

    def evaluate(seconds):
        clock.now += seconds
        log.log_heldout(0, measured, "a", "b", [])

    def step(seconds):
        clock.now += seconds
        log.count_step(8, [{"attention_mask": torch.ones(8, 50)}], waiting=seconds / 4)

    return log, evaluate, step


def test_evaluations_take_at_most_a_tenth_of_the_time(timed_log):
    log, evaluate, step = timed_log
    evaluate(6)
    step(59)
    assert not log.may_evaluate()
    step(2)
    assert log.may_evaluate()
    evaluate(3)
    step(31)
    assert log.may_evaluate()
    log.processes.max = lambda answer: 0  # the answer is that of all processes
    assert not log.may_evaluate()


def test_the_line_without_a_terminal_says_loss_speed_waiting_and_time_left(timed_log, tmp_path, capsys):
    log, evaluate, step = timed_log
    evaluate(100)  # before the first step, so it says nothing about the time left
    step(10)
    step(10)
    log.log_step(Progress(step=2), SimpleNamespace(param_groups=[]), loss=1.5)
    assert ("step 2 of 100: loss 1.500, 40 tokens/s, waiting for data 25%, 16:20 left"
            in capsys.readouterr().out.splitlines())
    line = metrics(tmp_path)[0][-1]
    assert (line["tokens_per_s"], line["samples_per_s"], line["waiting"]) == (40, 0.8, 0.25)
    assert line["seconds_left"] == 980
    step(10)
    log.log_step(Progress(step=3), SimpleNamespace(param_groups=[]), loss=1.5)  # once a minute is enough
    assert "tokens/s" not in capsys.readouterr().out


# -- what is wrong, in one sentence ------------------------------------------------------------------------


def test_a_stage_before_its_predecessor_names_the_command_to_run_first(refusal, flags):
    assert "python stage1_align.py --run mine first" in refusal("stage2_instruct", *flags(2, run="mine"))
    assert "python stage1_align.py --run runs/toy first" in refusal("sanity_check")
    sentence = refusal("sanity_check", "--stage", 2, "--run", "runs/tinyllama")
    assert "python stage2_instruct.py --run runs/tinyllama first" in sentence


@pytest.mark.parametrize("change", ["llm", "vision_layer", "projector"])
def test_stage_2_refuses_a_projector_made_for_other_models(refusal, script, flags, parts, tmp_path, change):
    script("stage1_align", *flags(1, max_steps=0))
    copy = shutil.copytree(parts.llm, tmp_path / "other")
    other = {"llm": copy, "vision_layer": -1, "projector": "mlp"}[change]
    sentence = refusal("stage2_instruct", *flags(2, **{change: other}))
    for words in ("stage1 was trained for", f"--{change.replace('_', '-')}", str(other)):
        assert words in sentence


@pytest.mark.parametrize("change, names", [
    ({"data": "nowhere.json"}, "nowhere.json"),
    ({"images": "nowhere"}, "nowhere"),
    ({"llm": "nobody/nothing"}, "nobody/nothing"),
    ({"vision_tower": "{llm}"}, "CLIP"),
    ({"llm": "{clip}"}, "clip"),
    ({"data": "{images}"}, "images.zip"),
    ({"device": "cuda:99"}, "cuda:99"),
    ({"vision_layer": -9}, "vision"),
])
def test_a_wrong_flag_is_refused_in_one_sentence(refusal, flags, parts, drawn, change, names):
    values = {name: str(value).format(llm=parts.llm, clip=parts.clip, images=drawn / "images.zip")
              for name, value in change.items()}
    assert names in refusal("stage1_align", *flags(1, **values))


def test_an_impossible_value_or_flag_is_refused_by_the_command_line(script, flags, capsys):
    for flag, value in (("--lr", "nan"), ("--lr", "-1"), ("--warmup", "2"), ("--batch-size", "0"),
                        ("--projector", "cubic"), ("--clip", "1"), ("--resume", "--restart")):
        with pytest.raises(SystemExit) as error:
            script("stage1_align", *flags(1), flag, value)
        assert error.value.code == 2 and flag in capsys.readouterr().err


def test_a_folder_without_the_images_is_refused(refusal, flags, drawn, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    sentence = refusal("stage1_align", *flags(1, images=tmp_path / "elsewhere"))
    assert "8 of 12 records" in sentence and "is --images wrong?" in sentence


def test_own_data_with_the_toy_preset_is_held_out_of_own_data(script, flags, drawn, tmp_path, capsys):
    words = flags(1, heldout=3)
    at = words.index("--heldout-data")
    script("stage1_align", *words[:at], *words[at + 4:], "--check-data")  # without the two held-out flags
    out = capsys.readouterr().out
    assert out.count(f"checked 3 records of {drawn / 'chat.json'}") == 1 and "toy/data" not in out


def test_half_a_pair_of_held_out_flags_is_one_sentence(refusal, flags):
    for change in ({"heldout_data": ""}, {"heldout_images": ""}):
        sentence = refusal("stage1_align", *flags(1, **change))
        assert "--heldout-data and --heldout-images belong together" in sentence


def test_training_on_held_out_records_is_warned_of(script, flags, drawn, tmp_path, capsys):
    records = json.loads((drawn / "chat.json").read_text())
    (tmp_path / "copy.json").write_text(json.dumps(records[2:], indent=1))
    script("stage1_align", *flags(1, heldout_data=tmp_path / "copy.json"), "--check-data")
    assert "WARNING: 4 of 4 held-out records are also trained on" in capsys.readouterr().out
    script("stage1_align", *flags(1, heldout_data="", heldout_images=""), "--check-data")
    assert "WARNING" not in capsys.readouterr().out


def test_missing_data_are_named_with_the_script_that_fetches_them(refusal, flags):
    sentence = refusal("stage1_align", "--preset", "tinyllama", "--device", "cpu")
    assert "chat.json" in sentence and "tools/download.sh" in sentence


def test_a_sample_out_of_range_a_missing_image_and_half_a_run_json_are_refused(refusal, trained, tmp_path):
    run = shutil.copytree(trained[0] / "runs", tmp_path / "runs") / "toy"
    assert "0 to 3" in refusal("sanity_check", "--sample", 99)
    assert "nothing.png" in refusal("sanity_check", "--image", "nothing.png")
    assert "--image" in refusal("sanity_check", "--question", "What?")
    (run / "stage2" / "run.json").write_text("{")
    assert "run.json" in refusal("sanity_check")


def test_main_takes_flags_and_returns_the_trained_model(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = stage1_align.main(flags(1, max_steps=1))
    saved = load_file(tmp_path / "runs" / "toy" / "stage1" / "projector.safetensors")
    assert torch.equal(model.projector.weight, saved["weight"])
