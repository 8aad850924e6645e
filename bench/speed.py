"""Compares the speed of our training steps with that of transformers' own Llava.

    python -m bench.speed                                  mid geometry: up to 30 minutes on 2 CPU cores
    python -m bench.speed --quick                          fewer and smaller steps: up to 5 minutes
    python -m bench.speed --geometry smollm2-135m          CLIP ViT-B/32 and SmolLM2-135M, on a CPU
    python -m bench.speed --geometry full --device cuda    CLIP ViT-L/14 and TinyLlama-1.1B, on a GPU

"Ours" is Llava from model.py. "The peer" is LlavaForConditionalGeneration from transformers. Both get the
same weights, batches, attention kernel, precision, optimizer and training loop. First the script checks that
both compute the same loss and the same gradients, and stops if they do not.

In a pair, each side runs once. Every other pair has the reverse order, because the speed of a machine drifts.
The ratio is the median over the pairs (least–most) of the peer's time divided by ours, so above 1 ours is
faster. With "own batching", our micro-batches are sorted by length, as in the stages. (The stages estimate
the lengths, so they have slightly more padding.) The last column counts samples of the mean length, see
LENGTHS. On a busy machine, set the environment variable OMP_NUM_THREADS=1, because a thread that waits for
another one counts as busy.
"""

import argparse
import sys
import time
import warnings

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration)

from data import collate
from model import IGNORE_INDEX, LORA_TARGETS, Llava, count_patches
from support.devices import choose_attention, choose_device, choose_dtype

warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated")  # see support/errors.py
PAD = 2  # Llama's end token, which is its padding token too
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM")
# {stage: mean number of text tokens of a sample, of which labeled}, as in draw_sample()
LENGTHS = {1: (36, 24), 2: (250, 165)}

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
VIT_B_32 = (768, 12, 12, 3072), 224, 32
GEOMETRIES = {
    # name: SIZES of CLIP, its image and patch size; SIZES of the LLM, its key-value heads and vocabulary, and
    # whether its head and its embedding are the same matrix
    "toy": ((128, 4, 4, 512), 96, 32, (128, 4, 4, 336), 4, 615, False),  # the models in toy/
    "mid": ((768, 12, 12, 3072), 224, 16, (768, 12, 12, 2048), 4, 32_000, False),  # 211 M parameters
    "smollm2-135m": (*VIT_B_32, (576, 30, 9, 1536), 3, 49_152, True),
    "smollm2-360m": (*VIT_B_32, (960, 32, 15, 2560), 5, 49_152, True),
    "full": ((1024, 24, 16, 4096), 224, 14, (2048, 22, 32, 5632), 4, 32_000, False),  # the preset tinyllama
}


def geometry(name, attention=None):
    """Returns the LlavaConfig of a geometry, whose LLM uses `attention` (None: transformers' choice). The
    last token of the vocabulary marks the image positions."""
    clip, image_size, patch_size, llm, key_value_heads, vocabulary, tied = GEOMETRIES[name]
    vision = CLIPVisionConfig(**dict(zip(SIZES, clip)), image_size=image_size, patch_size=patch_size)
    text = LlamaConfig(**dict(zip(SIZES, llm)), num_key_value_heads=key_value_heads, vocab_size=vocabulary,
                       tie_word_embeddings=tied)
    return LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act="linear",
                       image_token_index=vocabulary - 1, image_seq_length=count_patches(vision),
                       attn_implementation={"text_config": attention})


def draw_sample(config, stage, rng):
    """Returns a sample of random tokens and pixels, of a length that we assume for the stage's real data.
    Stage 1: a prompt of 12 tokens, and a caption of 5 to 30 words with 1.3 tokens each. Stage 2: 60 to 700
    tokens with a median of 220, a third of them the question. (One turn costs as much as several.)"""
    question, answer = 11, int(1.3 * rng.integers(5, 31)) + 1
    if stage == 2:
        length = int(np.clip(rng.lognormal(np.log(220), 0.55), 60, 700))
        question, answer = length // 3, length - length // 3
    image_id, size = config.image_token_index, config.vision_config.image_size
    prompt = [1] + [image_id] * config.image_seq_length + rng.integers(3, image_id, question).tolist()
    reply = rng.integers(3, image_id, answer - 1).tolist() + [PAD]
    return {"input_ids": prompt + reply, "labels": [IGNORE_INDEX] * len(prompt) + reply,
            "pixel_values": torch.from_numpy(rng.standard_normal((3, size, size), dtype=np.float32))}


def make_batches(samples, size):
    """Returns the samples of one optimizer step in micro-batches."""
    batches = [collate(samples[i:i + size], PAD) for i in range(0, len(samples), size)]
    return [{name: batch[name] for name in batch if name != "skipped"} for batch in batches]


