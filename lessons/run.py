"""Runs lessons. A lesson is an experiment that changes one thing in the project and measures the effect.

    python -m lessons.run double_shift      one lesson, with three seeds: minutes on 2 CPU cores
    python -m lessons.run all --seeds 0     all of them, with one seed: about half an hour

Guess the result while a lesson trains. It prints our guess and the result, and writes only to runs/lessons/.
"""

import argparse
import importlib
import inspect
import json
import subprocess
import time
from pathlib import Path
from statistics import mode

from lessons import experiment
from support.errors import UserError, run_script
from support.files import write_json
from support.settings import INT_FROM_0, INT_FROM_1
from toy.world import draw_if_missing

FOLDER = Path(__file__).parent
SEEDS = [0, 1, 2]
# In the order of lessons/README.md: those to begin with, stage 1, image features, stage 2, evaluation, CLIP.
QUESTIONS = {
    "double_shift": "What if the labels are shifted twice?",
    "wrong_images": "What if every record gets the image of another record?",
    "class_token": "What if the class token is kept and the last patch is lost?",
    "skip_stage1": "What if stage 1 is skipped?",
    "less_data": "How many different records does stage 1 need?",
    "learning_rate": "What do a high learning rate, warm-up and clipping do in stage 1?",
    "vision_layer": "Which layer of CLIP should the projector read?",
    "average_patches": "What if neighboring patches are averaged?",
    "image_attention": "Should a patch attend to the patches after it, too?",
    "change_patches": "What if a patch is erased or comes from another picture?",
    "lora_rank": "Which rank does the adapter need?",
    "what_to_unfreeze": "Which components should stage 2 train?",
    "label_everything": "What if the questions or the padding are labeled, too?",
    "tokenize_pieces": "What if each question and each answer is tokenized alone?",
    "other_template": "What if a model is prompted with another chat template?",
    "temperature": "How does the temperature change the captions?",
    "contrastive": "What does CLIP learn from pictures and their captions?"}
NAMES = list(QUESTIONS)
START = "<!-- All that follows is written by python -m lessons.run page -->\n"


def load_lesson(name):
    return importlib.import_module(f"lessons.{name}")


def run_lesson(name, seeds):
    """Returns what a lesson measured with each seed: {condition: {measure: [one number per seed]}}."""
    results = {}
    for seed in seeds:
        for condition, measured in load_lesson(name).run(seed).items():
            for key, value in measured.items():
                results.setdefault(condition, {}).setdefault(key, []).append(round(value, 4))
    return results


