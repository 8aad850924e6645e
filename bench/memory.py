"""How much memory does training take? Computed from the configurations, and checked against measurements.

    python bench/memory.py             the check on the mid geometry, fp32 (5 minutes on 2 cores); the table
    python bench/memory.py --table     the table alone: seconds, nothing is measured

The table is for the full geometry, CLIP ViT-L/14 and TinyLlama-1.1B, on a GPU: both stages, in half
precision, at the length of the longest samples of their data sets, so that a run which fits here does not
end on its thousandth step. It is computed, not measured; the check says how far the same function is off
where it can be measured, and fails above 15%.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sides import LORA_R, Ours, build_ours, geometry, micro_batches, sample_of_turns

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
CUDA_CONTEXT = 1.0  # GiB: CUDA's own, its libraries' workspaces, and what lies between the blocks
CARDS = {"16 GB": 16e9 / 2**30, "8 GB": 8e9 / 2**30}  # what a card is sold as, in GiB; a T4 reports 14.6


class Peak(NamedTuple):
    """Bytes at the moment of the highest need, in its parts."""

    frozen: float  # weights that do not change
    trained: float  # projector and adapter, with their gradients and Adam's two moments
    kept: float  # activations that the LLM's blocks keep for the backward pass
    passing: float  # what comes and goes on top of these: logits, or one block's backward pass

    @property
    def total(self):
        return sum(self)


def peak_bytes(shape, stage, batch, positions, labelled, precision, checkpointing, on_gpu=True):
    """Peak memory of a training step of ours.

    Args:
        batch: samples in the micro-batch. positions: of its longest, image included; the others are padded.
        labelled: positions with a label, of all samples together.
        checkpointing: of each block only the input is kept, and the rest computed once more.
    """
    vision, text = shape.vision, shape.text
    d, mlp, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    kv = text.num_key_value_heads * (d // text.num_attention_heads)
    c = BYTES[precision]  # of what is computed, and of frozen weights; what is trained is in fp32
    rows = batch * positions

    # The LLM: four matrices of attention, three of the MLP, embedding and head. CLIP: 12 · width² a block.
    linear = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, mlp), "up": (d, mlp)}
    linear["down"] = (mlp, d)
    llm = layers * sum(i * o for i, o in linear.values()) + 2 * text.vocab_size * d
    d_v = vision.hidden_size
    clip_block = 4 * d_v**2 + 2 * d_v * vision.intermediate_size
    clip = (vision.num_hidden_layers - 1) * clip_block + 3 * vision.patch_size**2 * d_v
    frozen = c * (llm + clip)

    adapter = layers * sum(LORA_R * (i + o) for i, o in linear.values())
    trained = (4 + 4 + 8) * (vision.hidden_size * d + (adapter if stage == 2 else 0))

    # What one block keeps for each position. CLIP keeps nothing: it runs under no_grad.
    block = 2 * 4 * d  # both norms keep what they are given, in fp32
    block += c * (2 * d + 2 * kv)  # attention: q and its result, k and v; no T×T scores (sdpa)
    block += c * 3 * mlp  # SwiGLU: gate, silu(gate), up. Frozen linear layers keep nothing
    if stage == 2:
        # A trained A needs its input for its gradient: with dropout, each of the seven has its own. Beside it
        # lies the mask: a byte for each element on a GPU, a whole float on a CPU.
        mask = 1 if on_gpu else 4
        block += sum((c + mask) * i + c * LORA_R for i, _ in linear.values())
    kept = rows * (layers * (c * d if checkpointing else block) + 4 * d)

    # On top of that, the larger of two moments. First, the loss: log-probabilities, their gradient, and that
    # of the logits, all in fp32. Then, backward through a block: gradients of the MLP's inner vectors, in
    # stage 2 also those that went through dropout; with checkpointing the block's own activations as well.
    loss = 3 * 4 * labelled * text.vocab_size
    backward = rows * (c * (3 * mlp + 2 * d) + (4 * mlp if stage == 2 else 0))
    if checkpointing:
        backward += rows * block
    return Peak(frozen, trained, kept, max(loss, backward))


# -- measuring ---------------------------------------------------------------------------------------------


def fresh_process_environment():
    """Environment of a process whose memory is to be measured: freed tensors go back to the system at once.

    glibc otherwise raises this threshold as it sees fit, and keeps what was freed below it.
    """
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def peak_rss():
    """The most bytes that this process had in memory (Linux; resource's figure includes the parent's)."""
    return _status("VmHWM")


def _status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def case(shape, stage):
    """Samples as long as the longest of the stage's data set: [(question, answer), …] of each."""
    if stage == 1:
        turns = [(12, 40)]
    else:
        turns = [(40, 75), (50, 90), (45, 85), (55, 95), (50, 115)]
    sample = sample_of_turns(shape, turns, np.random.default_rng(0))
    positions = len(sample["input_ids"])
    return sample, positions, sum(answer for _, answer in turns)