def build_models(config, stage, device, dtype):
    """Returns (our model, transformers' Llava) with the same random weights, prepared as in the stages."""
    peer = LlavaForConditionalGeneration(config).to(device, dtype).requires_grad_(False)
    projector = peer.model.multi_modal_projector.float()
    projector.linear_2 = nn.Identity()  # its projector has two layers, ours has one
    vision_tower, llm = CLIPVisionModel(config.vision_config), LlamaForCausalLM(config.text_config)
    for ours, theirs in ((vision_tower, peer.model.vision_tower), (llm.model, peer.model.language_model),
                         (llm.lm_head, peer.lm_head)):
        ours.load_state_dict(theirs.state_dict())
    model = Llava(vision_tower, llm, config.image_token_index).to(device, dtype)
    model.projector.float()
    if stage == 2:
        model.add_lora(LoraConfig(target_modules=LORA_TARGETS, **LORA))
        # The peer needs a pattern, because CLIP has layers called q_proj, too.
        pattern = rf".*language_model.*\.({'|'.join(LORA_TARGETS)})"
        peer = get_peft_model(peer, LoraConfig(target_modules=pattern, **LORA))
    model.projector.requires_grad_(True)
    projector.requires_grad_(True)
    for ours, theirs in zip(trained_parameters(model), trained_parameters(peer), strict=True):
        if not theirs.any():  # LoRA's B; while B is zero, A gets no gradient to compare
            nn.init.normal_(theirs, std=0.02)
        ours.data.copy_(theirs)
    return model, peer


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Side:
    """One model with its optimizer. Both sides run the training loop of the two stages."""

    def __init__(self, model, device, dtype):
        self.model, self.device, self.dtype = model.train(), device, dtype
        self.trained = trained_parameters(model)
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def loss(self, batch, n):
        """Returns the sum of a micro-batch's losses, divided by the n labeled tokens of the whole step."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if isinstance(self.model, Llava):
                return self.model(**batch).sum() / n
            # With num_items_in_batch the peer divides by n, too. transformers' Trainer does the same.
            return self.model(**batch, num_items_in_batch=n, use_cache=False).loss

    def step(self, batches):
        """Takes one optimizer step over a list of micro-batches, and returns its seconds. On a CPU these are
        seconds of CPU time per thread, because they hardly depend on what else runs."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        started = clock()
        n = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        for batch in batches:
            self.scaler.scale(self.loss(batch, n)).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the calls return before the GPU has finished
        return (clock() - started) / (torch.get_num_threads() if self.device.type == "cpu" else 1)


def check_equal(sides, batch):
    """Ends the process if the two sides compute different losses or gradients."""
    losses, gradients = [], []
    for side in sides:
        side.model.eval()  # without dropout, because each side would drop different elements
        losses.append(side.loss(batch, n=1))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses[-1], side.trained)]))
        side.model.train()
    loss_error = (losses[0] / losses[1] - 1).abs().item()
    gradient_error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    print(f"  relative difference of losses {loss_error:.1e}, of gradients {gradient_error:.1e}", flush=True)
    bound = 1e-4 if sides[0].dtype == torch.float32 else 2e-2
    if not (loss_error <= bound and gradient_error <= 10 * bound):
        sys.exit("speed.py: the two sides compute different things, so there is nothing to compare")


def compare(stage, config, device, dtype, plan):
    """Runs the pairs of a stage and yields its rows of the table."""
    rng = np.random.default_rng(stage)
    ours, peer = (Side(model, device, dtype) for model in build_models(config, stage, device, dtype))
    check_equal((ours, peer), make_batches([draw_sample(config, stage, rng) for _ in range(2)], 2)[0])
    size, samples_per_step, pairs = plan[stage]
    speeds = {"peer": [], "same batches": [], "own batching": []}  # tokens per second in each pair
    for pair in range(-1, pairs):  # pair -1 is the warm-up
        samples = [draw_sample(config, stage, rng) for _ in range(samples_per_step if pair >= 0 else 2)]
        by_length = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
        runs = list(zip(speeds, (peer, ours, ours), (samples, samples, by_length)))[:1 + stage]
        for name, side, ordered in runs[::-1 if pair % 2 else 1]:
            seconds = side.step(make_batches(ordered, size))
            speeds[name].append(sum(len(sample["input_ids"]) for sample in samples) / seconds)
        if pair >= 0:
            print("  tokens/s:", ", ".join(f"{name} {speeds[name][-1]:.3g}" for name, *_ in runs), flush=True)
    mean_length = 1 + config.image_seq_length + LENGTHS[stage][0]
    peer_speed, *our_speeds = (np.array(speeds[name][1:]) for name, *_ in runs)
    for (name, *_), speed in zip(runs[1:], our_speeds):
        ratios, median = speed / peer_speed, np.median(speed)
        yield (f"| stage {stage}, {name} | {np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f}) | "
               f"{median:.3g} / {np.median(peer_speed):.3g} | {median / mean_length:.2g} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="mid", help="sizes of the models")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps")
    args = parser.parse_args()
    device, dtype = args.device, choose_dtype("auto", args.device)
    config, rows = geometry(args.geometry, choose_attention(device, dtype)), []
    # {stage: (samples of a micro-batch, samples of a step, pairs)}. In the stages, a step has 128 samples.
    plan = ({1: (4, 4, 3), 2: (2, 4, 2)} if args.quick else {1: (4, 128, 12), 2: (2, 128, 3)}
            if device.type == "cuda" else {1: (4, 4, 12), 2: (4, 32, 3)})
    torch.manual_seed(0)
    print(f"geometry {args.geometry}, {dtype} on {device}, {torch.get_num_threads()} threads")
    for stage in (1, 2):
        print(f"stage {stage}", flush=True)
        rows += compare(stage, config, device, dtype, plan)
    print("\n| | ratio (least–most) | tokens/s, ours / the peer | samples/s, ours |\n|--|--|--|--|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
