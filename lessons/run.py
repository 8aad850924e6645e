"""Runs lessons. A lesson is an experiment that changes one thing in the project and measures what happens.

    python -m lessons.run no_end_token      one lesson, with three seeds: at most 6 minutes on 2 CPU cores
    python -m lessons.run all               all of them, about an hour
    python -m lessons.run all --seeds 0     with one seed; only prints

With three seeds, it writes the measured numbers to lessons/results.json and the table to lessons/README.md.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

from lessons import experiment
from support.errors import run_script
from support.files import write_json
from support.settings import COUNT, POSITIVE
from toy.world import draw_if_missing

FOLDER = Path(__file__).parent
SEEDS = [0, 1, 2]
NAMES = ["skip_stage1", "wrong_images", "vision_layer", "class_token", "mlp_projector", "average_patches",
         "change_patches", "less_data", "learning_rate", "frozen_in_train_mode", "lora_rank",
         "label_questions", "no_end_token", "tokenize_pieces", "double_shift", "other_template",
         "temperature"]
START, END = "<!-- The table is written by python -m lessons.run -->\n", "<!-- end of the table -->\n"


def run_lesson(name, seeds):
    """Returns what a lesson measured with each seed: {condition: {measure: [one number per seed]}}."""
    results = {}
    for seed in seeds:
        for condition, measured in importlib.import_module(f"lessons.{name}").run(seed).items():
            for key, value in measured.items():
                results.setdefault(condition, {}).setdefault(key, []).append(round(value, 4))
    return results


def format_result(measured):
    """Returns {measure: [numbers]} as text: the mean of each, and its smallest and largest number."""
    return ", ".join(f"{key} {sum(values) / len(values):.2f} ({min(values):.2f}–{max(values):.2f})"
                     for key, values in measured.items())


def make_table(results):
    """Returns the table of lessons/README.md. results: {lesson: what run_lesson() returned}."""
    rows = ["| lesson | what is changed | expected | measured | what it means |", "|--|--|--|--|--|"]
    for name in NAMES:
        if name in results:
            lesson = importlib.import_module(f"lessons.{name}")
            measured = "<br>".join(f"**{condition}**: {format_result(numbers)}"
                                   for condition, numbers in results[name].items())
            cells = [f"[{name}]({name}.py)", lesson.__doc__, lesson.EXPECTED, measured, lesson.MEANING]
            rows.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["all", *NAMES], help="the lesson")
    parser.add_argument("--seeds", type=COUNT, nargs="+", default=SEEDS, metavar="SEED",
                        help="default: 0 1 2; with other seeds, it only prints")
    parser.add_argument("--steps", type=POSITIVE, metavar="N",
                        help="train N steps per stage, to see that a lesson runs; only prints")
    args = parser.parse_args()
    if args.steps:
        experiment.STEPS = dict.fromkeys(experiment.STEPS, args.steps)
    draw_if_missing()
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    for name in NAMES if args.name == "all" else [args.name]:
        started = time.time()
        lesson = importlib.import_module(f"lessons.{name}")
        print(f"{name}: {lesson.__doc__}\nexpected: {lesson.EXPECTED}", flush=True)
        results[name] = run_lesson(name, args.seeds)
        for condition, measured in results[name].items():
            print(f"  {condition}: {format_result(measured)}")
        print(f"what it means: {lesson.MEANING}\n({(time.time() - started) / 60:.1f} minutes)\n", flush=True)
        if args.seeds == SEEDS and not args.steps:
            write_json(FOLDER / "results.json", results)
            readme = (FOLDER / "README.md").read_text(encoding="utf-8")
            before, after = readme.split(START)[0], readme.split(END)[1]
            (FOLDER / "README.md").write_text(before + START + make_table(results) + END + after,
                                              encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
