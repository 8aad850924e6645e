"""The real path, from the download of the data to an answer, as a user types it.

The real client of the hub and the real tools/download.sh fetch everything from a stand-in for the hub (see
hub_server.py). Only the weights and the number of records are small. Every command is that of the documents,
with --preset tinyllama and no other flags but the number of steps.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, draw, make_clip, make_llm
from hub_server import CHAT, CLIP, LLM, serve

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")

# Runs commands one after another in one process, because importing torch and transformers takes seconds.
WALK = """
import runpy, shlex, sys
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    _, *words = shlex.split(line)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    try:
        (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: {end.code}")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("hub"), records=320) as running:
        yield running


@pytest.fixture
def on(hub, tmp_path):
    """on("command", …) runs a command in an empty folder, with an empty cache and the network. Returns the
    CompletedProcess."""
    (tmp_path / "home").mkdir()
    for name in ("tools", *(path.name for path in REPOSITORY.glob("*.py"))):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url,
                   "HF_HUB_OFFLINE": "0", "COCO_ZIP": f"{hub.url}/coco/train2017.zip",
                   "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100",
                   "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}

    def run(*words, text="", **changes):
        return subprocess.run(words, cwd=tmp_path, input=text, capture_output=True, text=True, timeout=300,
                              env={**environment, **changes})

    run.environment, run.folder = environment, tmp_path
    hub.requested.clear()
    hub.gated.clear()
    hub.break_off.clear()
    return run


def find(on, *names, **changes):
    """Returns what find_or_fetch_pretrained() prints or raises for each name, in a process of its own."""
    also = {CLIP: "preprocessor_config.json"}
    wanted = [(name, also.get(name, "tokenizer_config.json")) for name in names]
    done = on(sys.executable, "-c", f"""
from support.errors import UserError
from support.hub import find_or_fetch_pretrained
for name, file in {wanted}:
    try:
        print(find_or_fetch_pretrained(name, file))
    except UserError as error:
        print(error)
""", **changes)
    return done.stdout + done.stderr


def test_the_first_evening(on, hub):
    download = on("bash", "tools/download.sh")
    assert download.returncode == 0, download.stderr
    assert {name for name, _ in hub.requested} == {"chat.json", "images.zip", "llava_instruct_150k.json",
                                                   "coco/train2017.zip"}

    # Stage 1 fetches both models, trains, and is stopped by Ctrl-C.
    stage1 = [sys.executable, "stage1_align.py", "--preset", "tinyllama", "--max-steps", "40"]
    metrics = on.folder / "runs" / "tinyllama" / "stage1" / "metrics.jsonl"
    with subprocess.Popen(stage1, cwd=on.folder, env=on.environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if metrics.exists() and metrics.read_text():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "continue with the same command and --resume" in printed, printed
    assert printed.count("fetching ") == 2 and f"fetching {CLIP}: 0.0" in printed
    fetched = [name for name, _ in hub.requested if name.startswith(("model", "pytorch", "tf_model", "flax"))]
    assert fetched == ["model.safetensors"] * 2  # of each model one format of the weights

    draw("red", size=(60, 50)).save(on.folder / "photo.jpg")
    walk = on(sys.executable, "-c", WALK, text="""\
python stage1_align.py --preset tinyllama --check-data
python stage1_align.py --preset tinyllama --max-steps 40 --resume
python stage2_instruct.py --preset tinyllama --max-steps 2
python sanity_check.py --run runs/tinyllama --sample 0
python sanity_check.py --run runs/tinyllama --image photo.jpg --question "What is unusual about this image?"
python -m tools.evaluate --run runs/tinyllama
python -m tools.page --run runs/tinyllama
python -m tools.export_hf --run runs/tinyllama --out exported
""")
    assert walk.returncode == 0, walk.stdout + walk.stderr
    out = walk.stdout
    for words in ("checked 64 records", "resuming runs/tinyllama/stage1",
                  "next: python stage2_instruct.py --preset tinyllama",
                  "next: python sanity_check.py --run runs/tinyllama", "\nREFERENCE\n",
                  "What is unusual about this image?", "correct image more likely",
                  "wrote runs/tinyllama/page.html", "same generated tokens"):
        assert words in out, words
    assert "fetching" not in out  # everything is in the cache by now

    reload = """
from transformers import pipeline
ask = pipeline("image-text-to-text", model="exported")
print(ask([{"role": "user", "content": [{"type": "image", "path": "photo.jpg"},
                                        {"type": "text", "text": "What is this?"}]}], max_new_tokens=4))
"""
    done = on(sys.executable, "-c", reload, HF_HUB_OFFLINE="1")
    assert "generated_text" in done.stdout, done.stderr
    chat = on(sys.executable, "-m", "tools.chat", "--run", "runs/tinyllama", "--image", "photo.jpg",
              "--max-new-tokens", "4", text="What is this?\n", HF_HUB_OFFLINE="1")
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr


def test_download_sh_continues_a_zip_that_broke_off(on, hub):
    hub.break_off["images.zip"] = 1
    assert on("bash", "tools/download.sh", "stage1").returncode != 0
    zip_file = on.folder / "data" / CHAT.split("/")[1] / "images.zip"
    assert not zip_file.exists()
    assert on("bash", "tools/download.sh", "stage1").returncode == 0
    (_, first), (_, second) = [request for request in hub.requested if request[0] == "images.zip"]
    assert first == 0 < second < len(hub.repositories[CHAT]["images.zip"])
    assert zip_file.read_bytes() == hub.repositories[CHAT]["images.zip"]


def test_download_sh_fetches_the_models_beforehand(on, hub):
    assert on("bash", "tools/download.sh", "models").returncode == 0
    hub.requested.clear()
    assert find(on, CLIP, LLM, HF_HUB_OFFLINE="1").count(str(on.folder / "home")) == 2


@pytest.mark.parametrize("how", ["snapshot_download", "from_pretrained", "an older client"])
def test_a_model_that_others_have_put_into_the_cache_is_found(on, hub, how):
    calls = {"from_pretrained": f"from transformers import *; AutoTokenizer.from_pretrained({LLM!r}); "
                                f"AutoModelForCausalLM.from_pretrained({LLM!r})"}
    everything = f"from huggingface_hub import *; snapshot_download({LLM!r})"
    done = on(sys.executable, "-c", calls.get(how, everything))
    assert done.returncode == 0, done.stderr
    if how == "an older client":  # before version 1.23, the client stored no list of files
        shutil.rmtree(on.folder / "home" / "hub" / f"models--{LLM.replace('/', '--')}" / "trees")
    hub.requested.clear()
    assert find(on, LLM).startswith(str(on.folder / "home")) and hub.requested == []


@pytest.mark.parametrize("what", ["files of its own choice", "another revision", "a download that broke off"])
def test_an_incomplete_model_is_completed_or_what_is_missing_is_named(on, hub, what):
    if what == "a download that broke off":
        hub.break_off["model.safetensors"] = 100
        assert "run the same command again, and complete files are not fetched twice" in find(on, CLIP)
        hub.break_off.clear()
    else:
        revision = "--revision 0123" if what == "another revision" else ""
        done = on("bash", "-c", f"hf download {CLIP} config.json preprocessor_config.json {revision}")
        assert done.returncode == 0, done.stderr
    missing = "config.json" if what == "another revision" else "model.safetensors"
    assert (f"HF_HUB_OFFLINE=1 forbids it, and the hub's cache has no {missing} of this model"
            in find(on, CLIP, HF_HUB_OFFLINE="1"))
    hub.requested.clear()
    assert f"fetching {CLIP}" in find(on, CLIP)
    assert ("model.safetensors", 0) in hub.requested


def test_a_model_that_cannot_be_fetched_is_refused_in_one_sentence(on, hub):
    hub.gated.add(LLM)
    sentences = find(on, "nobody/nothing", "no such name", LLM)
    assert "nobody/nothing: it is neither a folder here nor a public model" in sentences
    assert "correct the name" in sentences and "it is gated: accept its license" in sentences
    sentence = find(on, CLIP, HF_ENDPOINT="http://127.0.0.1:9")
    assert sentence.count("\n") == 1 and "ConnectError" in sentence and "Traceback" not in sentence


def test_two_processes_fetch_a_model_once(on, hub):
    code = f"from support.hub import find_or_fetch_pretrained; print(find_or_fetch_pretrained({CLIP!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=on.folder, env=on.environment, text=True,
                             stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert "".join(printed).count("fetching") == 1
    assert sorted(name for name, _ in hub.requested).count("model.safetensors") == 1


def test_a_folder_that_is_not_complete_is_refused_by_naming_what_is_missing(parts, tmp_path, refusal, flags):
    make_clip(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").rename(tmp_path / "clip" / "pytorch_model.bin")
    sentence = refusal("stage1_align", *flags(1, vision_tower=tmp_path / "clip"))
    assert "is not a complete pretrained model: it has no model.safetensors (pytorch_model.bin" in sentence
    make_llm(tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer_config.json").unlink()
    sentence = refusal("stage1_align", *flags(1, llm=tmp_path / "llm"))
    assert "it has no tokenizer_config.json" in sentence
