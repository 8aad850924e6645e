"""Checks that data of the real size fits into memory: synthetic records and a .zip file, 595,375 of each.

    python -m bench.data_scale    about 1 minute on 2 CPU cores, 250 MB of temporary files, Linux only

Opens both as stage 1 does and reads random samples with two DataLoader workers. Prints the seconds and the
memory of each process (proportional set size, in which shared memory is divided among its processes).
Fails if they need more than 1.5 GB together.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from support.images import ImageStore
from support.records import image_name, read_records, split_records

COUNT = 595_375  # records, and members of the .zip file
WORDS = "olive oil is a healthy ingredient used liberally in this part of the world , says person".split()
BOUND = 1.5e9  # bytes


def write_data(data, images):
    """Writes records in the format of LLaVA-CC3M-Pretrain-595K, with captions of 5 to 30 words, and a .zip
    file with as many members, of a few bytes each."""
    rng = random.Random(0)
    with open(data, "w", encoding="utf-8") as file, zipfile.ZipFile(images, "w") as archive:
        for i in range(COUNT):
            name = f"GCC_train_{i:09d}"
            turns = [{"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
                     {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(5, 30)))}]
            record = {"id": name, "image": f"{name}.jpg", "conversations": turns}
            file.write((", " if i else "[") + json.dumps(record))
            archive.writestr(f"{name}.jpg", f"{i}")
        file.write("]")


def read_members(records, indices):
    """Returns what the images of these records contain, not decoded."""
    images = records.images
    return [int(images.zip_file().read(images.find(image_name(records[i])))) for i in indices]


def memory(process):
    """Returns the memory of a process in bytes (proportional set size)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def timed(title, function, *args):
    started = time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - started
    print(f"{title}: {seconds:.1f} s, memory {memory(os.getpid()) / 1e6:.0f} MB", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="how many are read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, images = Path(folder) / "chat.json", Path(folder) / "images.zip"
        timed("wrote both", write_data, data, images)
        store = timed("opened images.zip", ImageStore, images)
        records = timed("opened chat.json", read_records, data, store)
        train_records, _ = timed("held out 256 records", split_records, records, 256, 0, 0)
        order = torch.randperm(len(train_records))[:args.samples].tolist()
        loader = iter(DataLoader(order, batch_size=4, collate_fn=partial(read_members, train_records),
                                 num_workers=2))
        numbers = timed("first batch", next, loader)
        workers = [process.pid for process in multiprocessing.active_children()]
        for _ in range(len(order) // 4 - 20):  # the workers end after the last batch
            numbers += next(loader)
        sizes = [memory(process) for process in (os.getpid(), *workers)]
    if numbers != [int(train_records[i]["id"][-9:]) for i in order[:len(numbers)]]:
        sys.exit("data_scale.py: a sample has the content of another image")
    print(f"after {len(numbers):,} samples: main process {sizes[0] / 1e6:.0f} MB, workers "
          f"{' and '.join(f'{size / 1e6:.0f} MB' for size in sizes[1:])}; {sum(sizes) / 1e9:.2f} GB in all "
          f"(bound {BOUND / 1e9} GB)")
    sys.exit(sum(sizes) > BOUND)


if __name__ == "__main__":
    main()
