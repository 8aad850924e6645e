"""LoRA as a module of its own, compared with peft.

    python -m lessons.solutions.lora

The comparison uses r and alpha of stage 2 and no dropout, because two models draw different dropout masks.
"""

import torch
from peft import LoraConfig
from torch import nn

from data import collate
from lessons.toy_parts import PRESETS, load_datasets, load_model
from model import LORA_TARGETS, Llava
from support.errors import run_script


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update: h = W·x + (alpha / r) · B·A·x"""

    def __init__(self, linear, r, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r))  # zero: nothing changes at first
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)  # the bounds of nn.Linear, as in peft

    def forward(self, x):  # (B, T, in) -> (B, T, out)
        # (x · Aᵀ) · Bᵀ needs two small products. B·A would be a matrix as large as W.
        return self.linear(x) + self.scale * ((x @ self.lora_A.T) @ self.lora_B.T)


class OwnLoraLlava(Llava):
    """Replaces Llava.add_lora()."""

    def add_lora(self, config):
        for module in list(self.llm.modules()):  # a list, because the loop changes the modules
            for name, child in module.named_children():
                if name in config.target_modules:
                    setattr(module, name, LoraLinear(child, config.r, config.lora_alpha))


def main():
    settings = PRESETS[2]
    config = LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], lora_dropout=0.0,
                        target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    (peft_model, template), (own_model, _) = load_model(Llava), load_model(OwnLoraLlava)
    peft_model.add_lora(config)
    own_model.add_lora(config)
    # peft's names contain "base_model.model." and ".default.weight". Without them, the names are equal.
    names = {name: name.replace("base_model.model.", "").replace(".default.weight", "")
             for name in peft_model.trainable_parameters()}
    own = own_model.trainable_parameters()
    assert set(names.values()) == set(own), "the two adapters are not in the same layers"
    with torch.no_grad():
        for peft_name, parameter in peft_model.trainable_parameters().items():
            if ".lora_B." in peft_name:  # as long as B is zero, the gradient of A is zero
                parameter.normal_(std=0.02)
            own[names[peft_name]].copy_(parameter)

    train_dataset, _ = load_datasets(template, stage=2)
    batch = collate([train_dataset[i] for i in range(4)], template.pad_token_id)
    del batch["skipped"]
    losses = [model(**batch) for model in (peft_model, own_model)]  # (K,) each
    for each in losses:
        each.mean().backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    largest = 0.0
    for peft_name, parameter in peft_model.trainable_parameters().items():
        gradient = own[names[peft_name]].grad
        assert parameter.grad.norm() > 0
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
        largest = max(largest, (gradient - parameter.grad).abs().max().item())
    print(f"{len(own) // 2} layers, {sum(p.numel() for p in own.values()):,} trained parameters; largest "
          f"difference from peft: losses {(losses[1] - losses[0]).abs().max().item():.0e}, "
          f"gradients {largest:.0e}")


if __name__ == "__main__":
    run_script(main)
