"""Runs lessons. A lesson is an experiment that changes one thing in the project and measures what happens.

    python -m lessons.run double_shift      one lesson, with three seeds: minutes on 2 CPU cores
    python -m lessons.run all               all of them, more than an hour
    python -m lessons.run all --seeds 0     with one seed; only prints

With three seeds, it writes the measured numbers to lessons/results.json and the results to lessons/README.md.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

from lessons import experiment
from support.errors import run_script
from support.files import write_json
from support.settings import INT_FROM_0, INT_FROM_1
from toy.world import draw_if_missing

FOLDER = Path(__file__).parent
SEEDS = [0, 1, 2]
NAMES = ["skip_stage1", "wrong_images", "vision_layer", "class_token", "mlp_projector", "average_patches",
         "change_patches", "less_data", "learning_rate", "lora_rank", "full_finetuning", "label_questions",
         "tokenize_pieces", "double_shift", "other_template", "temperature", "contrastive"]
START = "<!-- All that follows is written by python -m lessons.run -->\n"


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
    return ", ".join(f"{key} {format_numbers(values)}" for key, values in measured.items())


def format_numbers(values):
    return f"{sum(values) / len(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def make_table(results):
    """Returns the overview of lessons/README.md: one score of each lesson, as a mean over the seeds.

    Args: results: {lesson: what run_lesson() returned}.
    """
    rows = ["| what is changed | baseline | changed |", "|--|--|--|"]
    for name, conditions in results.items():
        cells = {False: [], True: []}
        for condition, measured in conditions.items():
            key = next((key for key in measured if key in ("captions", "answers")), next(iter(measured)))
            values = measured[key]
            is_baseline = "baseline" in condition
            label = "" if is_baseline else f"{condition}: "
            cells[is_baseline].append(f"{label}{key} {sum(values) / len(values):.2f}")
        baseline, changed = '<br>'.join(cells[True]) or '–', '<br>'.join(cells[False])
        rows.append(f"| [{name}](#{name}) | {baseline} | {changed} |")
    return "\n".join(rows) + "\n"


def make_section(name, conditions):
    """Returns the section of one lesson: the change, what we expected, what was measured, what it means."""
    lesson = importlib.import_module(f"lessons.{name}")
    texts = (lesson.__doc__, lesson.EXPECTED, lesson.MEANING)
    doc, expected, meaning = (" ".join(text.split()) for text in texts)
    keys = list(dict.fromkeys(key for measured in conditions.values() for key in measured))
    rows = [f"| | {' | '.join(keys)} |", "|--" * (len(keys) + 1) + "|"]
    for condition, measured in conditions.items():
        cells = [format_numbers(measured[key]) if key in measured else "–" for key in keys]
        rows.append(f"| {condition} | {' | '.join(cells)} |")
    table = "\n".join(rows)
    return (f"### {name}\n\n{doc} ([{name}.py]({name}.py))\n\n**Expected.** {expected}\n\n{table}\n\n"
            f"**What it means.** {meaning}\n")


def make_report(results):
    """Returns the generated part of lessons/README.md: the overview, then a section for each lesson."""
    results = {name: results[name] for name in NAMES if name in results}
    return "\n".join([make_table(results), *(make_section(*item) for item in results.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["all", *NAMES], help="the lesson")
    parser.add_argument("--seeds", type=INT_FROM_0, nargs="+", default=SEEDS, metavar="SEED",
                        help="default: 0 1 2; with other seeds, it only prints")
    parser.add_argument("--steps", type=INT_FROM_1, metavar="N",
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
            (FOLDER / "README.md").write_text(readme.split(START)[0] + START + make_report(results),
                                              encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
