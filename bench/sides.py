"""The two sides of the benchmark, ours and transformers' own Llava: the same weights, batches and loop.

What is compared is defined here: the three geometries, how long the texts are, how each side computes the
loss of a micro-batch, and the check that both compute the same. There is nothing to run in this file; see
bench.py.

    toy    the repository's toy world: seconds
    mid    a CLIP of the B/16 size and a Llama of 12 layers: 211 M parameters, runs on a CPU in minutes
    full   CLIP ViT-L/14 and TinyLlama-1.1B, for a GPU
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import IGNORE_INDEX, collate  # noqa: E402  (after the path)
from model import LORA_TARGETS, Llava, num_image_tokens  # noqa: E402

LORA_R = 16
CLIP = 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAD = 2  # Llama's end token, which is its padding too


# -- geometries --------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    vision: CLIPVisionConfig
    text: LlamaConfig

    @property
    def image_tokens(self):
        return num_image_tokens(self.vision)

    @property
    def image_id(self):
        """The id of an image position: the last word, which the random texts below never use."""
        return self.text.vocab_size - 1


def geometry(name):
    """(width, layers, heads, MLP, image, patch) of CLIP; (width, layers, heads, kv heads, MLP, words)."""
    clip, llm = {
        "toy": ((128, 4, 4, 512, 96, 32), (128, 4, 4, 4, 336, 615)),
        "mid": ((768, 12, 12, 3072, 224, 16), (768, 12, 12, 4, 2048, 32_000)),
        "full": ((1024, 24, 16, 4096, 224, 14), (2048, 22, 32, 4, 5632, 32_000)),
    }[name]
    vision = CLIPVisionConfig(
        hidden_size=clip[0],
        num_hidden_layers=clip[1],
        num_attention_heads=clip[2],
        intermediate_size=clip[3],
        image_size=clip[4],
        patch_size=clip[5],
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        hidden_size=llm[0],
        num_hidden_layers=llm[1],
        num_attention_heads=llm[2],
        num_key_value_heads=llm[3],
        intermediate_size=llm[4],
        vocab_size=llm[5],
        max_position_embeddings=2048,
    )
    return Geometry(vision, text)


# -- samples -----------------------------------------------------------------------------------------------


def draw_samples(shape, stage, count, rng):
    """Random samples, as ChatDataset gives them, with text as long as that of the stage's data set.

    Stage 1 is like CC3M: a prompt of a dozen tokens, and a caption of 5 to 30 words at 1.3 tokens each.
    Stage 2 is like LLaVA-Instruct-150K: 60 to 700 tokens, half of them below 220, in turns whose questions
    are a third of the text.
    """
    samples = []
    for _ in range(count):
        if stage == 1:
            turns = [(11, int(1.3 * rng.integers(5, 31)) + 1)]  # (question, answer), each with its end token
        else:
            left, turns = int(np.clip(rng.lognormal(np.log(220), 0.55), 60, 700)), []
            while left > 0:
                turn = min(left, int(rng.integers(40, 160)))
                question = max(8, int(turn * rng.uniform(0.25, 0.45)))
                turns.append((question, max(2, turn - question)))
                left -= turn
        samples.append(sample_of_turns(shape, turns, rng))
    return samples


def sample_of_turns(shape, turns, rng):
    """A sample of [(tokens of the question, tokens of the answer), …]; the image opens the first question."""
    ids, labels = [1], [IGNORE_INDEX]
    for i, (question, answer) in enumerate(turns):
        image = [shape.image_id] * shape.image_tokens if i == 0 else []
        asked = image + rng.integers(3, shape.image_id, question).tolist()
        said = rng.integers(3, shape.image_id, answer - 1).tolist() + [PAD]
        ids += asked + said
        labels += [IGNORE_INDEX] * len(asked) + said
    pixels = rng.standard_normal((3, shape.vision.image_size, shape.vision.image_size), dtype=np.float32)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.from_numpy(pixels)}


def micro_batches(samples, size, by_length=False):
    """A window's samples, cut into micro-batches; with by_length as our stages cut it (see Windows; it knows
    lengths only about, from the characters, which costs a little more padding than here)."""
    if by_length:
        samples = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
    return [collate(samples[i : i + size], PAD) for i in range(0, len(samples), size)]


def draw_prompts(shape, count, rng):
    """A batch of prompts to be answered: an image and a question of 10 to 30 tokens, padded on the left."""
    prompts = [sample_of_turns(shape, [(int(rng.integers(10, 31)), 1)], rng) for _ in range(count)]
    prompts = [{"input_ids": p["input_ids"][:-1], "pixel_values": p["pixel_values"]} for p in prompts]
    return collate(prompts, PAD, padding_side="left")


# -- the models --------------------------------------------------------------------------------------------


def lora_config(target_modules, dropout=0.05):
    return LoraConfig(
        r=LORA_R,
        lora_alpha=2 * LORA_R,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )


def build_ours(shape, stage, device, dtype):
    """Our model with random weights, as the stages prepare it."""
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):  # what is frozen is in dtype, what is trained in fp32
        vision = CLIPVisionModel._from_config(shape.vision, attn_implementation="sdpa")
        llm = LlamaForCausalLM._from_config(shape.text, attn_implementation="sdpa")
        model = Llava(vision, llm, shape.image_id)
    model.projector.float()
    if stage == 2:
        model.add_lora(lora_config(LORA_TARGETS))
        model.to(device)
    model.projector.requires_grad_(True)
    return model.train()


def build_peer(shape, stage, device, dtype):
    """transformers' Llava as a careful user prepares it: frozen but for projector and adapter."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=shape.vision,
        text_config=shape.text,
        image_token_index=shape.image_id,
        image_seq_length=shape.image_tokens,
        projector_hidden_act="linear",
    )
    with default_dtype(dtype), torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    projector = model.model.multi_modal_projector.float()
    projector.linear_2 = nn.Identity()  # its projector has two layers, ours one
    model.requires_grad_(False)
    if stage == 2:
        targets = rf".*language_model.*\.({'|'.join(LORA_TARGETS)})"  # CLIP has q_proj and v_proj as well
        model = get_peft_model(model, lora_config(targets))
        model.to(device)
    projector.requires_grad_(True)
    return model.train()


