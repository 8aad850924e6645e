"""The model against transformers' own LLaVA with the same weights, and faults that would stay silent."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import N, batch_of, build, draw, make_llm, preprocess
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, CLIPModel, CLIPVisionModel, LlavaConfig,
                          LlavaForConditionalGeneration)
from transformers.modeling_layers import GradientCheckpointingLayer

from data import IGNORE_INDEX, collate
from model import LORA_TARGETS
from support.checkpoints import Progress
from support.errors import UserError
from support.pretrained import load_image_processor
from support.processes import Processes
from support.results import save_result
from support.trained import load_trained

LORA = dict(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


def reference(model, parts, projector):
    """Returns transformers' LLaVA with the weights of our model. It is built without calling our code."""
    vision_config = CLIPModel.config_class.from_pretrained(parts.clip).vision_config
    clip = CLIPVisionModel.from_pretrained(parts.clip, dtype=torch.float32, config=vision_config)
    llm = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32)
    llm.resize_token_embeddings(model.image_token_id + 1)  # it looks the image id up before overwriting it
    llava = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=clip.config, text_config=llm.config, image_token_index=model.image_token_id,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=N,
        projector_hidden_act="linear" if projector == "linear" else "gelu")).eval()
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


def sample(template, image_processor, place, answer, color="red"):
    """Returns a sample with the image "first", in the "middle" of the question, or with "none"."""
    question = {"first": "<image>\nWhat object is shown?", "middle": "In this <image> what object is shown?",
                "none": "What object is shown?"}[place]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, labels = template.encode(messages)
    pixel_values = None if place == "none" else preprocess(image_processor, draw(color))
    return {"input_ids": ids, "labels": labels, "pixel_values": pixel_values}


BATCHES = {
    "mixed": [("none", "Yes", None), ("first", "a red circle .", "red"), ("none", "No , it is solid .", None),
              ("middle", "cold", "blue")],
    "only text": [("none", "Yes", None), ("none", "No , it is solid .", None)],
}


@pytest.fixture
def batch(request, template, image_processor):
    kind = getattr(request, "param", "mixed")
    samples = [sample(template, image_processor, *what) for what in BATCHES[kind]]
    assert len({len(s["input_ids"]) for s in samples}) > 1  # otherwise nothing would be padded
    return batch_of(samples, template)


@pytest.fixture
def prompts(template, image_processor):
    """Prompts of unequal lengths as a left-padded batch."""
    texts = [("<image>\nWhat object is shown?", "red"), ("What is it?", None), ("<image>\nA cat?", "blue")]
    return collate([
        {"input_ids": template.encode_prompt([{"role": "user", "content": text}]),
         "pixel_values": color and preprocess(image_processor, draw(color))} for text, color in texts],
        template.pad_token_id, padding_side="left")


def logits_of(model, batch):
    inputs_embeds = model.embed(batch["input_ids"], batch["pixel_values"])
    return model.llm(inputs_embeds=inputs_embeds, attention_mask=batch["attention_mask"]).logits


def randomize_adapter(model, std=0.1):
    """Makes the adapter do something. A new one changes nothing, because its B is zero."""
    torch.manual_seed(5)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=std)


# -- the same numbers as transformers' LLaVA ---------------------------------------------------------------


@pytest.mark.parametrize("projector, batch", [("linear", "mixed"), ("mlp", "mixed"), ("linear", "only text")],
                         indirect=["batch"])
def test_logits_and_losses_are_those_of_transformers_llava(tiny, parts, batch, projector):
    model, _, _ = tiny(projector)
    llava, images = reference(model, parts, projector), batch["pixel_values"]
    with torch.no_grad():
        theirs = llava(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long(),
                       pixel_values=images if len(images) else None).logits
        theirs = theirs[..., :model.llm.config.vocab_size]
        ours, losses = logits_of(model, batch), model(**batch)
    real = batch["attention_mask"]  # the logits at padding are not used
    assert theirs[real].std() > 0.3  # equal logits would agree with any model
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=0)

    targets = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(theirs[:, :-1].flatten(0, 1), targets, reduction="none",
                               ignore_index=IGNORE_INDEX)[targets != IGNORE_INDEX]
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)


