"""Both stages and the sanity check at full size, with random weights: does it fit, and does it run?

    python tests/full_size.py --hub ../shared/hub --photos ../shared/photos

pytest does not collect this file, because it takes minutes, 8 GB of disk and about 10 GB of memory. It makes
models with the configurations and tokenizer files of the real ones and random weights, and serves them as the
hub does (see hub_server.py). Stage 1 fetches them by their names to an empty cache. The script runs one
optimizer step of each stage and one answer, and prints the time and the peak memory of each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from hub_server import serve

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


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


def run(folder, hub, script, *words):
    """Runs a script as a process of its own. Returns a line with its time and its peak memory."""
    print(f"\n$ python {script} {' '.join(map(str, words))}", flush=True)
    started = time.time()
    process = subprocess.Popen([sys.executable, str(REPOSITORY / script), *map(str, words)], cwd=folder,
                               env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url,
                                    "HF_HUB_OFFLINE": "0"})
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
    with (tempfile.TemporaryDirectory() as folder,
          serve(Path(folder) / "hub", 1, args.hub, small=False) as hub):
        folder = Path(folder)
        make_data(folder, photos)
        common = ["--precision", args.precision]
        small = ["--preset", "tinyllama", *common, "--batch-size", args.batch_size, "--grad-accum", 1,
                 "--heldout", 2, "--max-length", 400, "--max-steps", 1, "--workers", 0]
        lines = [
            run(folder, hub, "stage1_align.py", *small, "--data", "chat.json", "--images", "images.zip"),
            run(folder, hub, "stage2_instruct.py", *small, "--data", "instruct.json", "--images", photos),
            run(folder, hub, "sanity_check.py", "--run", "runs/tinyllama", *common, "--max-new-tokens", 8),
        ]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
