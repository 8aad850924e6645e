"""Checks that data of the real size fits into memory, with a synthetic chat.json of 595,375 records.

    python -m bench.data_scale    about 1 minute on 2 CPU cores, 230 MB of temporary files, Linux only

Measures how long support.records.RecordFile takes to open the file and what memory it holds, and compares
both with json.loads. Fails if a figure is above its bound.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

from support.records import RecordFile

WORDS = "olive oil is a healthy ingredient used liberally in this part of the world , says person".split()


def write_chat_json(path, count):
    """Writes records in the format of LLaVA-CC3M-Pretrain-595K, with captions of 5 to 30 words."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            turns = [{"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
                     {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(5, 30)))}]
            record = {"id": f"GCC_train_{i:09d}", "image": f"GCC_train_{i:09d}.jpg", "conversations": turns}
            file.write((", " if i else "[") + json.dumps(record))
        file.write("]")


def memory():
    """Returns the memory of this process in bytes (proportional set size)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure_opening(path, reader):
    """Returns the seconds in which `reader` opens the file, and the bytes that the result holds."""
    before, started = memory(), time.perf_counter()
    result = RecordFile(path) if reader == "RecordFile" else json.loads(path.read_text(encoding="utf-8"))
    seconds, held = time.perf_counter() - started, memory() - before
    print(f"  {reader}: {len(result):,} records in {seconds:.2f} s, holds {held / 1e6:.0f} MB", flush=True)
    return seconds, held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=595_375)
    with tempfile.TemporaryDirectory() as folder:
        path, ratios = Path(folder) / "chat.json", []
        write_chat_json(path, parser.parse_args().records)
        for _ in range(3):
            with multiprocessing.Pool(1, maxtasksperchild=1) as pool:  # a new process for each call
                json_seconds, _ = pool.apply(measure_opening, (path, "json.loads"))
                seconds, held = pool.apply(measure_opening, (path, "RecordFile"))
            ratios.append(seconds / json_seconds)
    ratio = sorted(ratios)[1]
    print(f"median time / time of json.loads: {ratio:.2f} (bound 3)\nmemory: {held / 1e9:.3f} GB (bound 0.1)")
    sys.exit(ratio > 3 or held > 1e8)


if __name__ == "__main__":
    main()