def test_greedy_answers_to_a_padded_batch_are_those_of_transformers_llava(tiny, parts, prompts):
    model, _, _ = tiny("mlp")
    llava = reference(model, parts, "mlp")
    llava.lm_head.weight.data[model.llm.config.vocab_size:] = 0  # a row that our model does not have
    theirs = llava.generate(**{**prompts, "attention_mask": prompts["attention_mask"].long()},
                            do_sample=False, max_new_tokens=12, eos_token_id=[2], pad_token_id=2)
    ours = model.generate(**prompts, end_token_ids=[2], max_new_tokens=12)
    assert ours.tolist() == theirs[:, prompts["input_ids"].shape[1]:].tolist()
    assert len(set(ours.flatten().tolist())) > 5  # not the same token again and again


def test_ids_with_positions_for_another_number_of_features_are_refused(tiny, batch):
    model, _, _ = tiny()
    batch["input_ids"][0, 1] = model.image_token_id
    with pytest.raises(ValueError, match="image positions"):
        model(**batch)


def test_a_batch_of_only_text_gives_the_projector_a_gradient_of_zero_and_not_none(
        tiny, template, image_processor):
    model, _, _ = tiny()
    model.projector.requires_grad_(True)
    text = batch_of([sample(template, image_processor, "none", "Yes")], template)
    model(**text).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


# -- generation --------------------------------------------------------------------------------------------


def test_greedy_answers_with_an_adapter_are_those_of_the_llms_own_generate(tiny, prompts):
    model, _, _ = tiny()
    without = model.generate(**prompts, end_token_ids=[2], max_new_tokens=12)
    model.add_lora(LoraConfig(**LORA))
    randomize_adapter(model)
    model.eval()
    free = model.generate(**prompts, end_token_ids=[2], max_new_tokens=12)
    assert not torch.equal(free, without)
    # Tokens that were just seen serve as end tokens, so the rows end at different times.
    for ends in ([2], [free[0, 3].item(), free[1, 5].item()], [free[2, 0].item()], free[:, 2].tolist()):
        ours = model.generate(**prompts, end_token_ids=ends, max_new_tokens=12)
        theirs = model.llm.generate(inputs_embeds=model.embed(prompts["input_ids"], prompts["pixel_values"]),
                                    attention_mask=prompts["attention_mask"].long(), eos_token_id=ends,
                                    pad_token_id=ends[0], do_sample=False, max_new_tokens=12)
        assert torch.equal(ours, theirs)


def test_sampled_tokens_follow_the_softmax_of_the_logits_over_the_temperature(tiny, prompts):
    model, _, _ = tiny()
    rows, temperature = 2000, 0.5
    prompt = {name: tensor[:1].expand(rows, *tensor.shape[1:]) for name, tensor in prompts.items()}
    with torch.no_grad():
        logits = logits_of(model, {name: tensor[:1] for name, tensor in prompts.items()})[0, -1]
    expected = torch.softmax(logits / temperature, dim=-1)
    torch.manual_seed(0)
    ids = model.generate(**prompt, end_token_ids=[2], max_new_tokens=1, temperature=temperature).squeeze(1)
    frequency = ids.bincount(minlength=len(expected)) / rows
    top = expected.topk(10).indices
    error = (expected[top] * (1 - expected[top]) / rows).sqrt()  # standard deviation of a frequency
    assert ((frequency[top] - expected[top]).abs() < 4 * error).all()
    # The test can tell: at temperature 1 the frequencies would be others.
    assert ((torch.softmax(logits, dim=-1)[top] - expected[top]).abs() > 8 * error).any()
    torch.manual_seed(0)
    again = model.generate(**prompt, end_token_ids=[2], max_new_tokens=1, temperature=temperature).squeeze(1)
    assert torch.equal(ids, again)


