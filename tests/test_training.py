"""The stages and the sanity check: what they train, what they write, and how they refuse what is wrong.

Both stages are started once as commands, for all tests. The other runs are in this process.
"""

import json
import os
import shlex
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import N, command, draw, metrics, record_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import stage1_align
import stage2_instruct
from model import LORA_TARGETS
from support import step_batches
from support.checkpoints import STOP_SIGNALS
from support.pretrained import load_language_model

STAGES = {1: stage1_align, 2: stage2_instruct}
RUN = Path("runs/toy")  # in tmp_path: the fixtures train and script change the current folder


@pytest.fixture
def train(flags, tmp_path, monkeypatch):
    """train(2, "--restart", lr=0.1) runs a stage in this process and returns the model."""
    monkeypatch.chdir(tmp_path)
    return lambda stage, *words, **changes: STAGES[stage].main([*flags(stage, **changes), *words])


# -- learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_changes_all_that_it_trains_and_not_a_byte_of_what_is_frozen(train, stage):
    train(1, max_steps=0, seed=1)
    aligned = load_file(RUN / "stage1" / "projector.safetensors")
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    before = train(stage, "--restart", max_steps=0)
    if stage == 2:  # begins where stage 1 ended
        assert torch.equal(before.projector.weight, aligned["weight"])
    before = dict(before.named_parameters())
    # Two steps, because LoRA's A has no gradient as long as B is zero.
    model = train(stage, "--restart", max_steps=2, lr=1e-2)
    for name, parameter in model.named_parameters():
        trained = name.startswith("projector.") or ".lora_" in name
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, before[name]) != trained, name
    assert any(".lora_A." in name for name in before) == (stage == 2)
    saved = load_file(RUN / f"stage{stage}" / "projector.safetensors")
    assert torch.equal(model.projector.weight, saved["weight"])
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_gives_the_gradient_of_the_large_batch(train, monkeypatch, stage):
    """Up to rounding in fp32. A mean of the micro-batches' means would be wrong, because the answers have
    different lengths."""
    train(1, max_steps=0)
    gradients, losses, clip = [], [], torch.nn.utils.clip_grad_norm_

    def watching_clip(parameters, *args):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watching_clip)
    more = {"lora_dropout": 0} if stage == 2 else {}
    for batch_size, grad_accum in [(8, 1), (4, 2), (1, 8)]:
        train(stage, "--restart", max_steps=1, batch_size=batch_size, grad_accum=grad_accum, **more)
        losses.append(metrics(RUN / f"stage{stage}")[0][-1]["loss"])
    assert len(gradients) == 3 and gradients[0].norm() > 0.01
    for gradient, loss in zip(gradients[1:], losses[1:]):
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)
        assert abs(loss - losses[0]) < 1e-5


def test_half_precision_learns_what_fp32_learns_and_keeps_what_is_trained_in_fp32(train, script):
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    after = {1: [], 2: []}
    for precision, frozen in precisions.items():
        for stage, more in ((1, {"lr": 2e-2}), (2, {"lr": 1e-2})):
            model = train(stage, precision=precision, run=precision, max_steps=12, **more)
            for name, parameter in model.named_parameters():
                assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen), name
            steps, [before, *_, last] = metrics(Path(precision) / f"stage{stage}")
            assert steps[-1]["grad_norm"] is not None and len(steps) == 12  # None: not finite
            assert last["heldout_loss"] < 0.9 * before["heldout_loss"]
            after[stage].append(last["heldout_loss"])
        script("sanity_check", "--run", precision, "--precision", precision, "--max-new-tokens", 4)
    for losses in after.values():
        assert losses[1:] == pytest.approx(2 * losses[:1], rel=0.2)


def test_the_learning_rate_rises_in_the_warm_up_and_falls_along_a_cosine(train):
    train(1, max_steps=8, warmup=0.5, lr=1e-3)
    train(2, max_steps=8, warmup=0.5, lr=2e-3, projector_lr=1e-3)
    for stage, name in ((1, "lr"), (2, "projector_lr")):
        rates = [1000 * line[name] for line in metrics(RUN / f"stage{stage}")[0]]
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.8536, 0.5, 0.1464], rel=1e-3)


def test_the_same_seed_gives_the_same_projector_and_a_norm_of_zero_means_no_clipping(train):
    saved = []
    for i, changes in enumerate([{}, {}, {"max_grad_norm": 0}, {"max_grad_norm": 1e-3}, {"seed": 4}]):
        train(1, max_steps=2, run=i, **{"max_grad_norm": 1e9, "seed": 3, **changes})
        saved.append(Path(str(i), "stage1", "projector.safetensors").read_bytes())
    assert saved[0] == saved[1] == saved[2] and len(set(saved)) == 3