def measure(name, stage, batch, checkpointing):
    """Prints the peak over what the process had before, with the libraries loaded and warm."""
    small = geometry("toy")
    warm = Ours(build_ours(small, 2, "cpu", torch.float32), "cpu", torch.float32)
    warm.step(micro_batches([case(small, 1)[0]], 1))
    before = _status("VmRSS")

    shape = geometry(name)
    model = build_ours(shape, stage, "cpu", torch.float32)
    if checkpointing:
        model.checkpoint_activations()
    side = Ours(model, "cpu", torch.float32)
    side.step(micro_batches([case(shape, 1)[0]], 1))  # a small one: Adam's moments
    side.step(micro_batches([case(shape, stage)[0]] * batch, batch))
    print(peak_rss() - before)


def check(name, bound=0.15):
    """Prints measured and computed peaks; returns the largest deviation."""
    shape, worst = geometry(name), 0
    print(f"geometry {name}, fp32 on a CPU\n")
    print("| stage | micro-batch | checkpointing | measured, GiB | computed, GiB | off by |")
    print("|--|--|--|--|--|--|")
    for stage in (1, 2):
        _, positions, labelled = case(shape, stage)
        for batch in (1, 4):
            for checkpointing in (False, True):
                words = [name, stage, batch, int(checkpointing)]
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", *map(str, words)],
                    env=fresh_process_environment(),
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                measured = int(done.stdout.split()[-1])
                computed = peak_bytes(
                    shape, stage, batch, positions, batch * labelled, "fp32", checkpointing, on_gpu=False
                ).total
                off = computed / measured - 1
                worst = max(worst, abs(off))
                print(
                    f"| {stage} | {batch} | {'yes' if checkpointing else 'no'} | {measured / 2**30:.2f} | "
                    f"{computed / 2**30:.2f} | {off:+.0%} |",
                    flush=True,
                )
    print(f"\nlargest deviation {worst:.1%} (bound {bound:.0%})")
    return worst


def table():
    shape = geometry("full")
    print("\nfull geometry on a GPU, computed: GiB at the peak; weights: of it, what no batch changes\n")
    print("| stage | micro-batch | checkpointing | positions | fp16 / bf16 | weights | 16 GB | 8 GB |")
    print("|--|--|--|--|--|--|--|--|")
    for stage in (1, 2):
        _, positions, labelled = case(shape, stage)
        for batch in (1, 4, 16):
            for checkpointing in (False, True):
                # fp16 and bf16 need the same: fp16's loss scaler is one number.
                peak = peak_bytes(shape, stage, batch, positions, batch * labelled, "fp16", checkpointing)
                need = peak.total / 2**30
                fits = ["yes" if need + CUDA_CONTEXT <= size else "no" for size in CARDS.values()]
                print(
                    f"| {stage} | {batch} | {'yes' if checkpointing else 'no'} | {positions} | {need:.1f} | "
                    f"{(peak.frozen + peak.trained) / 2**30:.1f} | {' | '.join(fits)} |"
                )
    print(f"\nA setting fits if {CUDA_CONTEXT:.0f} GiB is left for CUDA itself.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="only the table")
    parser.add_argument("--geometry", choices=("toy", "mid"), default="mid", help="what is measured")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # used by check()
    args = parser.parse_args()
    if args.measure:
        name, stage, batch, checkpointing = args.measure
        return measure(name, int(stage), int(batch), bool(int(checkpointing)))
    worst = 0 if args.table else check(args.geometry)
    table()
    if worst > 0.15:
        sys.exit("the computed figures are off by more than 15%")


if __name__ == "__main__":
    main()
