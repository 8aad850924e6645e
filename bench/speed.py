"""How fast are our steps? Ours and transformers' own Llava, by turns.

    python bench/bench.py                                  the mid geometry: half an hour on 2 CPU cores
    python bench/bench.py --quick --json bench.json        the first four sections with fewer and smaller
                                                           steps, for a first impression: 5 minutes
    python bench/bench.py --geometry full --device cuda    on a GPU, in bf16 if it has it
    python bench/bench.py --geometry full --only stage1 stage2    on a CPU: one step of one sample, 10 min
    python bench/bench.py --only stage2                    one section of: stage1 stage2 generate memory
                                                           loader scaling

Same weights, batches, precision, optimizer and loop on both sides; that they compute the same loss and the
same gradient is checked before anything is timed. One optimizer step of each side after the other, in
changing order, makes a pair; a ratio is the median over the pairs, and above 1 ours is faster.

    same batch    on the very same micro-batches
    own batch     ours cuts the same samples into micro-batches of similar length; the peer as they come
    cached        with image features kept from an earlier epoch; the peer cannot keep them
    utilisation   what a step cannot avoid computing (cost.py), per second, over the matmul rate measured in
                  between: 1 would be a step that does nothing in vain, at the speed of one large product
    memory        peak of ours over the peer's: of the GPU's memory, or of the whole process on a CPU, each
                  side in a process of its own

On a CPU, run it alone: a step that shares its cores with other programs waits for the slowest thread, and a
ratio of two such steps means nothing. The matmul rate is measured before every step; where the largest is
more than 1.5 times the least, the table says that the run was disturbed.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cost import matmul_rate, timed, unavoidable_flops
from memory import fresh_process_environment, peak_rss
from sides import DTYPES, IGNORE_INDEX, ROOT, Ours, Peer
from sides import build_ours, build_peer, build_sides, check_same
from sides import draw_prompts, draw_samples, geometry, micro_batches

from plumbing import pick_device, pick_precision  # from the repository's root, which sides.py makes known

SECTIONS = ("stage1", "stage2", "generate", "memory", "loader", "scaling")
NEW_TOKENS = 64


def spread(values):
    """Median, least and largest, and of how many."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "pairs": len(values),
    }


# -- training ----------------------------------------------------------------------------------------------


def train(args, shape, stage):
    """One stage's steps by turns: ours and the peer's on the same batches, and ours as only ours can."""
    rng = np.random.default_rng(stage)
    ours, peer = build_sides(shape, stage, args.device, args.dtype)
    size, window = args.batch_size[stage], args.window[stage]
    off, gradient_off = check_same(ours, peer, micro_batches(draw_samples(shape, stage, 2, rng), 2)[0])
    print(f"  same loss (off by {off:.0e}), same gradient (off by {gradient_off:.0e})", flush=True)
    warm_up = micro_batches(draw_samples(shape, stage, 2, rng), size)
    for side in (ours, peer):
        side.step(warm_up)

    seconds, rates, used, tokens = {"ours": [], "peer": [], "alone": []}, [], [], 0
    for pair in range(args.pairs[f"stage{stage}"]):
        samples = draw_samples(shape, stage, window, rng)
        same = micro_batches(samples, size)
        if stage == 1:  # what only ours can do: here, to skip CLIP; in stage 2, to sort by length
            alone = [dict(batch, pixel_values=features(ours, batch["pixel_values"])) for batch in same]
        else:
            alone = micro_batches(samples, size, by_length=True)
        # All three on the way there, and on the way back in the next pair: the machine's speed drifts.
        turns = [("ours", ours, same), ("peer", peer, same), ("alone", ours, alone)]
        for name, side, batches in turns[:: 1 if pair % 2 == 0 else -1]:
            rates.append(matmul_rate(args.device, args.dtype))
            seconds[name].append(timed(lambda: side.step(batches), args.device)[0])
        lengths = [(len(s["input_ids"]), sum(l != IGNORE_INDEX for l in s["labels"])) for s in samples]
        # The step as the stages take it: in stage 1 with CLIP, in stage 2 sorted by length. Its rate is held
        # against this pair's own matmuls.
        step = seconds["ours" if stage == 1 else "alone"][-1]
        used.append(unavoidable_flops(shape, lengths, stage) / step / statistics.median(rates[-3:]))
        tokens += sum(labelled for _, labelled in lengths)
        print(
            f"  pair {pair + 1}: ours {seconds['ours'][-1]:.2f} s, the peer {seconds['peer'][-1]:.2f} s, "
            f"ours {'cached' if stage == 1 else 'by length'} {seconds['alone'][-1]:.2f} s",
            flush=True,
        )

    def ratios(name):
        return spread([theirs / mine for theirs, mine in zip(seconds["peer"], seconds[name])])

    samples_total = window * len(used)
    return {
        "same_batch_ratio": ratios("ours"),
        "cached_ratio" if stage == 1 else "own_batch_ratio": ratios("alone"),
        "utilisation": spread(used),
        "matmul_gflops": spread([rate / 1e9 for rate in rates]),
        "disturbed": max(rates) > 1.5 * min(rates),
        "samples_per_s": {name: samples_total / sum(times) for name, times in seconds.items()},
        "tokens_per_s": {name: tokens / sum(times) for name, times in seconds.items()},
        "window": window,
        "batch_size": size,
    }


