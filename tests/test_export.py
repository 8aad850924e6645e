"""tools.export_hf: the exported folder computes the same as the run, without the code of this repository."""

import json
import shutil

import pytest
import torch
from conftest import N, draw, make_llm
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

from data import collate
from support.devices import DTYPES
from support.evaluation import generate_answers
from support.trained import load_trained
from tools import export_hf
from tools.model_card import write_model_card

CPU = torch.device("cpu")
QUESTION = "What object is shown?"
PROMPT = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
TEXT = {"type": "text", "text": QUESTION}


@pytest.fixture
def trained(script, flags, tmp_path):
    """trained(stage, projector) returns the folder of a run whose projector and adapter change the output."""
    def make(stage, projector="linear"):
        changes = dict(run=tmp_path / "run", projector=projector, max_steps=2)
        script("stage1_align", *flags(1, lr=0.01, **changes))
        if stage == 2:
            script("stage2_instruct", *flags(2, lr=0.01, projector_lr=0.01, **changes))
        return tmp_path / "run"

    return make


@pytest.fixture
def export(script, tmp_path):
    """export(run, dtype) returns the folder of the exported run."""
    def run_script(run, dtype="fp32"):
        folder = tmp_path / dtype
        script("tools.export_hf", "--run", run, "--out", folder, "--dtype", dtype, "--device", "cpu")
        return folder

    return run_script


@pytest.mark.parametrize("stage, projector, activation", [(1, "mlp", "gelu"), (2, "linear", "linear")])
def test_ids_pixels_logits_and_greedy_text_of_the_export_are_those_of_the_run(
        trained, export, stage, projector, activation):
    run = trained(stage, projector)
    folder = export(run)
    model, template, image_processor, _ = load_trained(run / f"stage{stage}", CPU, torch.float32)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    llava = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert llava.config.projector_hidden_act == activation
    prompts = [{"input_ids": template.encode_prompt(PROMPT),
                "pixel_values": image_processor(draw(color), return_tensors="pt")["pixel_values"][0]}
               for color in ("red", "blue", "green")]
    messages = [{"role": "user", "content": [{"type": "image", "image": draw("red")}, TEXT]}]
    theirs = processor.apply_chat_template([messages], tokenize=True, add_generation_prompt=True,
                                           return_dict=True, return_tensors="pt")
    ours = collate(prompts[:1], template.pad_token_id, padding_side="left")
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"], atol=1e-5, rtol=0)
    with torch.no_grad():
        their_logits = llava(**theirs).logits[..., :model.llm.config.vocab_size]  # without the added rows
        our_logits = model.llm(inputs_embeds=model.embed(ours["input_ids"], ours["pixel_values"])).logits
    assert our_logits.std() > 0.3
    torch.testing.assert_close(their_logits, our_logits, atol=1e-4, rtol=0)

    answers = generate_answers(model, template, prompts, max_new_tokens=32)
    assert len(set(answers)) > 1  # otherwise a lost image would not be noticed
    ask = pipeline("image-text-to-text", model=llava, processor=processor, device="cpu")
    for color, answer in zip(("red", "blue", "green"), answers):
        content = [{"type": "image", "image": draw(color)}, TEXT]
        reply = ask([{"role": "user", "content": content}], max_new_tokens=32, return_tensors=True)
        assert template.decode(reply[0]["generated_token_ids"][theirs["input_ids"].shape[1]:]) == answer


def test_content_as_text_or_as_a_list_gives_our_prompt_with_one_start_token(trained, export, template):
    processor = AutoProcessor.from_pretrained(export(trained(1)), backend="pil")
    rest = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "olive oil?"}]
    texts = PROMPT + rest
    lists = [{"role": "user", "content": [{"type": "image", "image": draw("red")}, TEXT]}]
    lists += [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in rest]
    expected = template.encode_prompt(texts)
    assert expected.count(template.tokenizer.bos_token_id) == 1

    tokenized = processor.apply_chat_template(lists, tokenize=True, add_generation_prompt=True,
                                              return_dict=True)
    assert tokenized["input_ids"] == [expected]
    for messages in (texts, lists):  # older code renders the text first and then tokenizes it
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == template.render(texts, is_prompt=True)
        assert processor(text=text, images=draw("red"))["input_ids"] == [expected]


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


