"""Computes the peak memory of a training step on a GPU.

    python -m bench.memory --table    a table for CLIP ViT-L/14 and TinyLlama-1.1B in fp16 or bf16
    python -m bench.memory            also checks the computation, about 10 minutes on 2 CPU cores

All samples of a micro-batch are equally long. The table is not measured. The check measures steps of a
smaller model on the CPU (fp32, Linux only), and fails if a computed peak is off by more than 15%.

The table has two cases. On GPUs without flash attention (a T4, an RTX 20xx, any GPU under Windows) every head
of TinyLlama gets its own copy of its keys and values; expanded_attention() in support/devices.py says why.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import support.devices  # registers the attention "expanded"
from bench.speed import LORA, Side, build_ours, geometry, make_batches, random_sample

GIB = 2**30
# {stage: numbers of text tokens, and the fraction of them that are answers}. Nobody has measured the longest
# samples of LLaVA's data.
TEXTS = {1: ((52, 200, 1024), 0.8), 2: ((350, 700, 1024), 2 / 3)}
CUDA_CONTEXT = 1.0  # GiB for CUDA itself, its libraries, and gaps between tensors
CARDS = {"8 GB": 7.4, "16 GB": 14.6, "24 GB": 22.3}  # GiB that PyTorch finds at least (14.6 on a T4)


def peak_bytes(config, stage, text_tokens, batch, recompute, flash, size, on_gpu):
    """Returns the peak memory of one of our training steps, in bytes.

    Args: text_tokens: of each sample. batch: samples in the micro-batch. recompute:
    --activation-checkpointing. flash: False for expanded_attention(). size: bytes of a number in frozen
    weights and matrix products."""
    vision, text, rank = config.vision_config, config.text_config, LORA["r"]
    d_v, d, mlp, layers = vision.hidden_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers
    heads, kv = text.num_attention_heads, text.num_key_value_heads * text.head_dim
    tokens = 1 + config.image_seq_length + text_tokens
    # (inputs, outputs) of q, k, v, o, gate, up and down
    linear = [(d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)]
    llm = layers * sum(i * o for i, o in linear) + 2 * text.vocab_size * d  # with embedding and head
    clip = (vision.num_hidden_layers - 1) * (4 * d_v**2 + 2 * d_v * vision.intermediate_size)
    trained = d_v * d + (layers * sum(rank * (i + o) for i, o in linear) if stage == 2 else 0)
    weights = size * (llm + clip) + 4 * 4 * trained  # in fp32: weight, gradient, Adam's two moments

    # Bytes per token that a block keeps for the backward pass. Frozen linear layers and CLIP keep nothing.
    block = 2 * 4 * d  # the inputs of both norms, in fp32
    block += size * 3 * mlp  # gate, silu(gate) and up
    # Attention keeps q, k, v and the output, and a sum in fp32 per head. Expanded, k and v are as wide as q.
    block += size * (2 * d + 2 * (kv if flash else d)) + 4 * heads
    if stage == 2:  # LoRA keeps the inputs of A and B, and dropout its mask (on a CPU a float per element)
        block += sum((size + (1 if on_gpu else 4)) * i + size * rank for i, _ in linear)
    kept = layers * (size * d if recompute else block) + 4 * d

    # On top of that comes the loss or the backward pass of one block, whichever needs more.
    answers = text_tokens * TEXTS[stage][1]
    loss = 3 * 4 * batch * answers * text.vocab_size  # log-probabilities and two gradients
    mlp_backward = size * (3 * mlp + 2 * d) + (4 * mlp if stage == 2 else 0)
    backward = mlp_backward + (block if recompute else 0)
    return weights + batch * tokens * kept + max(loss, batch * tokens * backward)


def call_in_new_process(function, *args):
    """Returns function(*args), called in a new process, so that its peak memory can be measured there."""
    # Without these, glibc keeps freed tensors, and they count as used memory.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**20)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def process_memory(field):
    """Returns the memory of this process in bytes: of now ("VmRSS") or the peak ("VmHWM"). Linux only."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(stage, text_tokens, batch, recompute, flash):
    """Returns the peak memory of a training step (mid geometry, CPU) in bytes, without the libraries."""
    def step(side, config, stage, count):
        answers = round(text_tokens * TEXTS[stage][1])
        sample = random_sample(config, text_tokens - answers, answers, np.random.default_rng(0))
        side.step(make_batches([sample] * count, count))

    settings, small, config = (torch.device("cpu"), torch.float32), geometry("toy"), geometry("mid")
    step(Side(build_ours, small, 2, *settings), small, 1, 1)  # loads the libraries
    before = process_memory("VmRSS")
    side = Side(build_ours, config, stage, *settings)
    if recompute:
        side.model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    if not flash:
        side.model.llm.set_attn_implementation("expanded")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # never the math kernel, which keeps T×T attention weights
        step(side, config, 1, 1)  # creates Adam's moments
        step(side, config, stage, batch)
    return process_memory("VmHWM") - before


def check():
    """Prints computed and measured peaks, and returns the largest relative difference."""
    largest = 0
    for stage, batch, recompute, flash in product((1, 2), (1, 4), (False, True), (True, False)):
        case = stage, {1: 52, 2: 700}[stage], batch, recompute, flash
        measured = call_in_new_process(measure, *case)
        computed = peak_bytes(geometry("mid"), *case, size=4, on_gpu=False)
        largest = max(largest, abs(computed / measured - 1))
        print(f"stage {stage}, micro-batch {batch}, {'shared' if flash else 'copied'} keys and values"
              f"{', checkpointing' * recompute}: measured {measured / GIB:.2f} GiB, computed "
              f"{computed / GIB:.2f} GiB ({computed / measured - 1:+.1%})", flush=True)
    return largest


def print_table():
    print(f"\nComputed peak in GiB, and the smallest card that has {CUDA_CONTEXT:.0f} GiB more for CUDA\n\n"
          "| stage | text tokens | micro-batch | checkpointing | flash attention | without: T4, RTX 20xx, "
          "Windows |\n|--|--|--|--|--|--|")
    for stage in (1, 2):
        for text_tokens, batch, recompute in product(TEXTS[stage][0], (1, 2, 4, 8, 16), (False, True)):
            print(f"| {stage} | {text_tokens:,} | {batch} | {'yes' if recompute else 'no'} |", end="")
            for flash in (True, False):
                case = stage, text_tokens, batch, recompute, flash
                peak = peak_bytes(geometry("full"), *case, size=2, on_gpu=True) / GIB
                card = next((name for name, gib in CARDS.items() if peak + CUDA_CONTEXT <= gib), "larger")
                print(f" {peak:.1f} ({card}) |", end="" if flash else "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="without the check")
    largest = 0 if parser.parse_args().table else check()
    print_table()
    if largest > 0.15:
        sys.exit(f"memory.py: the largest difference between computed and measured memory is {largest:.0%}")


if __name__ == "__main__":
    main()
