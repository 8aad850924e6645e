"""Both stages and the sanity check at full size, with random weights: does it fit, and does it run?

    python tests/full_size.py --hub ../shared/hub --photos ../shared/photos

Not a test that pytest collects: it takes minutes, 5 GB of disk and about 10 GB of memory. From the
configurations and tokenizer files of the real parts it makes parts of their size whose weights are random,
laid out in a temporary hub cache (removed at the end), so that `--preset tinyllama` finds them by their names
on the hub. Then one optimizer step of each stage, one answer of the sanity check, and for each its time and
the most memory that it used."""

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
PARTS = {
    "openai/clip-vit-large-patch14": (CLIPConfig, CLIPModel, torch.float32),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (LlamaConfig, LlamaForCausalLM, torch.bfloat16),
}


def make_part(cache, hub, name):
    """A random part of full size as the hub's cache holds it: models--…/snapshots/<hash>/, refs/main names
    it."""
    config_class, model_class, dtype = PARTS[name]
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
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters, {dtype}, "
        f"{sum(path.stat().st_size for path in snapshot.iterdir()) / 2**30:.1f} GiB"
    )


def make_data(folder, photos):
    """chat.json with images.zip, and instruct.json with a folder, in the two data sets' formats."""
    chat, instruct = [], []
    for i, path in enumerate(sorted(photos.glob("*.jpg"))):
        words = path.stem.replace("_", " ")
        chat.append(
            {
                "id": path.stem,
                "image": path.name,
                "conversations": [
                    {"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
                    {"from": "gpt", "value": f"a photo of {words} ."},
                ],
            }
        )
        instruct.append(
            {
                "id": f"{i:012d}",
                "image": path.name,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is shown?"},
                    {"from": "gpt", "value": f"It shows {words}."},
                    {"from": "human", "value": "Is it a drawing?"},
                    {"from": "gpt", "value": "No, it is a photo."},
                ],
            }
        )
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in photos.glob("*.jpg"):
            archive.write(path, path.name)


def run(folder, script, *words):
    """Runs a script as its own process; prints its time and its peak memory."""
    print(f"\n$ python {script} {' '.join(map(str, words))}", flush=True)
    started = time.time()
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / script), *map(str, words)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone; RUSAGE_CHILDREN is the largest of all
    if status:
        sys.exit(f"{script} failed")
    return f"{script:<20}{time.time() - started:>8.0f} s{usage.ru_maxrss / 2**20:>8.1f} GiB"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hub", type=Path, default=SHARED / "hub", help="real configurations")
    parser.add_argument("--photos", type=Path, default=SHARED / "photos", help="a folder of .jpg")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16; see stage1_align.py")
    parser.add_argument("--batch-size", default=2, type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in PARTS:
            make_part(folder / "hf" / "hub", args.hub, name)
        make_data(folder, args.photos.resolve())
        common = ["--preset", "tinyllama", "--precision", args.precision]
        small = [
            *common,
            "--batch-size",
            args.batch_size,
            "--grad-accum",
            1,
            "--held-out",
            2,
            "--max-length",
            400,
            "--max-steps",
            1,
            "--workers",
            0,
        ]
        figures = [
            run(folder, "stage1_align.py", *small, "--data", "chat.json", "--images", "images.zip"),
            run(
                folder,
                "stage2_instruct.py",
                *small,
                "--data",
                "instruct.json",
                "--images",
                args.photos.resolve(),
            ),
            run(folder, "sanity_check.py", *common, "--sample", 0, "--max-new-tokens", 8),
        ]
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n" + "\n".join(figures) + f"\n(making the parts: {here:.1f} GiB)")


if __name__ == "__main__":
    main()
