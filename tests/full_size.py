"""Both stages and the sanity check at full size, with random weights: does it fit, and does it run?

    python tests/full_size.py                   sizes of CLIP ViT-L/14 and TinyLlama-1.1B
    python tests/full_size.py --geometry toy    a few seconds, to try the script

pytest does not collect this file, because it takes minutes, 4 GB of disk and about 10 GB of memory. It makes
both models with the tests' small tokenizer, draws pictures of the toy, runs one optimizer step of each stage
and one answer, and prints the time and the peak memory of each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import REPOSITORY, make_tokenizer
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

from bench.speed import GEOMETRIES, geometry
from toy.world import draw


def make_models(folder, name):
    """Saves a vision tower in fp32 and an LLM in bf16, as the real ones are on the hub, in clip/ and llm/."""
    config = geometry(name)
    size = config.vision_config.image_size
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "clip")
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / "clip")
    LlamaForCausalLM(config.text_config).bfloat16().save_pretrained(folder / "llm")
    make_tokenizer(folder / "llm")


def run(folder, script, *words):
    """Runs a script as a process of its own. Returns a line with its time and its peak memory."""
    print(f"\n$ python {script} {' '.join(words)}", flush=True)
    started = time.time()
    process = subprocess.Popen([sys.executable, str(REPOSITORY / script), *words], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)  # of this child; RUSAGE_CHILDREN is the maximum of all
    if status:
        sys.exit(f"{script} failed")
    return f"{script:<20}{time.time() - started:>8.0f} s{usage.ru_maxrss / 2**20:>8.1f} GiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="full", help="sizes of the models")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16; see stage1_align.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_models(folder, args.geometry)
        draw(folder / "data", chat=8, instruct=8, heldout=1)
        precision = ["--precision", args.precision]
        flags = [*("--preset tinyllama --vision-tower clip --llm llm --batch-size 2 --grad-accum 1 "
                   "--heldout 2 --max-length 400 --max-steps 1 --workers 0").split(), *precision]
        stages = {"stage1_align.py": "--data data/chat.json --images data/images.zip",
                  "stage2_instruct.py": "--data data/instruct.json --images data/images"}
        lines = [
            *(run(folder, script, *flags, *data.split()) for script, data in stages.items()),
            run(folder, "sanity_check.py", "--run", "runs/tinyllama", "--max-new-tokens", "8", *precision)]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
