"""The README's table: what the toy world's two stages reach on three seeds, and what chance looks like.

    python bench/toy_table.py              about 20 minutes on 2 cores; --seeds 0 for one seed
    python bench/toy_table.py --precision fp16 --seeds 0 --no-controls     slow on a CPU: half an hour

Trains both stages for each seed and evaluates after each. Then the controls, which must fail: a projector
that was never trained, and one trained on captions whose images were shuffled. The runs go to runs/table/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumbing import find_file  # noqa: E402  (after the path)

COLUMNS = (
    "objects_f1",
    "objects_f1_shuffled",
    "caption_f1",
    "caption_f1_shuffled",
    "qa_exact",
    "qa_exact_shuffled",
    "image_match",
)


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")


def row(name, folder, stage, precision="fp32"):
    run("sanity_check.py", "--run", folder, "--stage", stage, "--eval", "--precision", precision)
    result = json.loads((folder / "eval.json").read_text())
    os.replace(folder / "eval.json", folder / f"eval{stage}.json")
    cells = [f"{result[column]:.3f}" if column in result else "–" for column in COLUMNS]
    by_kind = result.get("qa_exact_by_kind")
    cells.append(f"{min(by_kind.values()):.3f} ({min(by_kind, key=by_kind.get)})" if by_kind else "–")
    print("| " + " | ".join([name, *cells]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    args = parser.parse_args()
    table = ROOT / "runs" / "table"
    print(
        "| after | " + " | ".join([*COLUMNS, "worst kind"]) + " |\n|" + "--|" * (len(COLUMNS) + 2), flush=True
    )
    for seed in args.seeds:
        name = f"seed {seed}" + (f", {args.precision}" if args.precision != "fp32" else "")
        folder = table / name.replace(", ", "-").replace(" ", "")
        for stage, script in ((1, "stage1_align.py"), (2, "stage2_instruct.py")):
            run(script, "--run", folder, "--seed", seed, "--precision", args.precision, "--restart")
            row(f"stage {stage}, {name}", folder, stage, args.precision)
    if args.no_controls:
        return

    run("stage1_align.py", "--run", table / "untrained", "--max-steps", 0, "--restart")
    row("no training", table / "untrained", 1)

    records = json.loads(find_file("toy/data/chat.json").read_text())
    images = [record["image"] for record in records]
    for record, image in zip(records, images[1:] + images[:1]):
        record["image"] = image
    (table / "shuffled").mkdir(parents=True, exist_ok=True)
    (table / "shuffled" / "chat.json").write_text(json.dumps(records))
    run(
        "stage1_align.py",
        "--run",
        table / "shuffled",
        "--data",
        table / "shuffled" / "chat.json",
        "--restart",
    )
    row("stage 1, shuffled images", table / "shuffled", 1)


if __name__ == "__main__":
    main()
