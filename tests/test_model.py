"""The model against transformers' own LLaVA with the same weights, and what would break it without a word."""

import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import N, draw
from data import IGNORE_INDEX, collate
from model import LORA_TARGETS
from peft import LoraConfig, PeftModel
from plumbing import UserError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from weights import build, load, save

LORA = dict(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


def reference(model, parts, projector):
    """transformers' LLaVA with our model's weights: ours is the one under test, so nothing of it is
    called."""
    clip = CLIPVisionModel.from_pretrained(parts.clip, dtype=torch.float32, config=clip_config(parts))
    llm = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32)
    llm.resize_token_embeddings(model.image_token_id + 1)  # it looks the image id up before overwriting it
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config,
            text_config=llm.config,
            image_token_index=model.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=N,
            projector_hidden_act="linear" if projector == "linear" else "gelu",
        )
    ).eval()
    llava.model.vision_tower.load_state_dict(clip.state_dict())
    llava.model.language_model.load_state_dict(llm.model.state_dict())
    llava.lm_head.load_state_dict(llm.lm_head.state_dict())
    theirs, ours = llava.model.multi_modal_projector, model.projector
    with torch.no_grad():
        if projector == "linear":
            theirs.linear_1.load_state_dict(ours.state_dict())
            theirs.linear_2.weight.copy_(torch.eye(len(theirs.linear_2.weight)))
            theirs.linear_2.bias.zero_()
        else:
            theirs.linear_1.load_state_dict(ours[0].state_dict())
            theirs.linear_2.load_state_dict(ours[2].state_dict())
    return llava


def clip_config(parts):
    return CLIPModel.config_class.from_pretrained(parts.clip).vision_config


def sample(template, image_processor, place, answer, colour="red"):
    """A sample with the image "first", in the "middle" of the text, or "none"."""
    question = {
        "first": "<image>\nWhat object is shown?",
        "middle": "In this <image> what object is shown?",
        "none": "What object is shown?",
    }[place]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, labels = template.encode(messages, N)
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": None if place == "none" else image_processor(draw(colour)),
    }


BATCHES = {
    "image first": [("first", "a red circle .", "red"), ("first", "blue", "blue")],
    "image in the middle": [("middle", "olive oil on a table", "green"), ("middle", "a cat", "blue")],
    "mixed": [
        ("none", "Yes", None),
        ("first", "a red circle .", "red"),
        ("none", "No , it is solid .", None),
        ("middle", "cold", "blue"),
    ],
    "text alone": [("none", "Yes", None), ("none", "No , it is solid .", None)],
}


@pytest.fixture(params=BATCHES)
def batch(request, template, image_processor):
    samples = [
        sample(template, image_processor, place, answer, colour)
        for place, answer, colour in BATCHES[request.param]
    ]
    assert len({len(s["input_ids"]) for s in samples}) > 1  # or nothing would be padded
    return collate(samples, template.tokenizer.pad_token_id)


@pytest.fixture
def prompts(template, image_processor):
    """Prompts of unequal lengths as a left-padded batch."""
    texts = [("<image>\nWhat object is shown?", "red"), ("What is it?", None), ("<image>\nA cat?", "blue")]
    return collate(
        [
            {
                "input_ids": template.encode_prompt([{"role": "user", "content": text}], N),
                "pixel_values": colour and image_processor(draw(colour)),
            }
            for text, colour in texts
        ],
        template.tokenizer.pad_token_id,
        padding_side="left",
    )


def logits_of(model, batch):
    return model.llm(
        inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"]),
        attention_mask=batch["attention_mask"],
    ).logits


@torch.no_grad()
def reference_logits(llava, batch, vocab_size):
    images = batch["pixel_values"]
    return llava(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"].long(),
        pixel_values=images if len(images) else None,
    ).logits[..., :vocab_size]


# -- the same numbers as transformers' LLaVA ---------------------------------------------------------------


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_logits_and_losses_are_those_of_transformers_llava(tiny, parts, batch, projector):
    model, _, _ = tiny(projector)
    vocab_size = model.llm.config.vocab_size
    theirs = reference_logits(reference(model, parts, projector), batch, vocab_size)
    with torch.no_grad():
        ours, losses = logits_of(model, batch), model(**batch)
    real = batch["attention_mask"]  # what stands at padding is nobody's business
    assert theirs[real].std() > 0.3  # logits that are all alike would agree whatever the model did
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=0)

    targets = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(
        theirs[:, :-1].flatten(0, 1), targets, reduction="none", ignore_index=IGNORE_INDEX
    )[targets != IGNORE_INDEX]
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_greedy_answers_to_a_padded_batch_are_those_of_transformers_llava(tiny, parts, prompts, projector):
    model, _, _ = tiny(projector)
    llava = reference(model, parts, projector)
    llava.lm_head.weight.data[model.llm.config.vocab_size :] = 0  # a row that our model does not have
    theirs = llava.generate(
        **{**prompts, "attention_mask": prompts["attention_mask"].long()},
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=[2],
        pad_token_id=2,
    )
    ours = model.generate(**prompts, end_token_ids=[2], max_new_tokens=12)
    assert ours.tolist() == theirs[:, prompts["input_ids"].shape[1] :].tolist()
    assert len(set(ours.flatten().tolist())) > 5  # not one word for ever


