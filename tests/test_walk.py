"""The real path, from the download of the data to an answer, as a user types it.

The real client of the hub and the real tools/download.sh fetch everything from a stand-in for the hub (see
hub_server.py). Only the weights and the number of records are small. Every command is that of the documents,
with --preset tinyllama and few other flags.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, draw
from hub_server import CHAT, CLIP, LLM, serve, use
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.errors import UserError
from support.pretrained import find_pretrained

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")

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
def cache(hub, tmp_path, monkeypatch):
    """An empty cache of the hub's client, for this process."""
    use(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for changed in (hub.requested, hub.gated, hub.break_off):
        changed.clear()
    return tmp_path / "home" / "hub"


@pytest.fixture
def on(hub, tmp_path, cache):
    """on("command", …) runs a command in an empty folder, with the cache and the network. Returns the
    CompletedProcess."""
    for name in ("tools", *(path.name for path in REPOSITORY.glob("*.py"))):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = {**os.environ, "HF_HOME": str(cache.parent), "HF_ENDPOINT": hub.url,
                   "HF_HUB_OFFLINE": "0", "COCO_ZIP": f"{hub.url}/coco/train2017.zip",
                   "PYTHONPATH": str(REPOSITORY),
                   "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}

    def run(*words, text="", **changes):
        return subprocess.run(words, cwd=tmp_path, input=text, capture_output=True, text=True, timeout=300,
                              env={**environment, **changes})

    run.environment, run.folder = environment, tmp_path
    return run


def find(name, **changes):
    """Returns what find_pretrained() returns or raises, while constants of the client are changed."""
    with pytest.MonkeyPatch.context() as patches:
        for constant, value in changes.items():
            patches.setattr(constants, constant, value)
        try:
            return find_pretrained(name)
        except UserError as error:
            return str(error)


@needs_curl
def test_the_first_evening(on, hub):
    download = on("bash", "tools/download.sh")
    assert download.returncode == 0, download.stderr
    assert {name for name, _ in hub.requested} == {"chat.json", "images.zip", "llava_instruct_150k.json",
                                                   "coco/train2017.zip"}

    # Stage 1 fetches both models, trains, and is stopped by Ctrl-C.
    stage1 = [sys.executable, "stage1_align.py", "--preset", "tinyllama", "--max-steps", "40"]
    with subprocess.Popen(stage1, cwd=on.folder, env=on.environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("step 0: "):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130 and "continue with --resume and the same flags" in printed, printed
    assert printed.count("fetching ") == 2 and f"fetching {CLIP} from the hub" in printed
    fetched = [name for name, _ in hub.requested if name.startswith(("model", "pytorch", "tf_model", "flax"))]
    assert fetched == ["model.safetensors"] * 2  # of each model one format of the weights

    draw("red", size=(60, 50)).save(on.folder / "photo.jpg")
    walk = on(sys.executable, "-c", WALK, text="""\
python -m tools.download --limit 8 --stage 1
python stage1_align.py --preset tinyllama --limit 8 --images data/LLaVA-CC3M-Pretrain-595K/images --check-data
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
    for words in ("checked 8 records", "checked 64 records", "resuming runs/tinyllama/stage1",
                  "next: python stage2_instruct.py --preset tinyllama",
                  "next: python sanity_check.py --run runs/tinyllama", "\nREFERENCE\n",
                  "What is unusual about this image?", "correct image more likely",
                  "wrote runs/tinyllama/page.html", "same generated tokens"):
        assert words in out, words
    assert "fetching" not in out  # everything is in the cache by now
    lines = (on.folder / "runs/tinyllama/stage1/metrics.jsonl").read_text().splitlines()
    evaluated = [line["step"] for line in map(json.loads, lines) if "heldout_loss" in line]
    assert evaluated == list(range(0, 41, 4))  # the preset sets no eval_every, so a tenth of the steps

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


@needs_curl
def test_download_sh_continues_a_zip_that_broke_off(on, hub):
    hub.break_off["images.zip"] = 1
    assert on("bash", "tools/download.sh", "stage1").returncode != 0
    zip_file = on.folder / "data" / CHAT.split("/")[1] / "images.zip"
    assert not zip_file.exists()
    assert on("bash", "tools/download.sh", "stage1").returncode == 0
    (_, first), (_, second) = [request for request in hub.requested if request[0] == "images.zip"]
    assert first == 0 < second < len(hub.repositories[CHAT]["images.zip"])
    assert zip_file.read_bytes() == hub.repositories[CHAT]["images.zip"]


def test_download_sh_fetches_the_models_beforehand(on, hub, cache):
    assert on("bash", "tools/download.sh", "models").returncode == 0
    assert all(find(name, HF_HUB_OFFLINE=True).startswith(str(cache)) for name in (CLIP, LLM))


@pytest.mark.parametrize("how", ["snapshot_download", "from_pretrained"])
def test_a_model_that_others_have_put_into_the_cache_is_found(cache, hub, how):
    if how == "snapshot_download":
        snapshot_download(LLM)
    else:
        for model_class in (AutoTokenizer, AutoModelForCausalLM):
            model_class.from_pretrained(LLM, cache_dir=cache)
    hub.requested.clear()
    assert find(LLM).startswith(str(cache)) and hub.requested == []


INCOMPLETE = {  # what: (a call that leaves an incomplete model in the cache, its name, what is missing)
    "a part": (lambda: snapshot_download(CLIP, allow_patterns="*config.json"), CLIP, "model.safetensors"),
    "a download that broke off": (lambda: find(CLIP), CLIP, "model.safetensors"),
    "no tokenizer": (lambda: AutoModelForCausalLM.from_pretrained(LLM, cache_dir=constants.HF_HUB_CACHE), LLM,
                     "tokenizer_config.json"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_model_is_completed_or_what_is_missing_is_named(cache, hub, what):
    fetch_a_part, name, missing = INCOMPLETE[what]
    hub.break_off["model.safetensors"] = 100 if what == "a download that broke off" else 0
    fetch_a_part()
    hub.break_off.clear()
    assert missing in find(name, HF_HUB_OFFLINE=True)
    hub.requested.clear()
    folder = find(name)
    assert folder.startswith(str(cache)) and hub.requested and find(name, HF_HUB_OFFLINE=True) == folder


def test_a_model_that_cannot_be_fetched_is_refused_in_one_sentence(cache, hub, monkeypatch):
    hub.gated.add(LLM)
    monkeypatch.delitem(hub.repositories[CLIP], "model.safetensors")  # as of openai/clip-vit-base-patch32
    for words, sentence in {
            "Repository Not Found": find("nobody/nothing"), "Repo id must": find("no such name"),
            "Access to model": find(LLM), "weights in the format safetensors": find(CLIP),
            "check your internet connection": find("a/b", ENDPOINT="http://127.0.0.1:9")}.items():
        assert words in sentence and "\n" not in sentence and len(sentence) < 450
