"""Computes the peak memory of a training step on a GPU, and how long the stages take there.

    python -m bench.memory                            CLIP ViT-L/14 and TinyLlama-1.1B, in fp16 or bf16
    python -m bench.memory --geometry smollm2-135m    CLIP ViT-B/32 and SmolLM2-135M; also smollm2-360m

The tables are not measured. In the table of memory, all samples of a micro-batch are equally long. On GPUs
without flash attention, expanded_attention() in support/devices.py needs more memory and says why.

The hours are samples · operations / (peak rate · utilization), see CARDS. A multiplication and an addition
are two operations. Per sample, with P positions in CLIP and T in the LLM, K of them labeled:

    language model    4 · weights · T                         forward, and backward to the activations only,
                                                              because frozen weights get no gradient
    attention         6 · width · T² · blocks                 causal: half of the T×T scores
    LoRA (stage 2)    6 · weights of A and B · T              forward, and backward to activations and weights
    head              4 · width · vocabulary · K
    CLIP              2 · weights · P + 4 · width · P² · blocks          forward only

T, K and the utilization are assumptions. Loading data, evaluations and checkpoints are not counted. With the
small models, a GPU waits for Python and for images, so their hours are a lower bound.
"""

import argparse
from itertools import product

from bench.speed import GEOMETRIES, LENGTHS, LORA, geometry

GIB = 2**30
# {stage: numbers of text tokens, and the fraction of them that are answers}. Nobody has measured the longest
# samples of LLaVA's data. The preset tinyllama cuts them to 1,791 text tokens.
TEXTS = {1: ((52, 200, 1024, 1791), 0.8), 2: ((700, 1024, 1791), 2 / 3)}
# GiB that PyTorch finds at least, on a T4 for example 14.6.
MEMORIES = {"8 GB": 7.4, "12 GB": 11.6, "16 GB": 14.6, "24 GB": 22.3}
# A step needs more than its tensors. CUDA and its libraries take 0.3 to 0.5 GiB, and PyTorch's allocator
# leaves gaps between tensors. In a replay of all allocations of a stage-2 run with varying lengths, it held
# 9% more than the tensors. Together that is 1.4 GiB at a peak of 10 GiB.
CUDA_CONTEXT, GAPS = 0.5, 1.09

SAMPLES = {1: 595_375, 2: 157_712}
# {card: (peak rate, utilization)}. The rate is that of dense matrix products of fp16 numbers that are added
# up in fp32, as PyTorch does by default, in 10¹² operations per second. The numbers are from NVIDIA's data
# sheets and white papers. That of the RTX 3060 is computed: 112 tensor cores · 128 operations · 1.78 GHz.
# (GeForce cards are twice as fast if they add up in fp16. Their advertisements often name that number.)
# The utilization is the fraction of it that a training reaches. It was estimated from the matrix products and
# from the bytes that all other kernels move, and can be wrong by a factor of two.
CARDS = {"T4": (65, 0.22), "RTX 3060": (25.5, 0.5), "RTX 3090": (71, 0.5), "RTX 4090": (165, 0.4)}


def linear_layers(text):
    """Returns the (inputs, outputs) of q, k, v, o, gate, up and down of one block of the LLM."""
    d, kv, mlp = text.hidden_size, text.num_key_value_heads * text.head_dim, text.intermediate_size
    return [(d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)]