def test_a_streamer_receives_the_returned_ids_one_by_one(tiny, prompts):
    model, _, _ = tiny()
    one, seen = {name: tensor[:1] for name, tensor in prompts.items()}, []
    streamer = SimpleNamespace(put=lambda ids: seen.append(ids.item()), end=lambda: seen.append("end"))
    ids = model.generate(**one, end_token_ids=[2], max_new_tokens=8, streamer=streamer)[0].tolist()
    assert seen == [*ids, "end"]


# -- what is trained ---------------------------------------------------------------------------------------


def test_lora_is_added_to_the_llm_alone_and_changes_nothing_before_it_is_trained(tiny, batch):
    model, _, _ = tiny()
    frozen = dict(model.named_parameters())
    with torch.no_grad():
        before = logits_of(model, batch)
        model.add_lora(LoraConfig(**LORA))
        torch.testing.assert_close(logits_of(model.eval(), batch), before, atol=0, rtol=0)
    trained = model.trainable_parameters()
    assert all(name.startswith("llm.") and ".lora_" in name for name in trained)
    assert len(trained) == 2 * len(LORA_TARGETS) * model.llm.config.num_hidden_layers  # A and B of each
    assert not any(p.requires_grad for p in frozen.values())


def test_frozen_components_stay_in_eval_mode_while_lora_is_trained(tiny):
    """A block of the LLM has its own flag in train mode for activation checkpointing. It has no dropout of
    its own: every module inside it is in eval mode."""
    model, _, _ = tiny("mlp")
    model.add_lora(LoraConfig(**LORA))
    model.train()
    blocks = set(model.llm.get_decoder().layers)
    assert all(isinstance(block, GradientCheckpointingLayer) for block in blocks)
    modes = {name: module.training for name, module in model.named_modules() if name and module not in blocks}
    assert all(modes[name] == (".lora_" in name or name.startswith("projector")) for name in modes)
    assert sum("lora_dropout" in name and on for name, on in modes.items()) >= 2 * len(LORA_TARGETS)
    assert not any(module.training for module in model.eval().modules())


def test_frozen_dropout_is_never_active(parts, tmp_path, template, image_processor):
    """The losses of a model whose frozen LLM has dropout are the same in every forward pass."""
    llm = make_llm(tmp_path, attention_dropout=0.5)
    model, _ = build(parts.clip, llm)
    batch = batch_of([sample(template, image_processor, "first", "a cat")], template)
    model.train()
    assert torch.equal(model(**batch), model(**batch)) and model.llm.config.attention_dropout == 0.5


# -- saving and loading ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, parts, tmp_path):
    """saved(projector, stage) returns (model, folder): a model as a stage leaves it, with a projector and in
    stage 2 an adapter that does something."""
    def make(projector="linear", stage=2):
        model, _, _ = tiny(projector)
        if stage == 2:
            model.add_lora(LoraConfig(**LORA))
            randomize_adapter(model)
        settings = {"vision_tower": str(parts.clip), "vision_layer": -2, "llm": str(parts.llm),
                    "projector": projector}
        folder = SimpleNamespace(path=tmp_path, stage=stage, processes=Processes("cpu", "fp32"),
                                 settings=settings)
        metrics = {"loss": 1.0, "loss_different": 1.0, "correct_more_likely": 0.5}
        save_result(folder, model.eval(), Progress(first_metrics=metrics), metrics)
        return model, tmp_path

    return make


def load(folder, dtype=torch.float32):
    return load_trained(folder, torch.device("cpu"), dtype)


@pytest.mark.parametrize("projector, stage", [("linear", 1), ("mlp", 2)])
def test_a_loaded_model_is_the_saved_one(saved, batch, projector, stage):
    model, folder = saved(projector, stage)
    torch.manual_seed(99)  # a new projector or A would be another than the saved one
    loaded, _, _, result = load(folder)
    tolerance = 0 if stage == 1 else 1e-4  # the adapter is added to the weights, in another order of sums
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch), atol=tolerance,
                                   rtol=tolerance)
    assert result["stage"] == stage and not any(module.training for module in loaded.modules())


