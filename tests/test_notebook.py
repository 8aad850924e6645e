"""colab.ipynb, cell by cell, in a kernel of its own: the toy shrunk to a few steps, the real thing with tiny
random parts and eight photos in its place. And what can be said without running it."""

import ast
import io
import json
import re
import shutil
import subprocess
import threading
from contextlib import redirect_stdout
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import REPOSITORY
from test_hub_replicas import PHOTOS, world  # noqa: F401 (world is a fixture)
from test_hub_replicas import pytestmark as needs_shared

NOTEBOOK = json.loads((REPOSITORY / "colab.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


# -- running it --------------------------------------------------------------------------------------------


def run_notebook(cells, folder, **values):
    """Executes cells in a new kernel that starts in `folder`; `values` take the place of what the cells
    tagged "parameters" assign. Returns everything that was printed, and how many pictures were shown."""
    missing = "needs nbclient and ipykernel: pip install -r requirements-dev.txt -c constraints.txt"
    nbclient = pytest.importorskip("nbclient", reason=missing)
    pytest.importorskip("ipykernel", reason=missing)
    import nbformat

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
    # The kernel inherits this process's environment: one thread, and no hub (see conftest.py).
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return printed, len(pictures)


def tagged(*tags):
    return [cell for cell in CODE if set(tags) & set(cell["metadata"]["tags"])]


def copy_repository(folder):
    """The files of this clone that the notebook may use, without its runs and without the drawn pictures."""
    folder.mkdir()
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.txt"), REPOSITORY / ".gitignore"]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """pip must find everything satisfied without asking anybody; the photos come from this machine."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_without_a_gpu_all_cells_run_in_a_clone_and_those_of_the_real_thing_do_nothing(tmp_path):
    clone = copy_repository(tmp_path / "clone")
    (clone / "toy").symlink_to(REPOSITORY / "toy")
    flags = "--max-steps 2 --batch-size 4 --limit 16 --held-out 6 --workers 0"
    printed, pictures = run_notebook(CODE, clone, TOY_FLAGS=flags, REAL=False)
    assert "git clone" not in printed and "the cells of the real thing do nothing" in printed
    for words in ("16 samples to train on, 6 held out; 2 steps", "PROMPT", "TRUE", "own image preferred"):
        assert words in printed, words
    assert re.search(r"<image>×\d+\s+What do you see at the middle left\?", printed)
    curves = (clone / "runs" / "toy" / "curves.png").exists()  # matplotlib is not required
    assert pictures == 3 + curves  # sheet and curves, and two pictures of attention
    assert (clone / "runs" / "toy" / "stage2" / "adapter").exists()


@needs_shared
def test_the_cells_of_the_real_thing_run_with_replicas_after_cloning(world, tmp_path):  # noqa: F811
    origin = copy_repository(tmp_path / "origin")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a copy"]):
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        subprocess.run(["git", *who, *words], cwd=origin, check=True)
    start = tmp_path / "start"
    start.mkdir()
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train2017").symlink_to(PHOTOS)
    requested = []

    class Server(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            requested.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path / "coco")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    first_stage = next(cell for cell in tagged("real") if "stage1_align.py" in "".join(cell["source"]))
    cells = tagged("parameters", "setup", "real", "ask")
    cells.insert(cells.index(first_stage), first_stage)  # twice: the second time there is nothing to do
    try:
        printed, pictures = run_notebook(
            cells,
            start,
            REPOSITORY=str(origin),
            REAL=True,
            LIMIT=4,
            HELD_OUT=2,
            REAL_FLAGS="--workers 0 --precision fp32 --device cpu",
            CLIP=str(world / "clip"),
            LLM=str(world / "llm"),
            CHAT=str(world / "chat.json"),
            CC3M=str(PHOTOS),
            INSTRUCT=str(world / "instruct.json"),
            COCO=str(tmp_path / "fetched"),
            COCO_URL=f"http://127.0.0.1:{server.server_port}",
            PHOTO=str(PHOTOS / "cat.jpg"),
            QUESTION="Is it a drawing, or what's this?",
        )
    finally:
        server.shutdown()
    printed = printed.replace("\r", "")
    assert "hf download" not in printed  # everything is there, but for the photos of stage 2
    fetched = sorted(path.name for path in (tmp_path / "fetched").iterdir())
    assert len(fetched) == len(requested) == 6 and all(name.endswith(".jpg") for name in fetched)
    assert printed.count("4 samples to train on, 2 held out; 1 steps") == 2
    assert f"checked 4 records of {world / 'instruct.json'}: 4 usable" in printed
    assert "runs/limit-4/stage1 is finished: there is nothing to resume" in printed
    assert "<image>×256\nIs it a drawing, or what's this?" in printed
    curves = (start / "llava" / "runs" / "limit-4" / "curves.png").exists()
    assert pictures == 2 + curves


def test_a_command_that_fails_ends_the_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    helpers = next(cell for cell in tagged("setup") if "def sh(" in "".join(cell["source"]))
    failing = dict(helpers, id="failing", source=['sh("echo before; exit 3")'])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="this command failed, see above: echo"):
        run_notebook([helpers, failing], tmp_path)


# -- what can be said without running it -------------------------------------------------------------------


def test_it_is_stored_without_outputs_and_every_cell_has_its_id():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


def strings(cell):
    """The text of every string in a code cell, adjacent ones joined; {} for what is filled in."""
    nodes = list(ast.walk(ast.parse("".join(cell["source"]))))
    filled = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = [part for node in filled for part in node.values]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and node not in parts]
    for node in filled:
        texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return [text for text in texts if isinstance(text, str)]


def flags_of(script, name):
    """The flags in a script's --help."""
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        script(name, "--help")
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown.getvalue()))


def test_every_script_and_every_flag_that_it_names_exists(script):
    flags = {name: flags_of(script, name) for name in ("stage1_align", "stage2_instruct", "sanity_check")}
    stages = flags["stage1_align"] & flags["stage2_instruct"]
    everywhere = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    for path in re.findall(r"[\w/]+\.(?:py|txt)\b", everywhere):
        assert (REPOSITORY / path).exists(), path
    used = set()
    for text in [text for cell in CODE for text in strings(cell)]:
        words = set(re.findall(r"--[a-z][a-z0-9-]*", text))
        if match := re.match(r"python (\w+)\.py\b", text):
            assert words <= flags[match[1]], text
            used |= words
        elif not re.match(r"(python -m|git|hf|curl) ", text):
            assert words <= stages, text  # by themselves they are for both stages
            used |= words
    assert {"--restart", "--resume", "--eval", "--attention", "--sheet", "--show-mask", "--question"} <= used
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "markdown":
            for flag in re.findall(r"`(--[a-z-]+)", "".join(cell["source"])):
                assert flag in stages, flag


def test_it_fetches_what_the_scripts_say_is_to_be_fetched():
    from plumbing import DOWNLOADS

    ours = {text for cell in CODE for text in strings(cell) if text.startswith("hf download")}
    assert ours == {command for _, command in DOWNLOADS.values() if command.startswith("hf download")}
    assignments = "\n".join("".join(cell["source"]) for cell in tagged("parameters"))
    for path in DOWNLOADS:  # under the names by which the presets know it
        assert f'"{path}"' in assignments, path
