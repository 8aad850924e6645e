"""What makes a step cheaper computes the same: loss and gradients are those of the plain path."""

import pytest
import torch
from conftest import N, batch_of, draw, preprocess
from peft import LoraConfig

from bench.speed import build_models, geometry
from data import IGNORE_INDEX
from model import LORA_TARGETS
from support.devices import choose_attention


@pytest.fixture
def step(tiny, template, image_processor):
    """step(change) returns (loss, gradients) of one batch of unequal lengths, with one row without an image,
    after `change` has been applied to the model and the batch."""
    samples = []
    for color, repeats in (("red", 1), ("blue", 4), (None, 2)):
        question = {"role": "user", "content": "<image>\n" * (color is not None) + "What object is shown?"}
        answer = {"role": "assistant", "content": " ".join(["a solid cold road ."] * repeats)}
        ids, labels = template.encode([question, answer])
        pixel_values = color and preprocess(image_processor, draw(color))
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixel_values})

    def run(change=lambda model, batch: None, adapter=True):
        model, _, _ = tiny()
        torch.manual_seed(3)
        if adapter:
            model.add_lora(LoraConfig(r=4, target_modules=LORA_TARGETS))
            for parameter in model.trainable_parameters().values():
                torch.nn.init.normal_(parameter, std=0.1)
        model.projector.requires_grad_(True)
        model.train()
        batch = batch_of(samples, template)
        change(model, batch)
        loss = model(**batch).sum()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.trainable_parameters().items()}

    return run


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert one[1].keys() == other[1].keys()
    largest = max(gradient.abs().max() for gradient in other[1].values()).item()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_expanded_attention_changes_no_gradient(step):
    assert_same(step(lambda model, batch: model.llm.set_attn_implementation("expanded")), step())


@pytest.mark.parametrize("capability, dtype, attention", [
    ((7, 5), torch.float16, "expanded"), ((8, 6), torch.float32, "expanded"), ((8, 6), torch.bfloat16, None)],
    ids=["T4", "RTX 30xx in fp32", "RTX 30xx in bf16"])
def test_without_flash_attention_keys_and_values_are_expanded(monkeypatch, capability, dtype, attention):
    """Otherwise PyTorch takes its math kernel, which keeps all T×T attention weights for the gradient."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert choose_attention(torch.device("cuda"), dtype) == attention


def test_the_comparison_of_speed_gives_both_models_the_same_attention():
    models = build_models(geometry("toy", "expanded"), 1, torch.device("cpu"), torch.float32)
    ours, peer = models[0].llm, models[1].model.language_model
    assert ours.config._attn_implementation == peer.config._attn_implementation == "expanded"


def test_lora_reads_its_inputs_in_half_precision_under_autocast(tiny, template):
    model, _, _ = tiny()
    model.llm.to(torch.bfloat16)
    model.add_lora(LoraConfig(r=4, target_modules=LORA_TARGETS))
    dtypes = set()
    for name, module in model.llm.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    ids = torch.tensor([template.encode_prompt([{"role": "user", "content": "Hi"}])])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.llm(ids).logits.float().sum().backward()
    assert dtypes == {torch.bfloat16}
    assert {parameter.grad.dtype for parameter in model.trainable_parameters().values()} == {torch.float32}


def test_logits_only_at_labels_change_no_gradient(step):
    rows = []

    def counted(model, batch):
        head = model.llm.get_output_embeddings()
        head.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
        rows.append((batch["labels"] != IGNORE_INDEX).sum().item())

    def everywhere(model, batch):
        def forward(input_ids, labels, pixel_values, attention_mask):
            embeds = model.embed(input_ids, pixel_values)
            logits = model.llm(inputs_embeds=embeds, attention_mask=attention_mask).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(),
                                                     ignore_index=IGNORE_INDEX, reduction="none")

        model.forward = forward

    assert_same(step(counted), step(everywhere))
    assert rows[0] == rows[1]  # the head computed one row for each label
