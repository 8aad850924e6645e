"""The commands of the README and the documents exist and take their flags, and figures are those of files."""

import contextlib
import importlib
import io
import json
import re
from functools import cache

import pytest
from conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")),
             REPOSITORY / "lessons" / "README.md", REPOSITORY / "lessons" / "exercises.md"]
COMMAND = re.compile(r"(?:python (?:-m )?|torchrun .*-- (?:\\\n *)?)"
                     r"((?:tools|lessons|bench)\.[\w.]+|\w+\.py)((?:[^`\n&;|]|\\\n)*)")


@cache
def help_of(name):
    """Returns what --help of a script or module prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(name.removesuffix(".py")).main()
    return printed.getvalue()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_takes_its_flags(document):
    commands = COMMAND.findall(document.read_text(encoding="utf-8"))
    assert commands or document.name == "reference.md"
    for name, words in commands:
        module = REPOSITORY / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
        if name == "pope.py":  # the reader saves this script
            continue
        assert module.exists(), name
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]+", words):
            assert flag in help_of(name), f"{name} has no {flag}"


def test_the_readme_is_one_page():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and sum(len(line.split()) for line in lines) <= 1000
    assert all(len(line) <= 110 for line in lines if not line.startswith("|"))


def test_figures_of_lessons_are_those_of_the_committed_results():
    results = json.loads((REPOSITORY / "lessons" / "results.json").read_text())
    text = (REPOSITORY / "docs" / "healthy.md").read_text(encoding="utf-8")
    wrong = next(measured for condition, measured in results["wrong_images"]["conditions"].items()
                 if "baseline" not in condition)
    correct, different = (f"{sum(wrong[key]) / 3:.2f}" for key in ("loss", "loss with a different image"))
    assert f"trained on images of other records | {correct} | {different} |" in text