def test_activation_checkpointing_changes_no_loss(train):
    train(1, max_steps=0)
    losses = []
    for switch in ([], ["--activation-checkpointing"]):
        model = train(2, "--restart", *switch, max_steps=3)
        assert model.llm.is_gradient_checkpointing == bool(switch)
        losses.append([line["loss"] for line in metrics(RUN / "stage2")[0]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 3


def test_trying_the_longest_batch_changes_nothing(tiny, dataset_of, capsys):
    model, *_ = tiny()
    model.add_lora(LoraConfig(lora_dropout=0.5, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    model.train()
    dataset = dataset_of([record_of("Who?", "Yes " * n, image="red.png") for n in (1, 9, 3)])
    lengths = np.array([len(dataset[i]["input_ids"]) for i in range(3)])
    settings = SimpleNamespace(batch_size=2, grad_accum=1, activation_checkpointing=False)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step_batches.try_longest_batch(model, dataset, lengths, nullcontext, scaler, settings)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert f"longest micro-batch: 2 samples of up to {lengths[1]} tokens" in capsys.readouterr().out


def test_records_of_only_text_are_trained_and_evaluated(train, script, drawn, tmp_path, capsys):
    """LLaVA-1.5's mix has 40,000 of them."""
    records = json.loads((drawn / "instruct.json").read_text())
    for i in (0, 4):
        records[i] = record_of("Who?", "Yes .")
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    train(1, max_steps=1)
    train(2, max_steps=2, batch_size=1, grad_accum=8, data="mixed.json", heldout_data="mixed.json", heldout=8)
    capsys.readouterr()
    for i in (0, 1):  # only text, and with an image
        script("sanity_check", "--sample", i)
        assert ("different image" in capsys.readouterr().out) == (i == 1)


# -- the whole way, as commands ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags):
    """The folder of a run in which both stages have been run as commands, and what stage 1 printed."""
    folder = tmp_path_factory.mktemp("trained")
    stage2 = dict(epochs=40, lr=1e-2, projector_lr=5e-3, lora_dropout=0)
    printed = [command("stage1_align", *flags(1, epochs=30, lr=2e-2, eval_every=10), cwd=folder),
               command("stage2_instruct", *flags(2, **stage2), cwd=folder)]
    for done in printed:
        assert done.returncode == 0, done.stderr
    return folder / RUN, printed[0]


def test_stage_1_prints_a_sample_and_writes_a_projector_and_stage_2_an_adapter_too(trained):
    folder, printed = trained
    assert "= 8 samples per step" in printed.stdout and "step 5 of 30: loss " in printed.stdout
    assert f"<image>×{N}" in printed.stdout and "</s>]]" in printed.stdout
    assert "UNEXPECTED" not in printed.stderr and "MISSING" not in printed.stderr
    files = {"projector.safetensors", "run.json", "metrics.jsonl", "heldout.json", ".lock"}
    assert {path.name for path in (folder / "stage1").iterdir()} == files
    assert {path.name for path in (folder / "stage2").iterdir()} == {*files, "adapter"}
    assert set(load_file(folder / "stage1" / "projector.safetensors")) == {"weight", "bias"}
    adapter = load_file(folder / "stage2" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    saved = json.loads((folder / "stage2" / "run.json").read_text())
    assert (saved["stage"], saved["steps"], saved["settings"]["lr"]) == (2, 40, 1e-2)


@pytest.mark.parametrize("stage, steps", [(1, 30), (2, 40)])
def test_the_loss_falls_and_every_fifth_step_is_logged(trained, stage, steps):
    lines, heldout = metrics(trained[0] / f"stage{stage}")
    assert [line["step"] for line in lines] == list(range(5, steps + 1, 5))
    assert all(line.keys() >= {"lr", "grad_norm", "labeled_tokens", "tokens_per_s"} for line in lines)
    assert lines[-1]["samples"] == 8 * steps and lines[-1]["loss"] < lines[0]["loss"]
    assert heldout[0]["step"] == 0 and heldout[-1]["step"] == steps
    assert heldout[-1]["heldout_loss"] < 0.8 * heldout[0]["heldout_loss"]


def test_the_sanity_check_answers_a_held_out_sample_and_says_if_the_image_makes_no_difference(
        trained, script, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / RUN)
    script("sanity_check", "--sample", 1, "--device", "cpu")
    out = capsys.readouterr().out
    assert "PROMPT" in out and f"<image>×{N}" in out
    generated, reference = out.split("GENERATED\n")[1].split("REFERENCE\n")
    # Memorized, to the end token.
    assert generated.strip() == reference.splitlines()[0] == "a green picture , a green picture ."
    losses = {line.rsplit(maxsplit=1)[0].strip(): float(line.split()[-1]) for line in out.splitlines()
              if line.startswith("  ") and "image" in line}
    assert losses["correct image"] < min(losses["different image"], losses["blank image"])
    assert "almost no difference" not in out
    path = run / "stage1" / "projector.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    script("sanity_check", "--sample", 0, "--stage", 1)
    assert "almost no difference" in capsys.readouterr().out


def test_the_sanity_check_answers_about_any_picture(script, trained, tmp_path, capsys):
    def printed(*words):
        script("sanity_check", "--run", trained[0], *words)
        return capsys.readouterr().out

    draw("red", size=(30, 40)).save(tmp_path / "mine.png")
    assert "What object is shown?" in printed("--image", "mine.png", "--question", "What object is shown?")
    assert "GENERATED\na red picture" in printed("--image", "mine.png")


# -- files -------------------------------------------------------------------------------------------------


def test_result_files_get_the_permissions_of_the_umask_and_the_adapter_names_what_llm_named(
        train, script, parts, tmp_path, monkeypatch):
    """safetensors lets nobody else read its files, and peft would name a folder in this machine's cache."""
    monkeypatch.setattr("support.pretrained.snapshot_download", lambda name, **_: str(parts.llm))
    before = os.umask(0o022)
    try:
        for stage in STAGES:
            train(stage, max_steps=0, llm="me/tiny-llm")
        script("tools.export_hf", "--out", "exported")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) > 12 and {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    adapter = RUN / "stage2" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/tiny-llm"
    assert "base_model: me/tiny-llm\n" in (adapter / "README.md").read_text()


def test_held_out_records_are_a_file_and_the_data_may_be_changed_while_a_run_goes_on(
        train, script, drawn, tmp_path, monkeypatch, capsys):
    """The records are in memory."""
    records = json.loads((drawn / "chat.json").read_text())
    data, heldout, next_micro_batches = tmp_path / "mine.json", [], step_batches.next_micro_batches
    data.write_text(json.dumps(records))

    def next_without_data(*args):
        data.unlink(missing_ok=True)
        heldout[:] = json.loads((RUN / "stage1" / "heldout.json").read_text())
        return next_micro_batches(*args)

    monkeypatch.setattr(step_batches, "next_micro_batches", next_without_data)
    own = dict(data=data, heldout_data="", heldout_images="", heldout=3)
    train(1, max_steps=3, workers=1, batch_size=2, **own)
    assert len(heldout) == 3 and all(record in records for record in heldout)
    assert metrics(RUN / "stage1")[0][-1]["samples"] == 2 + 2 + 1
    data.write_text("changed")
    script("sanity_check", "--sample", 2, "--max-new-tokens", 2)
    assert f"REFERENCE\n{heldout[2]['conversations'][1]['value']}" in capsys.readouterr().out


# -- what is wrong, in one sentence, and what to type ------------------------------------------------------


def test_a_stage_before_its_predecessor_names_the_command_to_run_first(refusal, flags):
    for stage, command_name in (([], "stage1_align.py"), (["--stage", 2], "stage2_instruct.py")):
        sentence = refusal("sanity_check", *stage, "--run", "my run")
        assert f"python {command_name}" in sentence and "--run 'my run'" in sentence
    assert "python stage1_align.py" in refusal("stage2_instruct", *flags(2, run="my run"))
    assert "pass --run 'my run'" in refusal("sanity_check", "--run", "my run/stage1")
    assert "pass --run 'my run'" in refusal("stage1_align", *flags(1, run="my run/stage1"))


def test_the_next_command_can_be_typed_as_it_is_printed(script, parts, drawn, tmp_path, capsys):
    """With own data and models, it would otherwise train the toy. Records are held out of the own data."""
    data = shutil.copytree(drawn, tmp_path / "it's mine") / "chat.json"
    own = {"--run": "my run", "--llm": shutil.copytree(parts.llm, tmp_path / "my llm"), "--data": data,
           "--vision-tower": parts.clip, "--vision-layer": -1, "--images": drawn / "images", "--heldout": 3,
           "--seed": 5}
    words = [str(word) for flag_and_value in own.items() for word in flag_and_value]
    script("stage1_align", *words, "--max-steps", "0")
    for name, expected in (("stage2_instruct", words), ("sanity_check", words[:2])):
        out = capsys.readouterr().out
        assert f"checked 3 records of {data}" in out and "toy/data" not in out
        python, file, *typed = shlex.split(out.splitlines()[-1].partition("next: ")[2])
        assert (python, file, sorted(typed)) == ("python", f"{name}.py", sorted(expected))
        script(name, *typed)
    assert "my run/stage2: " in capsys.readouterr().err


@pytest.mark.parametrize("change", ["llm", "vision_layer", "projector"])
def test_stage_2_refuses_a_projector_made_for_other_models(train, refusal, flags, parts, tmp_path, change):
    train(1, max_steps=0)
    copy = shutil.copytree(parts.llm, tmp_path / "other")
    other = {"llm": copy, "vision_layer": -1, "projector": "mlp"}[change]
    sentence = refusal("stage2_instruct", *flags(2, **{change: other}))
    assert f"stage1 was trained for {change}" in sentence and str(other) in sentence


@pytest.mark.parametrize("change, expected", [
    ({"vision_layer": -9}, "--vision-layer -9 does not exist"),
    ({"data": "nowhere.json"}, "nowhere.json does not exist"),
    ({"data": "data/nowhere.json"}, "download"),  # the script that fetches it
    ({"images": "nowhere"}, "nowhere does not exist"),
    ({"images": "{llm}"}, "8 of 8 records"),
    ({"llm": "nobody/nothing"}, "nobody/nothing"),
    ({"vision_tower": "{llm}"}, "CLIP"),
    ({"llm": "{clip}"}, "--llm must name a model of the type"),
    ({"data": "{images}"}, "images.zip"),
    ({"device": "cuda:99"}, "cuda:99"),
    ({"heldout_data": ""}, "belong together"),
    ({"heldout_images": ""}, "belong together"),
])
def test_a_wrong_flag_is_refused_in_one_sentence(refusal, flags, parts, drawn, change, expected):
    values = {name: str(value).format(llm=parts.llm, clip=parts.clip, images=drawn / "images.zip")
              for name, value in change.items()}
    assert expected in refusal("stage1_align", *flags(1, **values))


def test_an_impossible_value_or_flag_is_refused_by_the_command_line(script, flags, capsys):
    for flag, value in (("--lr", "nan"), ("--lr", "-1"), ("--warmup", "2"), ("--batch-size", "0"),
                        ("--projector", "cubic"), ("--clip", "1"), ("--resume", "--restart"),
                        ("--max-steps", "10000000")):
        with pytest.raises(SystemExit) as error:
            script("stage1_align", *flags(1), flag, value)
        assert error.value.code == 2 and flag in capsys.readouterr().err


def test_training_on_held_out_images_is_warned_of(train, drawn, capsys):
    train(1, "--check-data", heldout_images=drawn / "images.zip")
    assert "WARNING: 4 held-out images are also trained on" in capsys.readouterr().out
    train(1, "--check-data", heldout_data="", heldout_images="")
    assert "WARNING" not in capsys.readouterr().out


def test_the_data_of_stage_2_are_checked_before_stage_1_is_trained(train, capsys):
    """The check writes nothing, and loads no weights, so it prints no table of parameters."""
    assert train(2, "--check-data") is None and not RUN.exists()
    output = capsys.readouterr().out
    assert output.count(" usable") == 2 and "[[" in output and "parameters" not in output


@pytest.mark.parametrize("parameters, loud", [(1.1e9, True), (1e6, False)])
def test_a_real_model_on_a_cpu_is_pointed_out(parts, monkeypatch, capsys, parameters, loud):
    monkeypatch.setattr(LlamaForCausalLM, "num_parameters", lambda self: parameters)
    load_language_model(parts.llm, torch.float32, torch.device("cpu"))
    assert ("WARNING" in capsys.readouterr().out) == loud


def test_a_sample_out_of_range_and_a_missing_or_damaged_file_are_refused(refusal, trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / RUN)
    assert "0 to 3" in refusal("sanity_check", "--sample", 99)
    assert "nothing.png" in refusal("sanity_check", "--image", "nothing.png")
    assert "--image" in refusal("sanity_check", "--question", "What?")
    (run / "stage2" / "heldout.json").unlink()
    assert "heldout.json" in refusal("sanity_check")
    (run / "stage2" / "run.json").write_text("{")
    assert "run.json" in refusal("sanity_check")