def test_half_precision_is_rounded_once_from_fp32_and_weights_have_the_names_of_the_llava_models_on_the_hub(
        trained, export):
    run = trained(2)
    loaded = {dtype: AutoModelForImageTextToText.from_pretrained(export(run, dtype)) for dtype in DTYPES}
    for dtype, half in loaded.items():
        assert half.state_dict().keys() == loaded["fp32"].state_dict().keys()
        for name, tensor in loaded["fp32"].state_dict().items():
            assert torch.equal(half.state_dict()[name], tensor.to(DTYPES[dtype])), name
        names = set(load_file(run.parent / dtype / "model.safetensors"))
        assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight",
                "language_model.model.layers.0.self_attn.q_proj.weight",
                "multi_modal_projector.linear_1.weight",
                "vision_tower.vision_model.embeddings.class_embedding",
                "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"} <= names
        assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector",
                                                          "vision_tower"}


def test_named_chat_templates_and_all_end_tokens_are_exported(script, flags, export, parts, tmp_path):
    llm = shutil.copytree(parts.llm, tmp_path / "named")
    template = (llm / "chat_template.jinja").read_text()
    (llm / "chat_template.jinja").unlink()
    config = json.loads((llm / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": template},
                               {"name": "tool_use", "template": "{{ 'tools' }}" + template}]
    (llm / "tokenizer_config.json").write_text(json.dumps(config))
    config = json.loads((llm / "generation_config.json").read_text())
    (llm / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [300, 301]}))
    script("stage1_align", *flags(1, run=tmp_path / "run", llm=llm, max_steps=0))
    generation = json.loads((export(tmp_path / "run") / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 300, 301]


# -- the model card ----------------------------------------------------------------------------------------


def test_the_card_has_the_hubs_fields_and_the_scores_and_no_file_tells_where_the_others_were(
        script, trained, export, tmp_path):
    run = trained(2)
    script("tools.evaluate", "--run", run, "--device", "cpu")
    folder = export(run)
    card, fields = (folder / "README.md").read_text(encoding="utf-8"), metadata_load(folder / "README.md")
    assert fields == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["llava"]}
    assert "| stage 1 | 2 steps on chat.json |" in card and "| stage 2 | 2 steps on instruct.json |" in card
    heldout = json.loads((run / "stage2" / "run.json").read_text())["heldout"]
    evaluation = json.loads((run / "stage2" / "eval.json").read_text())
    assert f"| {heldout['loss']:.3f} | {heldout['loss_different']:.3f} |" in card
    assert f"{evaluation['answers_loss_blank']:.3f} |" in card
    for path in folder.iterdir():  # models, data and run are in folders beside tmp_path
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name


def test_the_card_names_base_models_of_the_hub_and_known_licenses(trained, tmp_path):
    folder = trained(1) / "stage1"
    saved = json.loads((folder / "run.json").read_text())
    saved |= {"vision_tower": "openai/clip-vit-large-patch14", "llm": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}
    saved["settings"]["data"] = "data/LLaVA-CC3M-Pretrain-595K/chat.json"
    (folder / "run.json").write_text(json.dumps(saved))
    write_model_card(tmp_path, folder)
    assert metadata_load(tmp_path / "README.md")["base_model"] == [saved["vision_tower"], saved["llm"]]
    licenses = (tmp_path / "README.md").read_text(encoding="utf-8").split("## Licenses")[1]
    assert "MIT" in licenses and "Apache 2.0" in licenses and "CC3M" in licenses and "unknown" not in licenses


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


def test_an_output_that_cannot_be_written_is_refused(refusal, trained, tmp_path):
    (tmp_path / "file").touch()
    run = trained(1)
    for out, complaint in ((tmp_path / "file" / "exported", "cannot write"), (run, "exists already")):
        assert complaint in refusal("tools.export_hf", "--run", run, "--out", out)
    assert (run / "stage1" / "run.json").exists()
