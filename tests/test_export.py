"""What export_hf.py writes is the run, for tools that know nothing of this repository; and the way back."""

import json
import shutil

import export_hf
import plumbing
import pytest
import torch
from conftest import N, draw, make_llm
from data import collate
from peft import PeftModel
from plumbing import UserError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)
from weights import load

CPU = torch.device("cpu")
QUESTION = "What object is shown?"
PROMPT = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
TEXT = {"type": "text", "text": QUESTION}
RUNS = [(1, "linear"), (1, "mlp"), (2, "linear"), (2, "mlp")]

# Of llava-1.5-7b-hf: content as a list, and nothing but a space after an answer.
LLAVA_1_5 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}"
    "{% endif %}"
)


@pytest.fixture
def trained(script, flags, tmp_path):
    """trained(stage, projector) → folder of a run whose adapter and projector do something."""

    def make(stage=2, projector="linear", **changes):
        run = tmp_path / "run"
        changes = dict(run=run, projector=projector, max_steps=2, **changes)
        script("stage1_align", *flags(1, lr=0.01, **changes))
        if stage == 2:
            script("stage2_instruct", *flags(2, lr=0.01, projector_lr=0.01, **changes))
        return run

    return make


@pytest.fixture
def exported(script, trained, tmp_path):
    """exported(stage, projector) → (folder of the export, our model, template, image processor)."""

    def make(stage=2, projector="linear", **changes):
        run = trained(stage, projector, **changes)
        script("export_hf", "--run", run, "--out", tmp_path / "exported", "--device", "cpu")
        folder = run / f"stage{stage}"
        return tmp_path / "exported", *load(folder, plumbing.read_run(folder, "", None), CPU, torch.float32)

    return make


def our_text(model, template, image_processor, image):
    prompt = {"input_ids": template.encode_prompt(PROMPT, N), "pixel_values": image_processor(image)}
    batch = collate([prompt], template.tokenizer.pad_token_id, "left")
    ids = model.generate(**batch, end_token_ids=[template.end_token_id], max_new_tokens=32)
    return template.tokenizer.decode(ids[0], skip_special_tokens=True)


def their_text(folder, template, image):
    """What the pipeline says; decoded here, since it decodes prompt and answer together, and the random
    bytes that an untrained model says may join across the seam."""
    parts = [{"type": "image", "image": image}, TEXT]
    ask = pipeline("image-text-to-text", model=str(folder), device="cpu")
    answer = ask([{"role": "user", "content": parts}], max_new_tokens=32, return_tensors=True)
    ids = answer[0]["generated_token_ids"][len(template.encode_prompt(PROMPT, N)) :]
    return ask.processor.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stage, projector", RUNS)
