"""The exercises in lessons/: every solution prints the promised numbers, and every line number is right."""

import importlib
import inspect
import re
import types

import pytest
from conftest import REPOSITORY

LESSONS = REPOSITORY / "lessons"
TEXT = (LESSONS / "exercises.md").read_text(encoding="utf-8")
EXERCISES = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
SOLUTIONS = sorted(path.stem for path in (LESSONS / "solutions").glob("*.py"))

# What a solution prints and its exercise promises. (The other numbers depend more on the machine.)
PROMISED = {
    "generate": ["595 positions per row", "43"],
    "grad_accum": ["19%"],
    "label_mask": ["480 held-out records", "9,980 labeled tokens"],
    "llama_block": ["the toy's 4 blocks", "8 heads of queries and 2 of keys"],
    "lora": ["154,624 trained parameters"],
    "pool_patches": ["4 image tokens instead of 9", "55 tokens instead of 60"],
    "resume": ["58 of 58"],
    "second_image": ["10 image positions in input_ids, but 2 images with 9 features each",
                     "18 image positions"],
    "vision_tower": ["5 hidden states of 10 vectors"],
}


def exercise_of(solution):
    """Returns the text of the exercise that names a solution, as one line."""
    [exercise] = [text for text in EXERCISES if f"solutions/{solution}.py" in text]
    return " ".join(exercise.split())


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_a_solution_reaches_the_result_that_its_exercise_promises(script, capsys, solution):
    script(f"lessons.solutions.{solution}")  # it fails by itself if the result is wrong
    printed = capsys.readouterr().out
    for words in PROMISED[solution]:
        assert words in printed
        assert words in exercise_of(solution)


def test_every_exercise_names_one_solution_and_every_solution_has_an_exercise():
    named = [re.findall(r"\[solutions/(\w+)\.py\]\(solutions/\1\.py\)", text) for text in EXERCISES]
    assert all(len(names) == 1 for names in named)
    assert sorted(name for names in named for name in names) == SOLUTIONS


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda text: text.splitlines()[0])
def test_every_exercise_has_the_same_parts_and_names_lines_that_exist(exercise):
    assert re.findall(r"^\*\*(\w+)\.\*\*", exercise, flags=re.MULTILINE) == [
        "Do", "Change", "Expect", "Hint", "Solution"]
    named = re.findall(r"`([\w/]+\.py)`,\s+line\s+(\d+),\s+`([^`]+)`", exercise)
    assert named and len(named) == len(re.findall(r"\bline\s+\d+", exercise))
    for file, number, name in named:
        lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
        found = [i + 1 for i, line in enumerate(lines) if name in line]
        assert int(number) in found, f"`{name}` is not in line {number} of {file} but in {found}"


def change_source(module, old, new):
    """Returns a copy of a module in which one piece of text is replaced."""
    changed, source = types.ModuleType(module.__name__), inspect.getsource(module)
    assert source.count(old) == 1
    exec(source.replace(old, new), changed.__dict__)
    return changed


@pytest.mark.parametrize(("name", "old", "new"), [
    ("vision_tower", "1.702 * x", "x"), ("vision_tower", "/ math.sqrt(q.shape[-1])", ""),
    ("vision_tower", "permute(0, 2, 3, 1, 4, 5)", "permute(0, 3, 2, 1, 4, 5)"),
    ("vision_tower", ' + weights["embeddings.position_embedding.weight"]', ""),
    ("llama_block", "repeat_interleave(q.shape[1] // k.shape[1], dim=1)",
     "repeat(1, q.shape[1] // k.shape[1], 1, 1)"),
    ("llama_block", "diagonal=1", "diagonal=2"), ("llama_block", "theta ** (-2 *", "theta ** (-1 *"),
    ("llama_block", "second * cos + first * sin", "second * cos - first * sin"),
    ("llama_block", "    q, k = rotate(q, theta), rotate(k, theta)\n", "")])
def test_the_models_by_hand_detect_a_single_wrong_operation(name, old, new):
    with pytest.raises(AssertionError, match="not close"):
        change_source(importlib.import_module(f"lessons.solutions.{name}"), old, new).main()