def format_numbers(values):
    """Returns the mean of the numbers and, if they differ, the smallest and the largest."""
    mean, low, high = (f"{value:.2f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def to_markdown(text):
    """Returns a text with one line per paragraph. Indented paragraphs stay, because they show as code."""
    return "\n\n".join(paragraph if paragraph.startswith("    ") else " ".join(paragraph.split())
                       for paragraph in text.strip("\n").split("\n\n"))


def make_contents(results):
    """Returns the table of contents of lessons/README.md, which gives no result away.

    Args: results: {lesson: {"commit": its version, "conditions": what run_lesson() returned}}.
    """
    rows = [f"| [{name}](#{name}) | {QUESTIONS[name]} | {load_lesson(name).MINUTES} |" for name in results]
    return "\n".join(["| lesson | question | minutes |", "|--|--|--|", *rows]) + "\n"


def name_commits(results):
    """Returns a sentence that names the commit of most results, and the lessons that have another one."""
    commits = {name: result["commit"] for name, result in results.items()}
    most = mode(commits.values())
    others = ", ".join(f"{name} ({commit})" for name, commit in commits.items() if commit != most)
    exception = f", except for {others}" if others else ""
    return f"The results were measured at commit {most}{exception}.\n"


def fold(title, text):
    """Returns Markdown that shows only the title until the reader clicks on it."""
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def show_code(lesson):
    """Returns Markdown with the functions that make the change, each with the comment above it."""
    functions = [getattr(lesson, name) for name in lesson.CHANGE]
    code = "\n".join((inspect.getcomments(each) or "") + inspect.getsource(each) for each in functions)
    return f"```python\n{code}```\n"


def make_section(name, result):
    """Returns the section of one lesson: the change and its code and, folded, our guess and the result."""
    lesson, conditions = load_lesson(name), result["conditions"]
    keys = list(dict.fromkeys(key for measured in conditions.values() for key in measured))
    rows = [f"| | {' | '.join(keys)} |", "|--" * (len(keys) + 1) + "|"]
    for condition, measured in conditions.items():
        cells = [format_numbers(measured[key]) if key in measured else "–" for key in keys]
        rows.append(f"| {condition} | {' | '.join(cells)} |")
    parts = [to_markdown(getattr(lesson, "MEASURES", "")), "\n".join(rows),
             f"**What it means.** {to_markdown(lesson.MEANING)}\n"]
    return "\n".join([f"### {name}\n", to_markdown(lesson.__doc__) + "\n", show_code(lesson),
                      f"[{name}.py]({name}.py), {lesson.DIFFICULTY}\n",
                      fold("Our guess", to_markdown(lesson.EXPECTED) + "\n"),
                      fold("Result", "\n\n".join(part for part in parts if part))])


def make_report(results):
    """Returns the generated part of lessons/README.md: the table of contents, the commits, and a section
    for each lesson that has been measured."""
    results = {name: results[name] for name in NAMES if name in results}
    return "\n".join([make_contents(results), name_commits(results),
                      *(make_section(*item) for item in results.items())])


def write_report(measured):
    """Adds {lesson: result} to lessons/results.json, and writes the generated part of lessons/README.md."""
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8")) | measured
    write_json(FOLDER / "results.json", results)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (FOLDER / "README.md").write_text(readme.split(START)[0] + START + make_report(results), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["all", "page", *NAMES],
                        help='the lesson; "page" runs none and rewrites lessons/README.md')
    parser.add_argument("--seeds", type=INT_FROM_0, nargs="+", default=SEEDS, metavar="SEED",
                        help="default: 0 1 2")
    parser.add_argument("--steps", type=INT_FROM_1, metavar="N",
                        help="train N steps per stage, to see that a lesson runs")
    parser.add_argument("--write", action="store_true",
                        help="for authors: write the results to lessons/README.md and lessons/results.json")
    args = parser.parse_args()
    if args.write and (args.steps or args.seeds != SEEDS):
        raise UserError("--write needs the default seeds and steps")
    if args.name == "page":
        return write_report({})
    if args.steps:
        experiment.STEPS = dict.fromkeys(experiment.STEPS, args.steps)
    draw_if_missing()
    for name in NAMES if args.name == "all" else [args.name]:
        started, lesson = time.time(), load_lesson(name)
        minutes = max(1, round(lesson.MINUTES * len(args.seeds) / len(SEEDS)))
        print(f"{name} ({lesson.DIFFICULTY}, about {minutes} minutes on 2 CPU cores)\n\n"
              f"{lesson.__doc__.strip()}\n", flush=True)
        conditions = run_lesson(name, args.seeds)
        print(f"Our guess: {lesson.EXPECTED}\n\nMeasured: {getattr(lesson, 'MEASURES', '')}")
        for condition, measured in conditions.items():
            scores = (f"{key} {format_numbers(values)}" for key, values in measured.items())
            print(f"  {condition}: {', '.join(scores)}")
        print(f"\nWhat it means, with our three seeds: {lesson.MEANING}\n"
              f"({(time.time() - started) / 60:.1f} minutes)\n", flush=True)
        write_json(experiment.RUNS / f"{name}.json", {"seeds": args.seeds, "conditions": conditions})
        if args.write:
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, check=True,
                                    capture_output=True, text=True).stdout.strip()
            write_report({name: {"commit": commit, "conditions": conditions}})


if __name__ == "__main__":
    run_script(main)