def features(ours, pixel_values):
    """Image features as they are kept on disk, in the encoder's type. Reading them is not part of what is
    timed: it is the loader's work, as decoding pictures is."""
    return ours.model.clip_features(pixel_values.to(ours.device)).cpu()


# -- generation --------------------------------------------------------------------------------------------


def generate(args, shape):
    """Greedy answers of 64 tokens to 16 prompts: ours as load() leaves it, the adapter merged into the LLM;
    the peer with its adapter in place, as training leaves it, and merged as well."""
    rng = np.random.default_rng(3)
    ours, peer = (side.model.eval() for side in build_sides(shape, 2, args.device, args.dtype))
    ours.llm = ours.llm.merge_and_unload()
    models = {"ours": ours, "peer": peer, "merged": copy.deepcopy(peer).merge_and_unload()}

    def run(name, batch, new_tokens):
        # An end token that is not drawn at random, so that all answers are of one length.
        if name == "ours":
            return ours.generate(**batch, end_token_ids=[shape.image_id], max_new_tokens=new_tokens)
        ids = models[name].generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=shape.image_id,
            pad_token_id=shape.image_id,
        )
        return ids[:, batch["input_ids"].shape[1] :]

    seconds, agree = {name: [] for name in models}, 1.0
    with torch.no_grad():
        warm_up = on_device(draw_prompts(shape, 2, rng), args)
        for name in models:
            run(name, warm_up, 4)
        for pair in range(args.pairs["generate"]):
            batch, said = on_device(draw_prompts(shape, 16, rng), args), {}
            for name in list(models)[:: 1 if pair % 2 == 0 else -1]:
                taken, said[name] = timed(lambda: run(name, batch, NEW_TOKENS), args.device)
                seconds[name].append(taken)
                if said[name].shape[1] != NEW_TOKENS:
                    sys.exit(f"bench.py: {name} said {said[name].shape[1]} tokens, not {NEW_TOKENS}")
            agree = min(agree, (said["ours"] == said["merged"]).float().mean().item())
            print(
                f"  pair {pair + 1}: ours {seconds['ours'][-1]:.2f} s, the peer {seconds['peer'][-1]:.2f} s, "
                f"merged {seconds['merged'][-1]:.2f} s; {agree:.0%} of the tokens are the same",
                flush=True,
            )
    if args.dtype == torch.float32 and agree < 0.9:
        sys.exit(f"bench.py: the sides generate different answers ({agree:.0%} of the tokens agree)")
    return {
        "ratio": spread([theirs / mine for theirs, mine in zip(seconds["peer"], seconds["ours"])]),
        "ratio_merged": spread([theirs / mine for theirs, mine in zip(seconds["merged"], seconds["ours"])]),
        "tokens_per_s": {name: 16 * NEW_TOKENS * len(t) / sum(t) for name, t in seconds.items()},
        "agree": agree,
    }


