"""tools.export_hf: the exported folder computes the same as the run, without the code of this repository."""

import json
import shlex
import shutil

import pytest
import torch
from conftest import N, draw, make_llm
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

from data import collate
from support.devices import DTYPES
from support.results import read_result
from support.trained import load_trained
from tools import export_hf
from tools.model_card import write_model_card

CPU = torch.device("cpu")
COLORS = ("red", "blue", "green")
QUESTION = "What object is shown?"
PROMPT = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
TEXT = {"type": "text", "text": QUESTION}
# (stage, projector, D, activation of the export). The tiny CLIP has D_v = 32, so a GELU needs D >= 64.
RUNS = [(1, "linear", 64, "gelu"), (2, "linear", 48, "linear"), (2, "mlp", 48, "gelu")]


@pytest.fixture
def trained(script, flags, parts, tmp_path):
    """trained(stage, projector, width) returns the folder of a run whose projector and adapter change the
    output. width is D, the width of the LLM."""
    def make(stage, projector="linear", width=48):
        llm = parts.llm if width == 48 else make_llm(tmp_path / "llm", hidden_size=width)
        changes = dict(run=tmp_path / "run", projector=projector, llm=llm, max_steps=2)
        script("stage1_align", *flags(1, lr=0.01, **changes))
        if stage == 2:
            script("stage2_instruct", *flags(2, lr=0.01, projector_lr=0.01, **changes))
        return tmp_path / "run"

    return make


@pytest.fixture
def exported(script, trained, tmp_path):
    """exported(stage, projector, width) returns (the exported folder, our model, template, image
    processor)."""
    def make(stage, projector="linear", width=48):
        run = trained(stage, projector, width)
        script("tools.export_hf", "--run", run, "--out", tmp_path / "exported", "--device", "cpu")
        return tmp_path / "exported", *load_trained(run / f"stage{stage}", CPU, torch.float32)[:3]

    return make


def our_batch(template, image_processor, color):
    pixel_values = image_processor(draw(color), return_tensors="pt")["pixel_values"][0]
    prompt = {"input_ids": template.encode_prompt(PROMPT, N), "pixel_values": pixel_values}
    return collate([prompt], template.tokenizer.pad_token_id, padding_side="left")


def our_answer(model, template, image_processor, color):
    batch = our_batch(template, image_processor, color)
    return model.generate(**batch, end_token_ids=[template.end_token_id], max_new_tokens=32)[0].tolist()


@pytest.mark.parametrize("stage, projector, width, activation", RUNS)
def test_ids_pixels_logits_and_greedy_text_of_the_export_are_those_of_the_run(
        exported, capsys, stage, projector, width, activation):
    folder, model, template, image_processor = exported(stage, projector, width)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    llava = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert llava.config.projector_hidden_act == activation
    assert ("vLLM refuses to load this export" in capsys.readouterr().out) == (activation == "linear")
    messages = [{"role": "user", "content": [{"type": "image", "image": draw("red")}, TEXT]}]
    theirs = processor.apply_chat_template([messages], tokenize=True, add_generation_prompt=True,
                                           return_dict=True, return_tensors="pt")
    ours = our_batch(template, image_processor, "red")
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"], atol=1e-5, rtol=0)
    with torch.no_grad():
        their_logits = llava(**theirs).logits[..., :model.llm.config.vocab_size]  # without the added rows
        our_logits = model.llm(inputs_embeds=model.embed(ours["input_ids"], ours["pixel_values"])).logits
    assert our_logits.std() > 0.3
    torch.testing.assert_close(their_logits, our_logits, atol=1e-4, rtol=0)

    our_answers = [our_answer(model, template, image_processor, color) for color in COLORS]
    assert len(set(map(tuple, our_answers))) > 1  # otherwise a lost image would not be noticed
    ask = pipeline("image-text-to-text", model=llava, processor=processor, device="cpu")
    for color, answer in zip(COLORS, our_answers):
        content = [{"type": "image", "image": draw(color)}, TEXT]
        reply = ask([{"role": "user", "content": content}], max_new_tokens=32, return_tensors=True)
        ids = reply[0]["generated_token_ids"][ours["input_ids"].shape[1]:]
        assert processor.decode(ids, skip_special_tokens=True) \
            == template.tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("gelu", [nn.GELU(), nn.GELU("tanh"), lambda v: v * torch.sigmoid(1.702 * v)])
