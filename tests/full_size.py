"""Both stages and the sanity check at full size, with random weights: does it fit, and does it run?

    python tests/full_size.py --hub ../shared/hub --photos ../shared/photos

pytest does not collect this file, because it takes minutes, 5 GB of disk and about 10 GB of memory. It makes
models with the configurations and tokenizer files of the real ones and random weights, in a temporary hub
cache that is removed at the end, so `--preset tinyllama` finds them by their names on the hub. Then it runs
one optimizer step of each stage and one answer of the sanity check, and prints the time and the peak memory
of each.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
# On the hub, CLIP's weights are in fp32 and TinyLlama's in bf16.
MODELS = {
    "openai/clip-vit-large-patch14": (CLIPConfig, CLIPModel, torch.float32),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (LlamaConfig, LlamaForCausalLM, torch.bfloat16),
}


def make_model(cache, hub, name):
    """Writes a random model of full size as the hub's cache holds it: the files are in
    models--…/snapshots/<hash>/, and refs/main names the hash."""
    config_class, model_class, dtype = MODELS[name]
    source = hub / name.split("/")[1]
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    torch.set_default_dtype(dtype)
    model = model_class(config_class.from_pretrained(source))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(snapshot)
    for path in source.iterdir():  # the real files, also the configuration
        shutil.copyfile(path, snapshot / path.name)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    size = sum(path.stat().st_size for path in snapshot.iterdir()) / 2**30
    print(f"{name}: {parameters:,.0f} M parameters, {dtype}, {size:.1f} GiB")


def make_data(folder, photos):
    """Writes chat.json with images.zip, and instruct.json, in the formats of the two data sets."""
    chat, instruct = [], []
    for i, path in enumerate(sorted(photos.glob("*.jpg"))):
        words = path.stem.replace("_", " ")
        chat.append({"id": path.stem, "image": path.name, "conversations": [
            {"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
            {"from": "gpt", "value": f"a photo of {words} ."}]})
        instruct.append({"id": f"{i:012d}", "image": path.name, "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"},
            {"from": "gpt", "value": f"It shows {words}."},
            {"from": "human", "value": "Is it a drawing?"},
            {"from": "gpt", "value": "No, it is a photo."}]})
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in photos.glob("*.jpg"):
            archive.write(path, path.name)


def run(folder, script, *words):
    """Runs a script as a process of its own. Returns a line with its time and its peak memory."""
    print(f"\n$ python {script} {' '.join(map(str, words))}", flush=True)
    started = time.time()
    process = subprocess.Popen([sys.executable, str(REPOSITORY / script), *map(str, words)], cwd=folder,
                               env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)  # of this child; RUSAGE_CHILDREN is the maximum of all
    if status:
        sys.exit(f"{script} failed")
    return f"{script:<20}{time.time() - started:>8.0f} s{usage.ru_maxrss / 2**20:>8.1f} GiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", type=Path, default=SHARED / "hub", help="real configurations")
    parser.add_argument("--photos", type=Path, default=SHARED / "photos", help="a folder of .jpg files")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16; see stage1_align.py")
    parser.add_argument("--batch-size", default=2, type=int)
    args = parser.parse_args()
    photos = args.photos.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in MODELS:
            make_model(folder / "hf" / "hub", args.hub, name)
        make_data(folder, photos)
        common = ["--precision", args.precision]
        small = ["--preset", "tinyllama", *common, "--batch-size", args.batch_size, "--grad-accum", 1,
                 "--held-out", 2, "--max-length", 400, "--max-steps", 1, "--workers", 0]
        lines = [
            run(folder, "stage1_align.py", *small, "--data", "chat.json", "--images", "images.zip"),
            run(folder, "stage2_instruct.py", *small, "--data", "instruct.json", "--images", photos),
            run(folder, "sanity_check.py", "--run", "runs/tinyllama", *common, "--max-new-tokens", 8),
        ]
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n" + "\n".join(lines) + f"\n(making the models: {here:.1f} GiB)")


if __name__ == "__main__":
    main()
