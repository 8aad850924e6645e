"""What depends on what: five files at the top, and support/, which knows nothing of toy/ and tools/."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter

import pytest
from conftest import REPOSITORY

TOP = ["data", "model", "sanity_check", "stage1_align", "stage2_instruct"]
FOLDERS = ["support", "tools", "toy", "bench", "lessons"]
FILES = sorted(path for pattern in ("*.py", *(f"{name}/*.py" for name in FOLDERS), "lessons/solutions/*.py")
               for path in REPOSITORY.glob(pattern))
# What may be imported inside a function: a package that not everybody has, and the drawing of the toy, which
# a run of another preset does not need.
INSIDE = {"readline", "onnx", "toy"}


def module_name(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


SOURCES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree):
    """Returns the names of all modules that are imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def project_imports(name):
    """Returns the modules of this project that a module imports."""
    return {other for other in imports(SOURCES[name]) if other in SOURCES}


def folders_imported(name):
    return {other.split(".")[0] for other in imports(SOURCES[name])} & set(FOLDERS)


def test_the_model_imports_nothing_and_data_only_the_model_and_support():
    assert project_imports("model") == set()
    assert {name.partition(".")[0] for name in project_imports("data")} == {"model", "support"}


def test_the_map_of_support_names_each_of_its_files_once():
    text = (REPOSITORY / "support" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (REPOSITORY / "support").glob("*.py"))


def test_support_and_the_sanity_check_know_nothing_of_tools_and_bench_and_only_draw_the_toy():
    for name in SOURCES:
        assert "sanity_check" not in project_imports(name), name  # it is a script and no library
        if name.startswith("support.") or name == "sanity_check":
            draws = {"toy"} if name == "support.records" else set()
            assert folders_imported(name) <= {"support", *draws}, name
            assert not {"stage1_align", "stage2_instruct"} & project_imports(name), name


@pytest.mark.parametrize("stage", ["stage1_align", "stage2_instruct"])
def test_a_stage_imports_few_names(stage):
    assert folders_imported(stage) == {"support"}
    assert {name for name in project_imports(stage) if "." not in name} == {"data", "model"}
    at_the_top = [node for node in SOURCES[stage].body if not isinstance(node, ast.FunctionDef)]
    names = [alias.name for node in at_the_top if isinstance(node, ast.ImportFrom)
             and node.module.split(".")[0] == "support" for alias in node.names]
    assert len(names) <= 16, names


def test_the_two_stages_differ_in_few_lines():
    command = re.search(r"diff .*\\\n.*", ast.get_docstring(SOURCES["stage1_align"]))[0]  # prints them
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and 0 < len(done.stdout.splitlines()) <= 45, done.stdout + done.stderr
    assert "LoraConfig(" in done.stdout and "token_losses" not in done.stdout


def test_no_function_does_two_things_by_its_name_and_almost_none_imports():
    for name, tree in SOURCES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                assert not {"and", "or"} & set(function.name.split("_")), f"{name}.{function.name}()"
                hidden = {other.split(".")[0] for other in imports(function)}
                assert hidden <= INSIDE, f"{name}.{function.name}() imports {hidden}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: project_imports(name) for name in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)  # else it raises CycleError


def test_the_readme_names_the_length_of_each_file():
    table = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (REPOSITORY / "README.md").read_text(encoding="utf-8"),
                       re.MULTILINE)
    assert len(table) == len(TOP) == len(list(REPOSITORY.glob("*.py")))
    for name, lines in table:
        assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) == int(lines), name


def test_every_relative_link_of_a_document_leads_to_a_file():
    others = {".venv", "data", "runs"}
    documents = [path for path in REPOSITORY.glob("**/*.md") if not others & set(path.parts)]
    assert len(documents) > 8
    for document in documents:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