def test_a_linear_projector_is_exact_behind_any_gelu(gelu):
    torch.manual_seed(0)
    d = 70  # 2·D_v, and six rows of padding
    ours = nn.Linear(32, d)
    theirs = nn.ModuleDict({"linear_1": nn.Linear(32, d), "linear_2": nn.Linear(d, d)})
    assert not export_hf.needs_linear_activation(ours)
    export_hf.copy_projector(ours, theirs)
    x = 10 * torch.randn(100, 32)
    torch.testing.assert_close(theirs.linear_2(gelu(theirs.linear_1(x))), ours(x), atol=1e-5, rtol=0)
    assert not theirs.linear_1.weight[64:].any() and not theirs.linear_2.weight[:, 64:].any()
    assert export_hf.needs_linear_activation(nn.Linear(32, 63))


def test_content_as_text_or_as_a_list_gives_our_prompt_with_one_start_token(exported):
    folder, _, template, _ = exported(stage=1)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    rest = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "olive oil?"}]
    texts = PROMPT + rest
    lists = [{"role": "user", "content": [{"type": "image", "image": draw("red")}, TEXT]}]
    lists += [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in rest]
    expected = template.encode_prompt(texts, N)
    assert expected.count(template.tokenizer.bos_token_id) == 1

    tokenized = processor.apply_chat_template(lists, tokenize=True, add_generation_prompt=True,
                                              return_dict=True)
    assert tokenized["input_ids"] == [expected]
    for messages in (texts, lists):  # older code renders the text first and then tokenizes it
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == template.render(texts, is_prompt=True)
        assert processor(text=text, images=draw("red"))["input_ids"] == [expected]


def test_the_weights_have_the_names_of_the_llava_models_on_the_hub(script, trained, tmp_path):
    run = trained(1)
    for dtype in ("fp32", "bf16"):  # a model that has been loaded once must not be saved under other names
        script("tools.export_hf", "--run", run, "--out", tmp_path / dtype, "--dtype", dtype, "--samples", 1)
        names = set(load_file(tmp_path / dtype / "model.safetensors"))
        assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight",
                "language_model.model.layers.0.self_attn.q_proj.weight",
                "multi_modal_projector.linear_1.weight",
                "vision_tower.vision_model.embeddings.class_embedding",
                "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"} <= names
        assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector",
                                                          "vision_tower"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_added_vocabulary_rows_never_win(tmp_path, tied):
    llm = AutoModelForCausalLM.from_pretrained(make_llm(tmp_path, tie_word_embeddings=tied))
    llm.get_output_embeddings().weight.data[:, 0] += 1.0  # so that all logits of a position can be negative
    old_rows = llm.get_input_embeddings().num_embeddings
    export_hf.add_embedding_rows(llm, old_rows + 3)
    hidden = torch.randn(1000, llm.config.hidden_size)
    hidden[:, 0] -= 20
    logits = llm.get_output_embeddings()(hidden)
    assert logits.shape[1] == old_rows + 3 and (logits[:, :old_rows].amax(1) < 0).any()
    assert (logits.argmax(1) < old_rows).all()


def test_half_precision_is_rounded_once_from_fp32(script, trained, tmp_path):
    run = trained(2)
    for dtype in DTYPES:
        script("tools.export_hf", "--run", run, "--out", tmp_path / dtype, "--dtype", dtype, "--samples", 1)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "fp32", dtype=torch.float32).state_dict()
    for dtype in ("fp16", "bf16"):
        half = AutoModelForImageTextToText.from_pretrained(tmp_path / dtype).state_dict()
        assert half.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(half[name], tensor.to(DTYPES[dtype])), name


# -- the model card ----------------------------------------------------------------------------------------