class default_dtype:
    """New parameters in `dtype`. (model.to(dtype) would round the rotary frequencies as well.)"""

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


def give_same_weights(ours, peer):
    """Copies our weights into the peer, and fills LoRA's B, which starts at zero, so that it counts."""
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    source = {plain_name(name): tensor for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            name = plain_name(name)
            if name in source:
                parameter.copy_(source.pop(name))
            elif not name.startswith("vision_tower."):  # our CLIP ends at the layer that is read
                raise ValueError(f"{name} of transformers' Llava has no counterpart in ours")
    left = [name for name in source if "position_ids" not in name and "inv_freq" not in name]
    if left:
        raise ValueError(f"{left[0]} of ours has no counterpart in transformers' Llava")


def plain_name(name):
    """One name for a parameter on both sides: vision_tower.…, projector.…, lm_head.…, else the LLM's own."""
    for prefix in ("base_model.model.", "llm.base_model.model.", "llm."):
        name = name.removeprefix(prefix)
    name = name.replace("multi_modal_projector.linear_1", "projector")
    for prefix in ("model.", "language_model."):
        name = name.removeprefix(prefix)
    return name


# -- the steps ---------------------------------------------------------------------------------------------


class Side:
    """One model with its optimizer. The loop is that of the two stages, and both sides run it."""

    def __init__(self, model, device, dtype):
        self.model, self.device, self.dtype = model, torch.device(device), dtype
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def step(self, batches):
        """One optimizer step over a window's micro-batches; returns the loss."""
        n = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            micro_loss = self.loss(batch, n)
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def loss(self, batch, n):
        """A micro-batch's share of the mean loss over the window's n supervised tokens."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(batch, n.to(self.device))


class Ours(Side):
    def forward(self, batch, n):
        return self.model(**batch).sum() / n


class Peer(Side):
    def forward(self, batch, n):
        # num_items_in_batch: what transformers' own Trainer gives it, so that accumulation is exact.
        return self.model(**batch, num_items_in_batch=n, use_cache=False).loss


def build_sides(shape, stage, device, dtype):
    """(ours, peer), with the same weights."""
    ours, peer = build_ours(shape, stage, device, dtype), build_peer(shape, stage, device, dtype)
    give_same_weights(ours, peer)
    return Ours(ours, device, dtype), Peer(peer, device, dtype)


def check_same(ours, peer, batch):
    """Stops the benchmark if both sides do not compute one loss and one gradient of the projector.

    With dropout off: each side draws its own.
    """
    n = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    losses, gradients = [], []
    for side in (ours, peer):
        side.model.eval()
        loss = side.loss(batch, n)
        side.scaler.scale(loss).backward()
        side.scaler.unscale_(side.optimizer)
        named = side.model.named_parameters()
        projector = [p.grad.flatten() for name, p in named if "projector" in name and p.requires_grad]
        losses.append(loss.item())
        gradients.append(torch.cat(projector).double())
        side.scaler.update()
        side.optimizer.zero_grad(set_to_none=True)
        side.model.train()
    bound = 1e-4 if ours.dtype == torch.float32 else 2e-2
    off = abs(losses[0] - losses[1]) / losses[1]
    gradient_off = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    if not (off <= bound and gradient_off <= 10 * bound):
        sys.exit(
            f"bench.py: the sides compute different things: loss {losses[0]:.6f} and {losses[1]:.6f}, "
            f"gradient of the projector off by {gradient_off:.1e}; there is nothing to compare"
        )
    return off, gradient_off