def test_an_answer_does_not_depend_on_the_padding_of_its_batch(tiny, prompts):
    model, _, _ = tiny()
    together = model.generate(**prompts, end_token_ids=[2], max_new_tokens=8)
    images = iter(prompts["pixel_values"])
    for row, (ids, mask) in enumerate(zip(prompts["input_ids"], prompts["attention_mask"])):
        ids = ids[mask][None]
        has_image = (ids == model.image_token_id).any()
        pixel_values = next(images)[None] if has_image else prompts["pixel_values"][:0]
        alone = model.generate(ids, torch.ones_like(ids, dtype=torch.bool), pixel_values, [2], 8)[0].tolist()
        assert together[row, : len(alone)].tolist() == alone


@pytest.mark.parametrize("vision_layer", [-1, -2, -3])
def test_cutting_clips_last_blocks_changes_no_feature(tiny, parts, image_processor, vision_layer):
    model, _, _ = tiny(vision_layer=vision_layer)
    whole = CLIPModel.from_pretrained(parts.clip, dtype=torch.float32).vision_model.eval()
    pixel_values = torch.stack([image_processor(draw("red")), image_processor(draw("blue"))])
    with torch.no_grad():
        expected = whole(pixel_values, output_hidden_states=True).hidden_states[vision_layer][:, 1:]
        torch.testing.assert_close(model.encode_images(pixel_values), model.projector(expected))
    assert len(model.vision_tower.encoder.layers) == 4 + vision_layer  # of three, plus the embeddings' output


def test_ids_with_room_for_another_number_of_features_are_refused(tiny, batch):
    model, _, _ = tiny()
    batch["input_ids"][0, 1] = model.image_token_id
    with pytest.raises(ValueError, match="image positions"):
        model(**batch)


def test_text_alone_gives_the_projector_a_zero_gradient_and_not_none(tiny, template, image_processor):
    model, _, _ = tiny()
    model.projector.requires_grad_(True)
    text = collate([sample(template, image_processor, "none", "Yes")], template.tokenizer.pad_token_id)
    model(**text).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


# -- generation --------------------------------------------------------------------------------------------


def test_generation_stops_at_the_end_token(tiny, prompts):
    model, _, _ = tiny()
    one = {
        "input_ids": prompts["input_ids"][:1],
        "attention_mask": prompts["attention_mask"][:1],
        "pixel_values": prompts["pixel_values"][:1],
    }
    free = model.generate(**one, end_token_ids=[2], max_new_tokens=8)[0].tolist()
    assert len(free) == 8 and free[1] != free[0]
    assert model.generate(**one, end_token_ids=[free[1]], max_new_tokens=8)[0].tolist() == free[:2]


# -- what is trained ---------------------------------------------------------------------------------------


def test_lora_goes_on_the_llm_alone(tiny):
    model, _, _ = tiny()
    frozen = dict(model.named_parameters())
    model.add_lora(LoraConfig(**LORA))
    trained = model.trainable()
    assert all(name.startswith("llm.") and ".lora_" in name for name in trained)
    assert len(trained) == 2 * len(LORA_TARGETS) * model.llm.config.num_hidden_layers  # A and B of each
    assert not any(p.requires_grad for p in frozen.values())


def test_lora_changes_nothing_before_it_is_trained(tiny, batch):
    model, _, _ = tiny()
    with torch.no_grad():
        before = logits_of(model, batch)
        model.add_lora(LoraConfig(**LORA))
        torch.testing.assert_close(logits_of(model.eval(), batch), before, atol=0, rtol=0)


def test_frozen_parts_stay_in_eval_mode_while_lora_trains(parts):
    model, _, _ = build(parts.clip, parts.llm, "mlp", -2, torch.float32)
    model.add_lora(LoraConfig(**LORA))
    model.train()
    modes = {name: module.training for name, module in model.named_modules() if name}
    assert all(modes[name] == (".lora_" in name or name.startswith("projector")) for name in modes)
    assert sum("lora_dropout" in name and on for name, on in modes.items()) >= 2 * len(LORA_TARGETS)
    assert not any(module.training for module in model.eval().modules())


