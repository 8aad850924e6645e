"""Computes the peak memory of a training step on a GPU.

    python -m bench.memory            checks the computation (10 minutes on 2 CPU cores), then prints the table
    python -m bench.memory --table    prints the table for CLIP ViT-L/14 and TinyLlama-1.1B in fp16 or bf16

The samples are as long as the longest of the real data, so that a run which starts does not run out of memory
later. The table is computed, not measured. The check measures steps of a smaller model on the CPU in fp32
(Linux only). It fails if the same computation differs from one of them by more than 15%.

The table has two cases. TinyLlama has fewer key-value heads than heads. Before version 2.14, PyTorch has two
CUDA kernels for such attention. Flash attention needs Linux and an A100, an RTX 30xx or a later GPU. On a T4,
on an RTX 20xx and on Windows there is only the math kernel, which keeps all T×T attention weights in fp32.
"""

import argparse
import sys
from contextlib import nullcontext
from itertools import product

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.speed import (LORA, Side, call_in_new_process, geometry, make_batches, process_memory,
                         sample_of_turns)

GIB = 2**30
LONGEST = {1: (12, 40), 2: (240, 460)}  # {stage: tokens of all questions and of all answers of a sample}
CUDA_CONTEXT = 1.0  # GiB for CUDA itself, its libraries, and gaps between tensors
CARDS = {"8 GB": 7.4, "16 GB": 14.6, "24 GB": 22.3}  # GiB that PyTorch finds at least (14.6 on a T4)


def peak_bytes(config, stage, batch, recompute, flash, size, on_gpu):
    """Returns the peak memory of one of our training steps, in bytes.

    Args: batch: samples in the micro-batch, all of LONGEST length. recompute: --activation-checkpointing.
    flash: False for the math kernel. size: bytes of a number in frozen weights and in matrix products."""
    vision, text, rank = config.vision_config, config.text_config, LORA["r"]
    d_v, d, mlp, layers = vision.hidden_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers
    heads, kv = text.num_attention_heads, text.num_key_value_heads * text.head_dim
    tokens = 1 + config.image_seq_length + sum(LONGEST[stage])

    # (inputs, outputs) of q, k, v, o, gate, up and down
    linear = [(d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)]
    llm = layers * sum(i * o for i, o in linear) + 2 * text.vocab_size * d  # with embedding and head
    clip = (vision.num_hidden_layers - 1) * (4 * d_v**2 + 2 * d_v * vision.intermediate_size)
    trained = d_v * d + (layers * sum(rank * (i + o) for i, o in linear) if stage == 2 else 0)
    weights = size * (llm + clip) + 4 * 4 * trained  # in fp32: weight, gradient, Adam's two moments

    # Next, what a block keeps for the backward pass, in bytes per token. A frozen linear layer keeps nothing,
    # and neither does CLIP, because it runs without gradients.
    block = 2 * 4 * d  # the inputs of both norms, in fp32
    block += size * 3 * mlp  # gate, silu(gate) and up
    # Attention keeps q, k, v and its output. The math kernel keeps q, k, v of every head and the attention
    # weights, in fp32.
    block += size * (2 * d + 2 * kv) if flash else 4 * (3 * d + heads * tokens)
    if stage == 2:  # LoRA keeps the inputs of A and B, and the mask of dropout (on a CPU a float per element)
        block += sum((size + (1 if on_gpu else 4)) * i + size * rank for i, _ in linear)
    kept = layers * (size * d if recompute else block) + 4 * d

    # The peak is at the loss or in the backward pass of a block, whichever needs more in addition.
    loss = 3 * 4 * batch * LONGEST[stage][1] * text.vocab_size  # log-probabilities and two gradients
    backward = size * (3 * mlp + 2 * d) + (4 * mlp if stage == 2 else 0)  # gradients in the MLP
    if not flash:
        backward = max(backward, 2 * 4 * heads * tokens)  # gradients of attention weights and scores
    if recompute:
        backward += block
    return weights + batch * tokens * kept + max(loss, batch * tokens * backward)


def measure(stage, batch, recompute, flash):
    """Returns the peak memory of a training step at mid geometry on the CPU, in bytes, without what the
    process needed before (the libraries, and a step of a small model)."""
    def step(side, config, stage, count):
        sample = sample_of_turns(config, [LONGEST[stage]], np.random.default_rng(0))
        side.step(make_batches([sample] * count, count))

    cpu, small, config = torch.device("cpu"), geometry("toy"), geometry("mid")
    step(Side("ours", small, 2, cpu, torch.float32), small, 1, 1)
    before = process_memory("VmRSS")
    side = Side("ours", config, stage, cpu, torch.float32)
    if recompute:
        side.model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    with nullcontext() if flash else sdpa_kernel(SDPBackend.MATH):
        step(side, config, 1, 1)  # creates Adam's moments
        step(side, config, stage, batch)
    return process_memory("VmHWM") - before


def check():
    """Prints measured and computed peaks. Returns the largest relative difference."""
    largest = 0
    print("stage  micro-batch  checkpointing  attention  measured, GiB  computed, GiB")
    for setting in product((1, 2), (1, 4), (False, True), (True, False)):
        measured = call_in_new_process(measure, *setting)
        computed = peak_bytes(geometry("mid"), *setting, size=4, on_gpu=False)
        stage, batch, recompute, flash = setting
        print(f"{stage:>5}  {batch:>11}  {'yes' if recompute else 'no':>13}  {'flash' if flash else 'math':>9}  "
              f"{measured / GIB:>13.2f}  {computed / GIB:>6.2f} ({computed / measured - 1:+.0%})", flush=True)
        largest = max(largest, abs(computed / measured - 1))
    print(f"largest difference {largest:.1%}\n")
    return largest


def print_table():
    print("peak in GiB, computed (in brackets the smallest card that has it)\n\n| stage | micro-batch | checkpointing "
          "| flash attention | without: T4, RTX 20xx, Windows |\n|--|--|--|--|--|")
    for stage, batch, recompute in product((1, 2), (1, 2, 4, 16), (False, True)):
        cells = []
        for flash in (True, False):
            peak = peak_bytes(geometry("full"), stage, batch, recompute, flash, size=2, on_gpu=True) / GIB
            card = next((name for name, gib in CARDS.items() if peak + CUDA_CONTEXT <= gib), "larger")
            cells.append(f"{peak:.1f} ({card})")
        print(f"| {stage} | {batch} | {'yes' if recompute else 'no'} | {' | '.join(cells)} |")
    print(f"\nA card has enough memory if {CUDA_CONTEXT:.0f} GiB is left for CUDA itself.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table without checking it")
    largest = 0 if parser.parse_args().table else check()
    print_table()
    if largest > 0.15:
        sys.exit("memory.py: computed and measured memory differ by more than 15%")


if __name__ == "__main__":
    main()