def on_device(batch, args):
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


# -- memory ------------------------------------------------------------------------------------------------


def memory(args):
    """Peak memory of each side in each stage, each in its process, at the tinyllama preset's batches."""
    result = {}
    for stage, batch_size in args.batch_size.items() if args.quick else ((1, 16), (2, 4)):
        peaks = {name: child(args, stage, name, batch_size) for name in ("ours", "peer")}
        result[f"stage{stage}"] = {
            "ratio": peaks["ours"] / peaks["peer"],
            "gib": {name: peak / 2**30 for name, peak in peaks.items()},
            "batch_size": batch_size,
        }
        print(
            f"  stage {stage}, micro-batch {batch_size}: ours {peaks['ours'] / 2**30:.2f} GiB, "
            f"the peer {peaks['peer'] / 2**30:.2f} GiB",
            flush=True,
        )
    return result


def child(args, stage, name, batch_size):
    """Peak bytes of one side, measured by this script in another process (see measure_peak())."""
    words = ["--geometry", args.geometry, "--device", args.device, "--precision", args.precision]
    done = subprocess.run(
        [sys.executable, __file__, *words, "--peak-of", name, str(stage), str(batch_size)],
        env=fresh_process_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"bench.py: measuring the memory of {name} in stage {stage} failed")
    return int(done.stdout.split()[-1])


def measure_peak(args, shape):
    """Prints the peak of one side after two steps: a small one, which makes Adam's moments, and a real one.

    The same batch for every side: the first that the stage's seed draws.
    """
    name, stage, batch_size = args.peak_of[0], int(args.peak_of[1]), int(args.peak_of[2])
    rng = np.random.default_rng(stage)
    build, side_class = {"ours": (build_ours, Ours), "peer": (build_peer, Peer)}[name]
    side = side_class(build(shape, stage, args.device, args.dtype), args.device, args.dtype)
    side.step(micro_batches(draw_samples(shape, 1, 1, rng), 1))
    side.step(micro_batches(draw_samples(shape, stage, batch_size, rng), batch_size))
    on_gpu = torch.device(args.device).type == "cuda"
    print(torch.cuda.max_memory_allocated(args.device) if on_gpu else peak_rss())


# -- the table ---------------------------------------------------------------------------------------------


def summary(result):
    """The JSON's keys that a bar is set for."""
    keys = {}
    for stage in ("stage1", "stage2"):
        if stage in result:
            keys[stage] = result[stage]
            keys.setdefault("utilisation", {})[stage] = result[stage]["utilisation"]
    if "generate" in result:
        keys["generate_ratio"] = result["generate"]["ratio"]
        keys["generate_ratio_merged"] = result["generate"]["ratio_merged"]
    if "memory" in result:
        by_stage = {stage: part["ratio"] for stage, part in result["memory"].items()}
        keys["memory_ratio"] = {**spread(list(by_stage.values())), **by_stage}
    return keys


