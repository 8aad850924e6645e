"""colab.ipynb, cell by cell, in a kernel of its own.

The toy and the lessons train for two steps only. The real models and data come from a stand-in for the hub
(see hub_server.py). The tests of the second part run no cell.
"""

import importlib
import json
import re
import shutil
import subprocess

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY, draw
from hub_server import serve

import stage1_align
import stage2_instruct
import toy.world

NOTEBOOK = json.loads((REPOSITORY / "colab.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def tagged(*tags):
    return [cell for cell in CODE if set(tags) & set(cell["metadata"]["tags"])]


# Replaces sh() by one that runs the scripts inside the kernel. As processes of their own, each would need
# about 5 seconds to import transformers.
RUN_IN_KERNEL = """
import runpy
import shlex

in_a_shell = sh


def sh(command):
    python, *words = shlex.split(command)
    is_module = words[0] == "-m"
    if words[is_module] == "pip" or python != "python":
        return in_a_shell(command)
    print("$", command)
    sys.argv = words[is_module:]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    run = runpy.run_module if is_module else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(end.code)
"""


def run_notebook(cells, folder, **values):
    """Executes cells in a new kernel that starts in `folder`. `values` replace what the cells tagged
    "parameters" assign. Returns everything that was printed, and what each cell has displayed: "picture" or
    "page"."""
    notebook = nbformat.from_dict({**NOTEBOOK, "cells": [dict(cell, outputs=[]) for cell in cells]})
    for cell in notebook.cells:
        lines = "".join(cell.source).splitlines()
        if "parameters" in cell.metadata.tags:
            for i, line in enumerate(lines):
                name = line.split(" = ")[0]
                if name in values:
                    lines[i] = f"{name} = {values.pop(name)!r}"
        cell.source = "\n".join(lines)
    assert not values, f"no parameters cell assigns {list(values)}"
    # The kernel inherits the environment of this process: one thread and no hub (see conftest.py).
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed, shown = "", {}
    for cell in notebook.cells:
        for output in cell.outputs:
            if output.output_type == "stream":
                printed += output.text
            elif "image/png" in output.get("data", {}):
                shown[cell.id] = "picture"
            elif 'srcdoc="&lt;!DOCTYPE html&gt;' in output.get("data", {}).get("text/html", ""):
                shown[cell.id] = "page"
    return printed.replace("\r", ""), shown


def with_cell_after(cells, cell_id, text):
    """Returns a copy of the list with one more code cell."""
    i = [cell["id"] for cell in cells].index(cell_id) + 1
    return [*cells[:i], dict(cells[i - 1], id=f"after-{cell_id}", source=[text]), *cells[i:]]


def copy_repository(folder):
    """Copies this clone, without its data and runs."""
    return shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(
        ".*", "data", "docs", "runs", "tests", "__pycache__"))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """pip must find everything installed, without the network. The photos come from this machine."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_without_a_gpu_all_cells_run_in_a_clone_and_those_of_the_real_models_do_nothing(tmp_path):
    toy.world.draw_if_missing()
    clone = copy_repository(tmp_path / "clone")
    (clone / "toy" / "data").symlink_to(REPOSITORY / "toy" / "data")
    lessons = {path: path.read_bytes() for path in (clone / "lessons").iterdir() if path.is_file()}
    start = clone / "docs" / "notebooks"  # the setup cells find the clone above it
    start.mkdir(parents=True)
    flags = "--max-steps 2 --batch-size 4 --limit 16 --heldout 6 --workers 0"
    cells = with_cell_after(CODE, "helpers", RUN_IN_KERNEL)
    printed, shown = run_notebook(cells, start, TOY_FLAGS=flags, LESSON_FLAGS="--steps 2", REAL=False)
    assert "git clone" not in printed and "the cells of the real models do nothing" in printed
    for words in (f"working directory: {clone}", "samples per step; 2 steps on 16 samples", "PROMPT",
                  "REFERENCE", "correct image more likely", "wrong images: training loss",
                  "class token kept, last patch lost: captions", "found at the bottom right"):
        assert words in printed, words
    assert re.search(r"<image>×\d+\s+What do you see at the middle left\?", printed)
    assert shown == {"toy-page": "page", "photo": "picture"}
    assert (clone / "runs" / "toy" / "stage2" / "adapter").exists()
    assert (clone / "runs" / "toy" / "stage2" / "eval.json").exists()
    assert all(path.read_bytes() == content for path, content in lessons.items())  # the table is unchanged
    assert list(start.iterdir()) == []


def test_outside_a_clone_it_asks_for_the_address_of_the_repository(tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="write the address of the repository"):
        run_notebook([CODE[0], *tagged("setup")], tmp_path)


def test_the_cells_of_the_real_models_run_after_cloning(tmp_path, monkeypatch):
    origin = copy_repository(tmp_path / "origin")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a copy"]):
        author = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        subprocess.run(["git", *author, *words], cwd=origin, check=True)
    start = tmp_path / "start"
    start.mkdir()
    draw("red", size=(60, 50)).save(tmp_path / "photo.jpg")
    cells = with_cell_after(tagged("parameters", "setup", "real", "ask"), "helpers", RUN_IN_KERNEL)
    stage1 = next(source(cell) for cell in cells if cell["id"] == "real-stage1")
    cells = with_cell_after(cells, "real-stage1", stage1)  # finds a finished run the second time
    cells = with_cell_after(cells, "photo-parameters", "sh = in_a_shell")  # which reads the quoted question
    with serve(tmp_path / "hub", records=24) as hub:
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HOME", str(tmp_path / "home")),
                            ("HF_HUB_OFFLINE", "0"), ("COCO_URL", f"{hub.url}/coco/train2017")):
            monkeypatch.setenv(name, value)
        printed, shown = run_notebook(
            cells, start, REPOSITORY=str(origin), REAL=True, LIMIT=8, HELDOUT=2, REAL_FLAGS="--workers 0",
            PAGE_FLAGS="--questions 1 --max-new-tokens 2", PHOTO=str(tmp_path / "photo.jpg"),
            QUESTION="Is it a drawing, or what's this?")
    for folder in ("LLaVA-CC3M-Pretrain-595K/images", "coco/train2017"):
        assert len(list((start / "llava" / "data" / folder).iterdir())) == 10
    assert printed.count("10 images to fetch") == printed.count("fetching ") == 2  # images, and both models
    assert printed.count("; 1 steps on 8 samples") == 2
    assert "runs/limit-8/stage1 holds a finished run, so there is nothing to resume" in printed
    assert re.search(r"<image>×\d+\nIs it a drawing, or what's this\?", printed)
    assert shown == {"real-look": "page", "photo": "picture"}


def test_it_is_stored_without_outputs_and_every_cell_has_its_own_id():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
        assert set(cell["metadata"]["tags"]) <= {"parameters", "setup", "toy", "lesson", "real", "ask"}


def test_every_path_and_module_that_it_names_exists():
    everything = "\n".join(source(cell) for cell in NOTEBOOK["cells"])
    paths = set(re.findall(r"[\w/]+\.(?:py|txt|sh|md)\b", everything))
    assert {"stage1_align.py", "tools/download.sh", "requirements.txt"} <= paths
    for path in paths:
        assert (REPOSITORY / path).exists(), path
    modules = set(re.findall(r"python -m ((?:tools|toy|lessons)\.\w+)", everything))
    assert modules == {"tools.download", "tools.evaluate", "tools.page", "lessons.run"}
    for name in modules:
        assert callable(importlib.import_module(name).main)


def test_download_sh_and_the_notebook_use_the_names_and_paths_of_the_presets():
    commands = (REPOSITORY / "tools" / "download.sh").read_text()
    assigned = "\n".join(source(cell) for cell in tagged("parameters"))
    for module in (stage1_align, stage2_instruct):
        preset = module.PRESETS["tinyllama"]
        for name in (preset["vision_tower"], preset["llm"]):
            assert f"hf download {name}" in commands, name
        for path in (preset["data"], preset["images"]):
            folder, _, file = path.rpartition("/")
            assert file in commands and folder in commands, path
        # The notebook downloads single images to a folder, where the preset reads them from a .zip file.
        assert f'"{preset["images"].removesuffix(".zip")}"' in assigned