def test_the_auto_classes_alone_load_the_same_model(exported, stage, projector):
    folder, model, template, image_processor = exported(stage, projector)
    processor = AutoProcessor.from_pretrained(folder)
    llava = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    prompts = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "image", "image": draw("red")}, TEXT]}]],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    batch = collate(
        [
            {
                "input_ids": template.encode_prompt(PROMPT, N),
                "pixel_values": image_processor(draw("red")),
            }
        ],
        template.tokenizer.pad_token_id,
    )
    assert prompts["input_ids"].tolist() == batch["input_ids"].tolist()
    torch.testing.assert_close(prompts["pixel_values"], batch["pixel_values"], atol=1e-5, rtol=0)
    with torch.no_grad():
        theirs = llava(**prompts).logits[..., : model.llm.config.vocab_size]
        ours = model.llm(inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"])).logits
    assert ours.std() > 0.3
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage, projector", RUNS)
def test_the_pipeline_and_the_way_back_answer_as_the_run_does(exported, stage, projector):
    folder, *ours = exported(stage, projector)
    texts = [our_text(*ours, draw(colour)) for colour in ("red", "blue", "green")]
    assert all(texts) and len(set(texts)) > 1  # the image matters, or a lost one would not be noticed
    assert [their_text(folder, ours[1], draw(colour)) for colour in ("red", "blue", "green")] == texts
    back = export_hf.from_hf(folder, CPU, torch.float32)
    assert [our_text(*back, draw(colour)) for colour in ("red", "blue", "green")] == texts
    if projector == "linear":  # the identity that the export had to add is gone again, without a trace
        assert torch.equal(back[0].projector.weight, ours[0].projector.weight)


def test_strings_and_parts_give_our_prompt_with_one_bos(exported):
    folder, _, template, _ = exported(stage=1)
    processor = AutoProcessor.from_pretrained(folder)
    rest = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "olive oil?"}]
    strings = PROMPT + rest
    listed = [{"role": "user", "content": [{"type": "image", "image": draw("red")}, TEXT]}]
    listed += [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in rest]
    expected = template.encode_prompt(strings, N)
    assert expected.count(template.tokenizer.bos_token_id) == 1

    tokenized = processor.apply_chat_template(
        listed, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert tokenized["input_ids"] == [expected]
    for messages in (strings, listed):  # first the text, then the ids: as older code does it
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == template.render(strings, prompt=True)
        assert processor(text=text, images=draw("red"))["input_ids"] == [expected]


def test_a_run_on_padded_images_exports_a_processor_that_pads(exported):
    folder, _, _, image_processor = exported(stage=1, image_fit="pad")
    processor = AutoProcessor.from_pretrained(folder).image_processor
    for size in ((90, 40), (40, 90), (50, 50)):
        theirs = processor(draw("red", size), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(theirs, image_processor(draw("red", size)), atol=1e-5, rtol=0)
    back = export_hf.from_hf(folder, CPU, torch.float32)[2]
    assert torch.equal(back(draw("red", (90, 40))), image_processor(draw("red", (90, 40))))


@pytest.mark.parametrize("tied", [False, True])
def test_the_added_ids_are_never_the_most_probable(tmp_path, tied):
    llm = AutoModelForCausalLM.from_pretrained(make_llm(tmp_path, tie_word_embeddings=tied))
    llm.get_output_embeddings().weight.data[:, 0] += 1.0  # so that all logits can be negative at once
    before = llm.get_input_embeddings().num_embeddings
    export_hf.add_rows(llm, before + 3)
    hidden = torch.randn(1000, llm.config.hidden_size)
    hidden[:, 0] -= 20
    logits = llm.get_output_embeddings()(hidden)
    assert logits.shape[1] == before + 3 and (logits[:, :before].amax(1) < 0).any()
    assert (logits.argmax(1) < before).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_rounded_once_from_fp32(script, trained, tmp_path, dtype):
    run = trained()
    for name in ("fp32", dtype):
        script("export_hf", "--run", run, "--out", tmp_path / name, "--dtype", name)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "fp32", dtype=torch.float32).state_dict()
    half = AutoModelForImageTextToText.from_pretrained(tmp_path / dtype).state_dict()
    assert all(torch.equal(half[name], tensor.to(export_hf.DTYPES[dtype])) for name, tensor in whole.items())


def test_the_adapter_alone_loads_with_plain_peft(trained, parts, template):
    folder = trained() / "stage2"
    model, _, _ = load(folder, plumbing.read_run(folder, "", None), CPU, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32)
    ids = torch.tensor([template.encode_prompt([{"role": "user", "content": "What is it?"}], N)])
    with torch.no_grad():
        before = base(ids).logits
        plain = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
        torch.testing.assert_close(plain, model.llm(ids).logits, atol=1e-4, rtol=0)
    assert (plain - before).abs().max() > 0.1


# -- what is refused ---------------------------------------------------------------------------------------


def test_an_export_that_differs_is_found_out_and_not_kept(script, trained, tmp_path, monkeypatch):
    def wrong(theirs, ours):
        fill_projector(theirs, ours)
        theirs.linear_2.bias.data += 0.01

    fill_projector = export_hf.fill_projector
    monkeypatch.setattr(export_hf, "fill_projector", wrong)
    with pytest.raises(SystemExit, match="is not the run's"):
        script("export_hf", "--run", trained(1), "--out", tmp_path / "out" / "exported")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_read_or_written_is_one_sentence(script, trained, tmp_path):
    with pytest.raises(SystemExit, match="stage1_align.py.* first$"):
        script("export_hf", "--run", tmp_path / "none", "--out", tmp_path / "exported")
    (tmp_path / "file").touch()
    run = trained(1)
    for out, complaint in ((tmp_path / "file" / "exported", "cannot write"), (run, "exists already")):
        with pytest.raises(SystemExit, match=complaint) as stopped:
            script("export_hf", "--run", run, "--out", out)
        assert len(str(stopped.value).splitlines()) == 1
    assert (run / "stage1" / "run.json").exists()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"vision_feature_layer": [-2, -3]}, "2 hidden states"),
        ({"vision_feature_select_strategy": "full"}, "class token"),
        ({"image_token_index": 7}, "the id"),
        ({"model_type": "llava_next"}, "llava_next"),
    ],
)
def test_a_llava_of_another_form_is_refused(exported, change, complaint):
    folder, *_ = exported(stage=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=complaint):
        export_hf.from_hf(folder, CPU, torch.float32)


def test_a_template_for_lists_without_an_end_token_asks_as_it_was_written(parts, tmp_path):
    folder = shutil.copytree(parts.llm, tmp_path / "llm")
    (folder / "chat_template.jinja").write_text(LLAVA_1_5)
    template = export_hf.FolderTemplate(folder)
    turns = [{"role": "user", "content": "<image>\nA cat?"}, {"role": "assistant", "content": "Yes"}]
    assert template.render(turns[:1], prompt=True) == "USER: <image>\nA cat? ASSISTANT:"
    assert template.render(turns) == "USER: <image>\nA cat? ASSISTANT: Yes</s> "
    assert template.end_token_id == template.tokenizer.eos_token_id