def print_table(result):
    rows = []

    def ratio(label, value, rates=None, unit=""):
        cells = f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
        rows.append((label, cells, f"{rates[0]:.3g} / {rates[1]:.3g} {unit}" if rates else ""))

    for stage, alone, key, what in (
        ("stage1", "cached features", "cached_ratio", "with CLIP"),
        ("stage2", "own batching", "own_batch_ratio", "own batching"),
    ):
        if stage in result:
            part = result[stage]
            samples, tokens = part["samples_per_s"], part["tokens_per_s"]
            rates = (samples["ours"], samples["peer"])
            ratio(f"{stage}, same batches", part["same_batch_ratio"], rates, "samples/s")
            rates = (samples["alone"], samples["peer"])
            ratio(f"{stage}, {alone}", part[key], rates, "samples/s")
            rows.append(("", "", f"{tokens['alone']:.3g} / {tokens['peer']:.3g} supervised tokens/s"))
            rate = part["matmul_gflops"]
            note = f"of {rate['median']:.0f} ({rate['low']:.0f}–{rate['high']:.0f}) GFLOP/s"
            if part["disturbed"]:
                note += ": DISTURBED by other programs, measure again"
            value = part["utilisation"]
            cells = f"{value['median']:.0%} ({value['low']:.0%}–{value['high']:.0%})"
            rows.append((f"{stage}, utilisation, {what}", cells, note))
    if "generate" in result:
        part = result["generate"]
        rates = part["tokens_per_s"]
        ratio("generation, peer as trained", part["ratio"], (rates["ours"], rates["peer"]), "tokens/s")
        ratio("generation, peer merged", part["ratio_merged"], (rates["ours"], rates["merged"]), "tokens/s")
    if "memory" in result:
        for stage, part in result["memory"].items():
            gib = part["gib"]
            note = f"{gib['ours']:.2f} / {gib['peer']:.2f} GiB at micro-batch {part['batch_size']}"
            rows.append((f"{stage}, peak memory", f"{part['ratio']:.2f}", note))
    if not rows:
        return
    print(f"\n| {'measured':<32} | {'ratio (least–most)':<20} | ours / the peer's |\n|--|--|--|")
    for label, cells, note in rows:
        print(f"| {label:<32} | {cells:<20} | {note} |")


# -- settings ----------------------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=("toy", "mid", "full"), default="mid")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps, four sections")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", metavar="SECTION")
    parser.add_argument("--pairs", type=int, metavar="N", help="of steps, in each section")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: docs/scaling.png, quick: none")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)  # used by child()
    args = parser.parse_args()
    args.only = args.only or (SECTIONS[:4] if args.quick else SECTIONS)
    device = pick_device(args.device)
    args.device = str(device)
    if args.precision == "auto":
        dtype = pick_precision("auto", device)[0]
        args.precision = next(name for name, value in DTYPES.items() if value == dtype)
    args.dtype = DTYPES[args.precision]
    # Micro-batch and window (samples of an optimizer step) of each stage. The stages' real window is 128.
    args.batch_size, args.window, pairs = {1: 4, 2: 4}, {1: 4, 2: 32}, (12, 3, 3)
    if device.type == "cuda":
        args.batch_size, args.window = {1: 16, 2: 4}, {1: 128, 2: 128}
    elif args.geometry == "full":
        args.batch_size, args.window, pairs = {1: 1, 2: 1}, {1: 1, 2: 1}, (1, 1, 1)
    elif args.quick:
        args.batch_size, args.window, pairs = {1: 4, 2: 2}, {1: 4, 2: 4}, (3, 2, 1)
    args.pairs = dict(zip(SECTIONS, [args.pairs] * 3 if args.pairs else pairs))
    if not args.quick and not args.plot:
        args.plot = ROOT / "docs" / "scaling.png"
    return args


def main():
    args = parse()
    shape = geometry(args.geometry)
    if args.peak_of:
        return measure_peak(args, shape)
    print(
        f"geometry {args.geometry}, {args.precision} on {args.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        flush=True,
    )
    result = {}
    for section in args.only:
        started = time.perf_counter()
        print(f"\n{section}", flush=True)
        if section in ("stage1", "stage2"):
            result[section] = train(args, shape, int(section[-1]))
        elif section == "generate":
            result[section] = generate(args, shape)
        elif section == "memory":
            result[section] = memory(args)
        elif section == "loader":
            from loader import loader

            result[section] = loader(args, shape, result)
        else:
            from scaling import scaling

            result[section] = scaling(args, shape)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    print_table(result)
    if args.json:
        about = {"geometry": args.geometry, "device": args.device, "precision": args.precision}
        about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**about, **result, **summary(result)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
