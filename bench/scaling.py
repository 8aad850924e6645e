"""Does the cost grow as it should? With the number of records not at all, with an answer's length in a line.

There is nothing to run in this file; see bench.py (--only scaling). docs/scaling.png is drawn here.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from cost import timed
from data_scale import write_chat_json
from sides import ROOT, Ours, build_ours, micro_batches, sample_of_turns

from data import ChatDataset, ChatTemplate
from storage import ImageStore, Records

RECORDS = (1_000, 10_000, 100_000, 595_375)
ANSWERS = (32, 64, 128, 256, 512, 1024)


def record_times(args, shape):
    """{records in the file: microseconds to draw one at random, and to make ids and labels of it}."""
    template = ChatTemplate(ROOT / "toy" / "llama-chat")
    rng, times, datasets = np.random.default_rng(0), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in RECORDS:
            path = Path(folder) / f"{count}.json"
            write_chat_json(path, count)
            parts = (template, None, shape.image_tokens, 2048)
            datasets[count] = ChatDataset(Records(path), ImageStore(folder), np.arange(count), *parts)
        draws, rounds = (500, 5) if args.quick else (2000, 9)
        seconds = {count: [] for count in RECORDS}
        for _ in range(rounds):  # by turns, for the machine's speed drifts
            for count, dataset in datasets.items():
                drawn = rng.integers(0, count, draws)
                started = time.perf_counter()
                for i in drawn:
                    dataset.tokens(dataset.record(i))
                seconds[count].append((time.perf_counter() - started) / draws)
        for count in RECORDS:
            times[count] = 1e6 * statistics.median(seconds[count])
            print(f"  {count:>8,} records: {times[count]:6.0f} µs a sample", flush=True)
    return times


def answer_times(args, shape):
    """{tokens of the answer: seconds of a stage-2 step with one sample}."""
    rng = np.random.default_rng(0)
    side = Ours(build_ours(shape, 2, args.device, args.dtype), args.device, args.dtype)
    batches = {a: micro_batches([sample_of_turns(shape, [(20, a)], rng)], 1) for a in ANSWERS}
    side.step(batches[ANSWERS[0]])
    seconds = {answer: [] for answer in ANSWERS}
    for _ in range(2 if args.quick else 5):
        for answer, batch in batches.items():
            seconds[answer].append(timed(lambda: side.step(batch), args.device)[0])
    times = {answer: min(times) for answer, times in seconds.items()}  # the least: noise only adds
    for answer, time_ in times.items():
        print(f"  {answer:>8,} tokens of answer: {time_:7.3f} s a step", flush=True)
    return times


def scaling(args, shape):
    records, answers = record_times(args, shape), answer_times(args, shape)
    flat = max(records.values()) / min(records.values())
    lengths, seconds = np.array(list(answers)), np.array(list(answers.values()))
    slope, start = np.polyfit(lengths, seconds, 1)
    off = float(np.abs(start + slope * lengths - seconds).max() / seconds.max())
    print(f"  records: the slowest size takes {flat:.2f} × the fastest")
    print(f"  answers: {start:.3f} s + {1e3 * slope:.3f} ms a token; off by {off:.1%} of the longest at most")
    if args.plot:
        draw(args, records, answers, start, slope)
    return {
        "us_per_sample_by_records": records,
        "seconds_by_answer_tokens": answers,
        "records_slowest_over_fastest": flat,
        "answers_off_the_line": off,
    }


def draw(args, records, answers, start, slope):
    try:
        import matplotlib  # optional: for this picture alone
    except ImportError:
        print("  no picture: pip install matplotlib draws it")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.semilogx(list(records), list(records.values()), "o-")
    left.set(xlabel="records in the file", ylabel="µs a sample", ylim=(0, 1.5 * max(records.values())))
    left.set_title("A record drawn at random, tokenised")
    right.plot(list(answers), list(answers.values()), "o", label="measured")
    ends = np.array([0, max(answers)])
    right.plot(ends, start + slope * ends, "-", label=f"{start:.2f} s + {1e3 * slope:.2f} ms a token")
    right.set(xlabel="tokens of the answer", ylabel="s a step", xlim=(0, None), ylim=(0, None))
    right.set_title(f"A stage-2 step, one sample ({args.geometry}, {args.precision}, {args.device})")
    right.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.savefig(args.plot, dpi=110)
    pyplot.close(figure)
    print(f"  drawn: {args.plot}")