def peak_bytes(config, stage, text_tokens, batch, recompute, flash, size):
    """Returns the peak memory of one of our training steps, in bytes.

    Args: text_tokens: of each sample. recompute: --activation-checkpointing. flash: False for
    expanded_attention(). size: bytes of a number in frozen weights and matrix products."""
    vision, text, rank = config.vision_config, config.text_config, LORA["r"]
    d_v, d, mlp, layers = vision.hidden_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers
    heads, kv = text.num_attention_heads, text.num_key_value_heads * text.head_dim
    tokens, linear = 1 + config.image_seq_length + text_tokens, linear_layers(text)
    tables = 1 if text.tie_word_embeddings else 2  # embedding and head, which are one matrix if they are tied
    llm = layers * sum(i * o for i, o in linear) + tables * text.vocab_size * d
    clip = (vision.num_hidden_layers - 1) * (4 * d_v**2 + 2 * d_v * vision.intermediate_size)
    trained = d_v * d + (layers * sum(rank * (i + o) for i, o in linear) if stage == 2 else 0)
    weights = size * (llm + clip) + 4 * 4 * trained  # in fp32: weight, gradient, Adam's two moments

    # Bytes per token that a block keeps for the backward pass. Frozen linear layers and CLIP keep nothing.
    block = 2 * 4 * d  # the inputs of both norms, in fp32
    block += size * 3 * mlp  # gate, silu(gate) and up
    # Attention keeps q, k, v and the output, and a sum in fp32 per head. Expanded, k and v are as wide as q.
    block += size * (2 * d + 2 * (kv if flash else d)) + 4 * heads
    if stage == 2:  # LoRA keeps the inputs of A and B, and dropout its mask
        block += sum((size + 1) * i + size * rank for i, _ in linear)
    kept = layers * (size * d if recompute else block) + 4 * d

    # On top of that comes the loss or the backward pass of one block, whichever needs more.
    answers = text_tokens * TEXTS[stage][1]
    loss = 3 * 4 * batch * answers * text.vocab_size  # log-probabilities and two gradients
    mlp_backward = size * (3 * mlp + 2 * d) + (4 * mlp if stage == 2 else 0)
    backward = mlp_backward + (block if recompute else 0)
    return weights + batch * tokens * kept + max(loss, batch * tokens * backward)


def print_memory(config):
    print(f"Computed peak in GiB, and the smallest card that has {GAPS - 1:.0%} and {CUDA_CONTEXT} GiB more"
          "\n\n| stage | text tokens | micro-batch | checkpointing | flash attention "
          "| without: T4, RTX 20xx, Windows |\n|--|--|--|--|--|--|")
    for stage in (1, 2):
        for text_tokens, batch, recompute in product(TEXTS[stage][0], (1, 2, 4, 16), (False, True)):
            print(f"| {stage} | {text_tokens:,} | {batch} | {'yes' if recompute else 'no'} |", end="")
            for flash in (True, False):
                peak = peak_bytes(config, stage, text_tokens, batch, recompute, flash, size=2) / GIB
                needed = GAPS * peak + CUDA_CONTEXT
                card = next((name for name, gib in MEMORIES.items() if needed <= gib), "larger")
                print(f" {peak:.1f} ({card}) |", end="" if flash else "\n")


def operations(config, stage):
    """Returns the number of operations of one sample of a stage: forward and backward pass."""
    text_tokens, labeled = LENGTHS[stage]
    clip, llm, linear = config.vision_config, config.text_config, linear_layers(config.text_config)
    d, blocks, patches = llm.hidden_size, llm.num_hidden_layers, 1 + config.image_seq_length
    positions = patches + text_tokens
    total = 4 * positions * blocks * sum(i * o for i, o in linear)
    total += 6 * d * positions**2 * blocks + 4 * d * llm.vocab_size * labeled
    if stage == 2:
        total += 6 * positions * blocks * sum(LORA["r"] * (i + o) for i, o in linear)
    block = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
    return total + (clip.num_hidden_layers - 1) * (2 * block * patches + 4 * clip.hidden_size * patches**2)


def print_hours(config):
    print(f"\n| computed hours | operations per sample | samples | {' | '.join(CARDS)} |\n"
          f"|{'--|' * (3 + len(CARDS))}\n"
          f"| utilization | | | {' | '.join(str(utilization) for _, utilization in CARDS.values())} |")
    for stage, samples in ((1, SAMPLES[1]), (2, SAMPLES[2]), (1, 20_000), (2, 20_000)):
        each = operations(config, stage)
        hours = (each * samples / (tera * 1e12 * utilization) / 3600 for tera, utilization in CARDS.values())
        print(f"| stage {stage} | {each / 1e12:.2g} · 10¹² | {samples:,} | "
              + " | ".join(f"{value:.2g}" for value in hours) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="full", help="sizes of the models")
    config = geometry(parser.parse_args().geometry)
    print_memory(config)
    print_hours(config)


if __name__ == "__main__":
    main()
