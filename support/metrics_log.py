"""The log of a stage: a progress bar, and metrics.jsonl with one JSON object per line."""

import json
import math
import sys
import time
from itertools import chain

import torch
from tqdm import tqdm

from support.errors import UserError, explain_errors, printable
from support.processes import hide_bar

LOG_EVERY = 5  # steps between two lines of metrics.jsonl about the training


class MetricsLog:
    """Writes the metrics of one stage to metrics.jsonl in its StageFolder, in rank 0. Lines written after
    the checkpoint that the run resumes from are removed, because their steps are taken again."""

    def __init__(self, stage_folder, progress, total_steps):
        self.path, self.processes, self.file = stage_folder.path, stage_folder.processes, None
        self.progress, self.total_steps = progress, total_steps
        if self.processes.rank == 0:
            path = self.path / "metrics.jsonl"
            length = (stage_folder.checkpoint or {}).get("metrics_bytes", 0)
            with explain_errors(f"write {path}"):
                self.file = open(path, "ab")
                self.file.truncate(min(length, self.file.tell()))
        self.bar = tqdm(total=total_steps, initial=progress.steps_taken, unit="step", dynamic_ncols=True,
                        disable=hide_bar())
        self.last_generated, self.line_printed_at = None, 0.0
        self.started, self.first_step = time.time(), progress.steps_taken
        self._start_interval()

    def _start_interval(self):
        self.interval_start, self.interval_waiting, self.interval_tokens = time.time(), 0.0, 0

    def log_step(self, optimizer, micro_batches, seconds_waiting, **metrics):
        """Counts a step: the micro-batches of this process, and the seconds that it waited for them. Logs
        every fifth step and the last: the metrics and learning rates, tokens per second, the fraction of
        time spent waiting for data, the seconds left, evaluations included, and the peak memory of a GPU."""
        step, now = self.progress.steps_taken, time.time()
        self.interval_tokens += sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        self.interval_waiting += seconds_waiting
        self.bar.update()
        if step % LOG_EVERY and step != self.total_steps:
            return
        seconds = now - self.interval_start
        rates = (group["lr"] for group in optimizer.param_groups)
        metrics = {
            **{name: float(value) for name, value in metrics.items()},
            **dict(zip(("lr", "projector_lr"), rates)),
            "samples": self.progress.samples_seen,
            "tokens_per_s": self.processes.sum(self.interval_tokens) / seconds,
            "waiting": self.interval_waiting / seconds,
            "seconds_left": (now - self.started) / (step - self.first_step) * (self.total_steps - step)}
        text = (f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s, waiting for data "
                f"{metrics['waiting']:.0%}")
        if self.processes.device.type == "cuda":
            metrics["gpu_gib"] = torch.cuda.max_memory_allocated(self.processes.device) / 2**30
            text += f", GPU memory {metrics['gpu_gib']:.1f} GiB"
        self._write(step, **metrics)
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and now - self.line_printed_at > 60:  # in place of the bar, once a minute
            self.line_printed_at = now
            left = tqdm.format_interval(metrics["seconds_left"])
            print(f"step {step} of {self.total_steps}: {text}, {left} left", flush=True)
        self._start_interval()

    def report_skipped(self, sentences, num_samples, allow_bad):
        """Prints sentences about records that turned out to be unusable, of all processes, each once, and
        adds them to progress.skipped. Raises UserError if they are more than the fraction allow_bad of the
        samples."""
        skipped = self.progress.skipped
        for sentence in dict.fromkeys(chain(*self.processes.gather(sentences))):
            if sentence not in skipped:
                skipped.append(sentence)
                tqdm.write(f"left out: {sentence}")
        if len(skipped) > allow_bad * num_samples:
            raise UserError(f"{len(skipped)} of {num_samples:,} records cannot be used, more than "
                            f"--allow-bad allows; the last: {skipped[-1]}")

    def log_heldout(self, metrics, generated, reference, nearest_tokens):
        """Logs what evaluate_heldout() returned. tools/page.py shows the nearest tokens."""
        step = self.progress.steps_taken
        values = {f"heldout_{name}": value for name, value in metrics.items()}
        self._write(step, **values, generated=generated, nearest_tokens=nearest_tokens)
        text = f"step {step}: {format_metrics(metrics)}"
        if generated != self.last_generated or step == self.total_steps:  # else it was shown before
            text += printable(f"\n    generated: {generated}\n    reference: {reference}", keep="\n")
        self.last_generated = generated
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        if step == 0:
            self.started = time.time()
        self._start_interval()

    def _write(self, step, **values):
        if self.file:
            # JSON has no infinity, which is the gradient norm of a step that overflows in fp16.
            finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in values.items()}
            line = json.dumps({"step": step, **finite, "time": round(time.time(), 2)}, ensure_ascii=False)
            with explain_errors(f"write {self.file.name}"):
                self.file.write(line.encode("utf-8", "replace") + b"\n")
                self.file.flush()  # a checkpoint stores the length of this file

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()

    def close_unfinished(self):
        """Closes the log of a run that a signal has stopped, and prints how to continue it."""
        self.close()
        if self.processes.rank == 0:
            print(f"saved {self.path} at step {self.progress.steps_taken:,} of {self.total_steps:,}: "
                  "continue with --resume and the same flags, without --restart", file=sys.stderr)


def format_metrics(metrics):
    """Returns one line about what measure_heldout() returned."""
    text = (f"held-out loss {metrics['loss']:.3f} (different image {metrics['loss_different']:.3f}); "
            f"correct image more likely: {metrics['correct_more_likely']:.1%} (chance 50%)")
    if metrics.get("same_image"):
        text += f"; records without a different image: {metrics['same_image']}"
    if names := metrics.get("not_finite"):
        text += (f"; left out, because the loss is not finite: {', '.join(names[:5])}"
                 f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; pass --precision fp32")
    return text