# -- saving and loading ------------------------------------------------------------------------------------


def trained_model(tiny, projector, stage):
    """A model as a stage leaves it: with a projector, and in stage 2 an adapter, that do something."""
    model, template, _ = tiny(projector)
    if stage == 2:
        model.add_lora(LoraConfig(**LORA))
        for name, parameter in model.trainable().items():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), template


@pytest.fixture
def saved(tiny, parts, tmp_path):
    """saved(projector, stage) → (model, folder, run)."""

    def make(projector="linear", stage=2):
        model, template = trained_model(tiny, projector, stage)
        run = {
            "stage": stage,
            "vision_tower": str(parts.clip),
            "vision_layer": -2,
            "image_fit": "crop",
            "llm": str(parts.llm),
            "projector": projector,
            "template": template.fingerprint,
        }
        save(model, tmp_path, run)
        return model, tmp_path, run

    return make


@pytest.mark.parametrize("projector, stage", [("linear", 1), ("mlp", 1), ("linear", 2), ("mlp", 2)])
def test_a_loaded_model_is_the_saved_one(saved, batch, projector, stage):
    model, folder, run = saved(projector, stage)
    torch.manual_seed(99)  # another projector and another A than those that were saved
    loaded, _, _ = load(folder, run, torch.device("cpu"), torch.float32)
    tolerance = 0 if stage == 1 else 1e-4  # the adapter is added to the weights, in another order of sums
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(loaded, batch), logits_of(model, batch), atol=tolerance, rtol=tolerance
        )


def test_the_adapter_loads_with_plain_peft(saved, parts, template):
    model, folder, _ = saved()
    ids = torch.tensor([template.encode_prompt([{"role": "user", "content": "What is it?"}], N)])
    base = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        plain = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
        torch.testing.assert_close(plain, model.llm(ids).logits, atol=0, rtol=0)
    assert (plain - before).abs().max() > 0.1


def without_one(tensors):
    del tensors[sorted(tensors)[-1]]


def with_one_more(tensors):
    tensors["unknown.weight"] = torch.zeros(3)


def with_another_shape(tensors):
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name][:-1].clone()


def spoil(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("change", [without_one, with_one_more, with_another_shape])
@pytest.mark.parametrize("file", ["projector.safetensors", "adapter/adapter_model.safetensors"])
def test_a_projector_or_adapter_that_does_not_fit_is_refused(saved, file, change):
    _, folder, run = saved()
    spoil(folder / file, change)
    with pytest.raises(UserError, match="fit"):
        load(folder, run, torch.device("cpu"), torch.float32)


def test_half_a_projector_file_is_refused(saved):
    _, folder, run = saved(stage=1)
    path = folder / "projector.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="projector.safetensors"):
        load(folder, run, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "which, name",
    [
        ("llm", "lm_head.weight"),
        ("llm", "model.layers.1.mlp.up_proj.weight"),
        ("clip", "vision_model.encoder.layers.1.mlp.fc1.weight"),
    ],
)
def test_a_checkpoint_with_a_hole_is_refused_and_not_filled_at_random(parts, tmp_path, which, name):
    folder = shutil.copytree(getattr(parts, which), tmp_path / which)
    spoil(folder / "model.safetensors", lambda tensors: tensors.pop(name))
    broken = parts._replace(**{which: folder})
    with pytest.raises(UserError, match="lack 1 tensor"):
        build(broken.clip, broken.llm, "linear", -2, torch.float32)


def test_a_broken_off_download_is_refused_in_one_sentence(parts, tmp_path):
    folder = shutil.copytree(parts.llm, tmp_path / "llm")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot load the weights"):
        build(parts.clip, folder, "linear", -2, torch.float32)


def test_loading_half_of_clip_prints_no_complaint(tiny, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        tiny()
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_the_vision_half_has_clips_weights(tiny, parts):
    model, _, _ = tiny()
    tensors = load_file(parts.clip / "model.safetensors")
    for name, parameter in model.vision_tower.named_parameters():
        assert torch.equal(parameter, tensors[f"vision_model.{name}"]), name


def test_a_tokenizer_without_a_chat_template_is_refused(parts, tmp_path):
    folder = shutil.copytree(parts.llm, tmp_path / "llm")
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    with pytest.raises(UserError, match="chat template"):
        build(parts.clip, folder, "linear", -2, torch.float32)