def test_the_adapter_loads_with_plain_peft(saved, parts):
    model, folder = saved()
    ids = torch.tensor([[1, 5, 300, 7, 310]])
    base = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        plain = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
        torch.testing.assert_close(plain, model.llm(ids).logits, atol=0, rtol=0)
    assert (plain - before).abs().max() > 0.1


def spoil(path, change, name):
    """Deletes, shortens or adds a tensor in a file."""
    tensors = load_file(path)
    tensor = tensors.pop(name)
    if change == "another shape":
        tensors[name] = tensor[:-1].clone()
    elif change == "one more":
        tensors |= {name: tensor, name + "_added": torch.ones(48)}
    save_file(tensors, path, {"format": "pt"})


LORA_B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize("file, name", [("projector.safetensors", "weight"),
                                        ("adapter/adapter_model.safetensors", LORA_B)])
@pytest.mark.parametrize("change", ["missing", "another shape", "one more"])
def test_a_projector_or_adapter_that_does_not_fit_is_refused(saved, file, name, change):
    _, folder = saved()
    spoil(folder / file, change, name)
    with pytest.raises(UserError, match="fit"):
        load(folder)


@pytest.mark.parametrize("which, name", [("llm", "model.layers.1.mlp.up_proj.weight"),
                                         ("clip", "vision_model.encoder.layers.1.mlp.fc1.weight")])
@pytest.mark.parametrize("change", ["missing", "another shape", "one more"])
def test_pretrained_weights_that_do_not_fit_are_refused_and_not_filled_at_random(
        parts, tmp_path, which, name, change):
    folder = shutil.copytree(getattr(parts, which), tmp_path / which)
    spoil(folder / "model.safetensors", change, name)
    broken = parts._replace(**{which: folder})
    with pytest.raises(UserError, match=f"fit its config.json: 1 .*{name[-15:]}"):
        build(broken.clip, broken.llm)


def test_half_precision_merges_the_adapter_in_fp32_and_leaves_the_positions_in_fp32(saved, parts):
    _, folder = saved()
    whole = load(folder)[0].llm
    half = load(folder, torch.bfloat16)[0].llm
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32)
    weight, merged, frozen = (llm.model.layers[0].mlp.up_proj.weight for llm in (half, whole, base))
    expected = (frozen.bfloat16().float() + (merged - frozen)).bfloat16()  # only the last step rounds
    assert (weight == expected).float().mean() > 0.999 and not torch.equal(expected, frozen.bfloat16())


DAMAGES = {  # name: (which folder, which file, its new content or None, what the sentence names)
    "the preprocessing is missing": ("clip", "preprocessor_config.json", None, "preprocessor_config.json"),
    "the weights are missing": ("llm", "model.safetensors", None, "weights in the format safetensors"),
    "the LLM's configuration is a list": ("llm", "config.json", "[]", "llm"),
    "the tokenizer is half a file": ("llm", "tokenizer.json", '{"version"', "tokenizer"),
    "the weights are half a file": ("llm", "model.safetensors", "half", "cannot load the weights"),
    "the template is missing": ("llm", "chat_template.jinja", None, "chat template"),
    "the template has a syntax error": ("llm", "chat_template.jinja", "{% for", "chat template"),
}


@pytest.mark.parametrize("which, file, content, named", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_pretrained_folder_is_one_sentence(parts, tmp_path, which, file, content, named):
    folder = shutil.copytree(getattr(parts, which), tmp_path / which)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    broken = parts._replace(**{which: folder})
    with pytest.raises(UserError, match=named) as error:
        load_image_processor(broken.clip)
        build(broken.clip, broken.llm)
    assert str(folder) in str(error.value)
