"""Trains and evaluates both stages on the toy world and prints the table of results for the README.

    python -m bench.toy_table      about 20 minutes on 2 cores; add --seeds 0 for one seed

The columns are keys of eval.json, which tools/evaluate.py explains. A second number after "/" is the control
with a different image: the captions are compared with a different scene, or the question is asked about a
different image.

The last two rows are controls. Their numbers should be close to chance. One evaluates an untrained projector,
the other a projector that was trained on captions of different images. The runs are written to runs/table/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from toy import world

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "runs" / "table"
STAGES = {1: "stage1_align.py", 2: "stage2_instruct.py"}
COLUMNS = {"objects F1": "objects_f1", "captions F1": "caption_f1", "answers correct": "qa_exact",
           "captions, correct image more likely": "captions_correct_more_likely"}  # the keys in eval.json


def run(*arguments):
    """Runs Python with these arguments. Ends the process with its error output if that fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def print_row(name, folder, stage):
    """Evaluates a run and prints its row of the table."""
    run("-m", "tools.evaluate", "--run", folder, "--stage", stage)
    result = json.loads((folder / f"stage{stage}" / "eval.json").read_text())
    cells = []
    for key in COLUMNS.values():
        numbers = [f"{result[k]:.3f}" for k in (key, f"{key}_different") if k in result]
        cells.append(" / ".join(numbers) or "–")
    print("| " + " | ".join([name, *cells]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    world.draw_if_missing()
    print(f"| run | {' | '.join(COLUMNS)} |\n|--|{'--|' * len(COLUMNS)}", flush=True)
    for seed in args.seeds:
        folder = TABLE / f"seed{seed}"
        for script in STAGES.values():
            run(script, "--run", folder, "--seed", seed, "--restart")
        for stage in STAGES:
            print_row(f"stage {stage}, seed {seed}", folder, stage)

    run(STAGES[1], "--run", TABLE / "untrained", "--max-steps", 0, "--restart")
    print_row("control: untrained projector", TABLE / "untrained", 1)

    folder = TABLE / "different-images"
    records = json.loads((world.DATA / "chat.json").read_text())
    images = [record["image"] for record in records]
    for record, image in zip(records, images[1:] + images[:1]):
        record["image"] = image
    folder.mkdir(exist_ok=True)
    (folder / "chat.json").write_text(json.dumps(records))
    run(STAGES[1], "--run", folder, "--data", folder / "chat.json", "--restart",
        "--heldout-data", world.DATA / "heldout_chat.json", "--heldout-images", world.DATA / "heldout.zip")
    print_row("control: trained on different images", folder, 1)


if __name__ == "__main__":
    main()
