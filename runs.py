"""A stage's folder while it trains: metrics, checkpoints, stopping, going on, and faults that must end it.

    <run>/stage1/metrics.jsonl           a line for each logged step, and each look at the held-out records
    <run>/stage1/checkpoint-00000400/    everything needed to go on after step 400 as if nothing had happened
    <run>/stage1/projector.safetensors   what was trained (in stage 2, also adapter/): written at the end
    <run>/stage1/run.json                what it was trained for, and on: written last of all

No pickle is written or read: tensors are safetensors, the rest is JSON.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import plumbing
from pictures import draw_curves
from plumbing import PARTS, SWITCHES, UserError, make_folder, refuse_other_parts, replacing
from weights import refuse_other_template, save

# Settings that may differ between a run and its continuation: they change nothing that is computed. Nor does
# the way in which an effective batch is cut into micro-batches.
MAY_CHANGE = {"run", "device", "cache_features", "workers", "eval_every", "log_every", "save_every",
              "batch_size", "grad_accum", "allow_bad", *SWITCHES}


class Run:
    """One stage's training run.

    Attributes:
        folder: <run>/stage1 or <run>/stage2.
        step, samples: where the run stands; not 0 after start() if it is resumed.
    """

    def __init__(self, settings, stage, processes):
        """Refuses, before any work is done, a folder that the run could not be written to or would spoil."""
        self.settings, self.stage, self.processes = settings, stage, processes
        if settings.tensorboard:
            summary_writer()  # not installed: better said now
        self.folder = make_folder(Path(settings.run) / f"stage{stage}")
        self.step = self.samples = 0
        self.before = None  # what grounding() measured before the first step
        self.failures = 0  # steps in a row without a finite gradient
        self.bad = set()  # sentences about images that could not be decoded
        self.asked_to_stop = 0  # the number of the signal
        self.log = None

        self.checkpoint = newest_checkpoint(self.folder)
        state = _read_json(self.checkpoint / "state.json") if self.checkpoint else None
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun has restarted its workers
        resume, self.restart = settings.resume or again, settings.restart and not again
        if state and not resume and not self.restart:
            raise UserError(f"{self.folder} holds an unfinished run, at step {state['step']:,}: go on with "
                            "--resume, start anew with --restart, or choose another folder with --run")
        if self.restart or not resume:
            self.checkpoint = state = None
        finished = _read_json(self.folder / "run.json")
        if finished and not self.restart:
            refuse_other_parts(finished, settings, self.folder)
        if state:
            self._refuse_changes(state["settings"])
        elif resume and finished:
            print(f"{self.folder} is finished: there is nothing to resume (--restart starts anew)")
            sys.exit(0)

    def _refuse_changes(self, before):
        for name, value in vars(self.settings).items():
            if name in before and name not in MAY_CHANGE and before[name] != value:
                raise UserError(f"--resume: the run in {self.folder} has --{name.replace('_', '-')} "
                                f"{before[name]}, not {value}; give that, or start another run with --run")
        if before["processes"] == self.processes.world:
            size = before["batch_size"] * before["grad_accum"]
            if size != self.settings.batch_size * self.settings.grad_accum:
                raise UserError(f"--resume: in {self.folder}, --batch-size × --grad-accum is {size}; change "
                                "both so that it stays so")

    # -- starting, or going on -----------------------------------------------------------------------------

    def start(self, model, template, optimizer, scaler):
        """Restores the newest checkpoint if the run is resumed, opens the log, and listens for signals."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.template = template
        size = sum(parameter.numel() for parameter in model.trainable().values()) * 4
        needed = 8 * size + 2**20  # two checkpoints of weights and Adam's two moments, the result, some air
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise UserError(f"{self.folder}: the disk has {free / 2**20:,.0f} MiB left, and the run needs "
                            f"about {needed / 2**20:,.0f}: make room, or choose another folder with --run")
        # Every process drops other units: from here on each has random numbers of its own.
        torch.manual_seed(self.settings.seed + 1_000_003 * self.processes.rank)
        metrics_bytes = 0
        if self.checkpoint:
            metrics_bytes = self._restore()
            print(f"resumed {self.folder} at step {self.step:,}")
        if self.processes.rank == 0:
            if not self.checkpoint:
                discard_checkpoints(self.folder)
            # Lines that were written after the checkpoint tell of steps that will now be taken again.
            with open(self.folder / "metrics.jsonl", "ab") as file:
                file.truncate(metrics_bytes)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self.asked_to_stop:
            os._exit(128 + number)  # the second time, at once: nothing is saved, and nothing is damaged
        self.asked_to_stop = number
        print("\nfinishing this step, then saving (once more: stop at once)", file=sys.stderr)

    def open_log(self, total_steps, num_samples):
        self.total_steps, self.num_samples = total_steps, num_samples
        self.log = Log(self.folder / "metrics.jsonl" if self.processes.rank == 0 else os.devnull, self.step,
                       total_steps, quiet=self.processes.rank > 0)
        if self.settings.tensorboard and self.processes.rank == 0:
            # What an earlier start has written of steps that will now be taken again is hidden.
            from_here = self.step and self.step + 1
            self.log.board = summary_writer()(self.folder / "tensorboard", purge_step=from_here)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def save_checkpoint(self):
        """Writes everything that the next step depends on. Every process calls this; one writes."""
        rng = torch.get_rng_state() if self.processes.device.type != "cuda" else torch.cat(
            [torch.get_rng_state(), torch.cuda.get_rng_state(self.processes.device)])
        rngs = self.processes.gather(rng)  # of every process
        if self.processes.rank == 0:
            tensors = {name: parameter.detach().cpu() for name, parameter in self.model.trainable().items()}
            for i, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{name}": tensor.cpu() for name, tensor in moments.items()}
            tensors |= {f"rng.{rank}": state for rank, state in enumerate(rngs)}
            self.log.flush()
            version, words, gauss = random.getstate()
            _, keys, *numpy_rest = np.random.get_state()
            state = {"step": self.step, "samples": self.samples, "before": self.before,
                     "failures": self.failures, "bad": sorted(self.bad),
                     "metrics_bytes": (self.folder / "metrics.jsonl").stat().st_size,
                     "scaler": self.scaler.state_dict(), "python_rng": [version, words, gauss],
                     "numpy_rng": [keys.tolist(), *numpy_rest], "template": self.template.fingerprint,
                     "settings": {**vars(self.settings), "processes": self.processes.world}}
            path = self.folder / f"checkpoint-{self.step:08d}"
            with replacing(path) as temporary:  # whole, or not there at all
                temporary.mkdir(exist_ok=True)
                save_file(tensors, temporary / "tensors.safetensors")
                (temporary / "state.json").write_text(json.dumps(state))
            discard_checkpoints(self.folder, but=path)
        self.processes.barrier()

    def _restore(self):
        state = _read_json(self.checkpoint / "state.json")
        tensors = load_file(self.checkpoint / "tensors.safetensors")
        refuse_other_template(self.template, state, self.folder)
        trained = self.model.trainable()
        if missing := trained.keys() - tensors.keys():
            raise UserError(f"{self.checkpoint} lacks {sorted(missing)[0]}: it is of another model")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])
        moments = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                moments.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({"state": moments,
                                        "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.scaler.load_state_dict(state["scaler"])
        if (name := f"rng.{self.processes.rank}") in tensors:  # else: there were fewer processes before
            size = len(torch.get_rng_state())
            torch.set_rng_state(tensors[name][:size])
            if len(tensors[name]) > size and self.processes.device.type == "cuda":
                torch.cuda.set_rng_state(tensors[name][size:], self.processes.device)
        version, words, gauss = state["python_rng"]
        random.setstate((version, tuple(words), gauss))
        keys, *rest = state["numpy_rng"]
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
        self.step, self.samples, self.before = state["step"], state["samples"], state["before"]
        self.failures, self.bad = state["failures"], set(state["bad"])
        return state["metrics_bytes"]

    # -- after every step ----------------------------------------------------------------------------------

    def check_finite(self, loss, grad_norm, window):
        """Raises UserError where going on would be of no use, before the step is taken.

        fp16 overflows now and then; GradScaler then leaves the step out and lowers its scale. Ten in a row,
        or one where there is no scaler, mean that something is wrong, and one NaN in the weights ruins the
        run.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.failures = 0
            return
        self.failures += 1
        if self.scaler.is_enabled() and self.failures < 10:
            return  # scaler.step() sees the same overflow, and leaves the step out
        names = ", ".join(window.names[:16]) + (", …" if len(window.names) > 16 else "")
        advice = ("try a lower --lr or --precision fp32" if self.scaler.is_enabled() else
                  "look at these records, and try a lower --lr")
        raise UserError(f"step {self.step + 1}: loss {loss:g}, gradient norm {grad_norm:g}, "
                        f"{self.failures} in a row; {advice}. Records of the batch: {names}")

    def step_done(self, window, **metrics):
        """Counts the step and, if its time has come, logs it."""
        self.step += 1
        self.samples += window.size
        self._count_bad(window)
        self.log.count(window)
        if self.step % self.settings.log_every == 0 or self.step == self.total_steps:
            self.log.step(self.step, self.samples, padding=window.padding,
                          **{name: float(value) for name, value in metrics.items()})
        self.log.bar.update()

    def save_if_due(self):
        """Saves a checkpoint at intervals, at the last step, and when somebody asks the run to stop."""
        stop = self.processes.any(self.asked_to_stop)
        if self.step % self.settings.save_every == 0 or self.step == self.total_steps or stop:
            self.save_checkpoint()
        if stop:
            self.log.close()
            print(f"stopped at step {self.step:,} of {self.total_steps:,} and saved in {self.folder}: go on "
                  "with the same command and --resume", file=sys.stderr)
            sys.exit(128 + stop)

    def _count_bad(self, window):
        new = [sentence for sentence in window.bad if sentence not in self.bad]
        if not new:
            return
        self.bad.update(new)
        with open(self.folder / f"bad_images{self.processes.rank or ''}.txt", "a", encoding="utf-8") as file:
            file.writelines(sentence + "\n" for sentence in new)
        # Of the samples seen so far; the first thousand count as one, or the very first bad one would be too
        # many.
        share = len(self.bad) * self.processes.world / max(self.samples, min(1000, self.num_samples))
        if share > self.settings.allow_bad:
            raise UserError(f"{len(self.bad)} images could not be decoded, more than --allow-bad "
                            f"{self.settings.allow_bad} allows: see {file.name}; the last: {new[-1]}")

    # -- the end -------------------------------------------------------------------------------------------

    def finish(self, held_out):
        """Saves what was trained and its run.json, and drops the checkpoints, in this order."""
        self.log.close()
        if self.processes.rank == 0:
            values = vars(self.settings)
            save(self.model, self.folder, {
                # what load() needs, then where it comes from
                "stage": self.stage, **{name: values[name] for name in PARTS},
                "template": self.template.fingerprint,
                "steps": self.step, "held_out": held_out, "bad_images": len(self.bad), "settings": values,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
            discard_checkpoints(self.folder)
            print(draw_curves(self.settings.run))
        if self.bad:
            print(f"{len(self.bad)} images could not be decoded; the records after them took their place: "
                  f"see {self.folder / 'bad_images.txt'}")
        self.processes.barrier()


def newest_checkpoint(folder):
    """The newest whole checkpoint; one whose writing was cut short still has its temporary name."""
    return max(folder.glob("checkpoint-*"), default=None)


def discard_checkpoints(folder, but=None):
    """Deletes checkpoints. Each loses its name first: a run killed in the middle of deleting one would leave
    half of it under a name that promises a whole."""
    for old in folder.glob("checkpoint-*"):
        if old != but:
            old.rename(old.with_name(f".{old.name}.old"))
    for old in folder.glob(".checkpoint-*.old"):
        shutil.rmtree(old)


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def summary_writer():
    """TensorBoard's writer; only --tensorboard needs it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard"
                        ) from error
    return SummaryWriter


class Log:
    """The progress bar (loss, learning rate, samples/s, time left), and metrics.jsonl: one object a line."""

    def __init__(self, path, step, total_steps, quiet):
        self.file = open(path, "a", encoding="utf-8")
        # Into a file or a pipe the bar would print thousands of lines: a few will do.
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=quiet,
                        mininterval=0.2 if sys.stderr.isatty() else 15)
        self.board = None  # TensorBoard's writer, if asked for
        self.started = time.time()
        self._begin_interval()

    def _begin_interval(self):
        """What is measured from one line to the next, looks at the held-out records aside."""
        self.began, self.samples, self.waited = time.time(), 0, 0.0

    def count(self, window):
        self.samples += window.size
        self.waited += window.waited

    def step(self, step, samples, **values):
        """A line about the training; `samples` is how many were seen so far."""
        seconds = time.time() - self.began
        rate = self.samples / seconds
        self._write(step=step, samples=samples, **values, samples_per_s=rate, waiting=self.waited / seconds)
        self._begin_interval()
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, lr {values['lr']:.1e}, {rate:.1f} samples/s",
                                 refresh=False)

    def held_out(self, step, measured, generated, truth):
        """A line about the held-out records, and what the model says to the first of them."""
        self._write(step=step, **{f"heldout_{name}": value for name, value in measured.items()},
                    generated=generated)
        tqdm.write(f"step {step}: {plumbing.outcome(measured)}\n    says:  {generated}\n    truth: {truth}")
        self._begin_interval()

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def _write(self, **values):
        self.file.write(json.dumps({**values, "seconds": round(time.time() - self.started, 2)}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                if name not in ("step", "generated"):
                    self.board.add_scalar(name, value, values["step"])

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()
