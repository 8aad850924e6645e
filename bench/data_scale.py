"""Does a data set of the real size fit? Opens a synthetic chat.json of 595,375 records, and reads all of it.

    python bench/data_scale.py

Prints, and fails where a bound is broken: the time to open it over the time of json.load (bound 1.5), the
memory held over the file's size (2.0), and by how much the memory of eight loader workers, as the sum of
their proportional set sizes (Linux's /proc/<pid>/smaps_rollup), grows when all of them read every record
(10%)."""

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from storage import Records  # noqa: E402  (after the path)

WORDS = (
    "olive oil is a healthy ingredient used liberally in this part of the world , says person at an event "
    "with actor and politician during the premiere of film by night on the beach"
).split()
QUESTION = "Provide a brief description of the given image."


def write_chat_json(path, records):
    """LLaVA-CC3M-Pretrain-595K's format, with captions of 5 to 30 words."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(records):
            name = f"GCC_train_{i:09d}"
            turns = [
                {"from": "human", "value": rng.choice([f"{QUESTION}\n<image>", f"<image>\n{QUESTION}"])},
                {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(5, 30)))},
            ]
            file.write("[" if i == 0 else ", ")
            file.write(json.dumps({"id": name, "image": f"{name}.jpg", "conversations": turns}))
        file.write("]")


def proportional_set_size(pid="self"):
    """Bytes; a page that n processes share counts as 1/n in each."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in smaps_rollup")


def measure(function, path, queue):
    """Time and memory of opening the file, in a process of its own."""
    gc.collect()
    before, start = proportional_set_size(), time.perf_counter()
    held = function(path)
    seconds = time.perf_counter() - start
    gc.collect()
    queue.put((seconds, proportional_set_size() - before, len(held)))


def load_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_all(records, ready, go, done, leave):
    ready.release()
    go.wait()
    for i in range(len(records)):
        records[i]
    done.release()
    leave.wait()


def in_a_process(context, function, path):
    queue = context.Queue()
    process = context.Process(target=measure, args=(function, path, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=595_375)
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")  # what a DataLoader uses on Linux
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.json"
        write_chat_json(path, args.records)
        size = path.stat().st_size
        print(f"{args.records:,} records, {size / 1e6:.0f} MB")

        times = {"json.load": [], "Records": []}
        for _ in range(3):  # alternating, for the machine's speed drifts
            for name, function in (("json.load", load_json), ("Records", Records)):
                seconds, held, _ = in_a_process(context, function, path)
                times[name].append(seconds)
                memory = held / size
                print(f"  {name:<10} {seconds:6.2f} s, holds {held / 1e6:6.0f} MB, {memory:.2f} × the file")
        ratio = sorted(a / b for a, b in zip(times["Records"], times["json.load"]))[1]
        print(f"opening: {ratio:.2f} × json.load (median of three)")

        records = Records(path)
        ready, done = context.Semaphore(0), context.Semaphore(0)
        go, leave = context.Event(), context.Event()
        workers = [
            context.Process(target=read_all, args=(records, ready, go, done, leave))
            for _ in range(args.workers)
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            ready.acquire()
        pids = [os.getpid(), *(worker.pid for worker in workers)]
        before = sum(map(proportional_set_size, pids))
        go.set()
        for _ in workers:
            done.acquire()
        after = sum(map(proportional_set_size, pids))
        leave.set()
        for worker in workers:
            worker.join()
        growth = after / before - 1
        print(
            f"{args.workers} workers, all records read by each: {before / 1e6:.0f} MB before, "
            f"{after / 1e6:.0f} MB after: {growth:+.1%}"
        )
    broken = [
        text
        for text, value, bound in (
            ("opening takes too long", ratio, 1.5),
            ("holds too much", memory, 2.0),
            ("workers copy", growth, 0.10),
        )
        if value > bound
    ]
    sys.exit("; ".join(broken))


if __name__ == "__main__":
    main()