def test_the_card_has_the_hubs_fields_and_the_scores(script, trained, tmp_path):
    run = trained(2)
    script("tools.evaluate", "--run", run, "--device", "cpu")
    script("tools.export_hf", "--run", run, "--out", tmp_path / "exported")
    fields, card = metadata_load(tmp_path / "exported" / "README.md"), read_card(tmp_path / "exported")
    assert fields == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["llava"]}
    assert "| 1 | chat.json | 2 |" in card and "| 2 | instruct.json | 2 |" in card  # data and steps
    heldout = read_result(run / "stage2")["heldout"]
    evaluation = json.loads((run / "stage2" / "eval.json").read_text())
    assert f"| {heldout['loss']:.3f} | {heldout['loss_different']:.3f} |" in card
    assert f"{evaluation['answers_loss_blank']:.3f} |" in card
    assert "equal to the reference answer" in card


def test_nothing_exported_tells_where_the_files_were(exported, tmp_path):
    folder = exported(stage=2)[0]
    for path in folder.iterdir():  # models, data and run are in folders beside tmp_path
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name


def test_the_card_names_base_models_of_the_hub_and_known_licenses(trained, tmp_path):
    run = read_result(trained(1) / "stage1")
    run |= {"vision_tower": "openai/clip-vit-large-patch14", "llm": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}
    run["settings"]["data"] = "data/LLaVA-CC3M-Pretrain-595K/chat.json"
    write_model_card(tmp_path, [run], evaluation=None)
    assert metadata_load(tmp_path / "README.md")["base_model"] == [run["vision_tower"], run["llm"]]
    licenses = read_card(tmp_path).split("## Licenses")[1]
    assert "MIT" in licenses and "Apache 2.0" in licenses and "CC3M" in licenses and "unknown" not in licenses


def read_card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


# -- what is refused ---------------------------------------------------------------------------------------


def test_an_export_that_differs_from_the_run_is_found_and_not_kept(refusal, trained, tmp_path, monkeypatch):
    def copy_wrongly(ours, theirs):
        copy_projector(ours, theirs)
        theirs.linear_2.bias.data += 0.01

    copy_projector = export_hf.copy_projector
    monkeypatch.setattr(export_hf, "copy_projector", copy_wrongly)
    (tmp_path / "out").mkdir()
    sentence = refusal("tools.export_hf", "--run", trained(1), "--out", tmp_path / "out" / "exported")
    assert "differs from the run" in sentence
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_run_and_an_output_that_cannot_be_written_are_refused(refusal, trained, tmp_path):
    sentence = refusal("tools.export_hf", "--run", tmp_path / "none", "--out", tmp_path / "exported")
    assert "holds no finished run: train it first, with python stage1_align.py" in sentence
    assert not (tmp_path / "exported").exists()
    (tmp_path / "file").touch()
    run = trained(1)
    for out, complaint in ((tmp_path / "file" / "exported", "cannot write"), (run, "exists already")):
        assert complaint in refusal("tools.export_hf", "--run", run, "--out", out)
    assert (run / "stage1" / "run.json").exists()
    (run / "stage1" / "eval.json").write_text("{")
    assert "delete it, or run tools.evaluate again" in refusal("tools.export_hf", "--run", run, "--out",
                                                               tmp_path / "exported")


def test_the_printed_command_can_be_typed(script, trained, tmp_path, capsys):
    script("tools.export_hf", "--run", trained(1), "--out", tmp_path / "a b", "--samples", 1)
    output = capsys.readouterr().out
    assert "on 1 held-out record:" in output
    assert shlex.split(output.splitlines()[-1])[3:] == [str(tmp_path / "a b")]


def test_named_chat_templates_a_date_and_all_end_tokens_are_exported(script, flags, parts, tmp_path):
    llm = shutil.copytree(parts.llm, tmp_path / "named")
    template = (llm / "chat_template.jinja").read_text()
    (llm / "chat_template.jinja").unlink()
    config = json.loads((llm / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "{{ strftime_now('%d %b %Y') }}" + template},
                               {"name": "tool_use", "template": "{{ 'tools' }}" + template}]
    (llm / "tokenizer_config.json").write_text(json.dumps(config))
    config = json.loads((llm / "generation_config.json").read_text())
    (llm / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [300, 301]}))
    script("stage1_align", *flags(1, run=tmp_path / "run", llm=llm, max_steps=0))
    script("tools.export_hf", "--run", tmp_path / "run", "--out", tmp_path / "exported", "--device", "cpu")
    generation = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 300, 301]
    assert "26 Jul 2024" in (tmp_path / "exported" / "chat_template.jinja").read_text()
