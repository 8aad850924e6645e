"""A stage's folder: what an earlier run left there, checkpoints, resuming, and stopping on Ctrl-C.

    <run>/stage1/metrics.jsonl           one line per logged step and per evaluation
    <run>/stage1/checkpoint.pt           all that the next step depends on; deleted at the end
    <run>/stage1/skipped.txt             records whose images could not be decoded, if there are any
    <run>/stage1/.lock                   keeps a second process out of the folder
    <run>/stage1/projector.safetensors   the result (stage 2 also writes adapter/), written at the end
    <run>/stage1/run.json                how it was trained, written last
"""

import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, field

import torch

from support.errors import UserError, explain_errors
from support.files import atomic_write, delete, lock_folder, make_writable_folder, read_json

# Settings that a resumed run may change, because the same samples are trained on in the same order.
# check_same_settings() also demands the same number of samples per step.
MAY_CHANGE = {"preset", "run", "device", "workers", "eval_every", "log_every", "save_every", "batch_size",
              "grad_accum", "allow_bad", "activation_checkpointing", "resume", "restart", "effective_batch"}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # of Ctrl-C; of kill and of cluster schedulers


@dataclass
class Progress:
    """How far a run has come."""
    step: int = 0  # optimizer steps taken
    samples: int = 0  # samples seen, over all processes
    grounding_before: dict = None  # the held-out measurement before the first step
    bad_steps: int = 0  # steps in a row whose loss or gradient was not finite
    skipped: list = field(default_factory=list)  # sentences about images that could not be decoded
    records_hash: str = ""  # of the training records


def lock_and_find_checkpoint_or_exit(folder, settings, processes):
    """Locks a stage's folder for this process and returns its checkpoint, or None to begin at step 0. With
    --check-data it does nothing. Ends the process if --resume finds a run that is finished. Raises UserError
    if the run cannot begin or continue in this folder."""
    if settings["check_data"]:
        return None
    folder = make_writable_folder(folder)
    if processes.rank == 0:  # the only one that writes
        lock_folder(folder)
    path, finished = folder / "checkpoint.pt", read_json(folder / "run.json")
    if settings["restart"]:
        return None
    if not settings["resume"] and (finished or path.exists()):
        raise UserError(f"{folder} holds {'a finished' if finished else 'an unfinished'} run: "
                        f"{'' if finished else 'continue it with --resume, '}discard it with --restart, or "
                        "choose another folder with --run")
    if finished:
        check_same_settings(folder, finished["settings"], settings)
        delete(path)  # left if the run was killed just before its end
        print(f"{folder} holds a finished run, so there is nothing to resume", file=sys.stderr)
        sys.exit(0)
    if not path.exists():
        if settings["resume"]:
            print(f"{folder} has no checkpoint, so this run begins at step 0")
        return None
    with explain_errors(f"resume from {path}, which is damaged; start again with --restart"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before, progress = checkpoint["settings"], Progress(**checkpoint["progress"])
    check_same_settings(folder, before, settings)
    print(f"resuming {folder} at step {progress.step:,}")
    return checkpoint


def check_same_settings(folder, before, settings):
    """Raises UserError if --resume comes with other settings than `before`, those of the earlier run."""
    if before.get("stage1_checksum") != settings.get("stage1_checksum"):  # stage 2 has this setting
        raise UserError(f"--resume: stage 1 has been trained again since the run in {folder} began; start "
                        "stage 2 again with --restart")
    for name, value in settings.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--resume: the run in {folder} has {flag} {before.get(name)}, not {value}; use "
                            "the same flags, or start another run with --run")
    if settings["effective_batch"] != before["effective_batch"]:
        raise UserError(f"--resume: the run in {folder} has {before['effective_batch']} samples per step, "
                        f"not {settings['effective_batch']}; change --batch-size and --grad-accum together")


def save(folder, progress, model, optimizer, scaler, settings, processes):
    """Writes checkpoint.pt. Every process calls this, because each has random numbers of its own; rank 0
    writes."""
    rng = [torch.get_rng_state()]
    if processes.device.type == "cuda":
        rng.append(torch.cuda.get_rng_state(processes.device))
    rngs = processes.gather(rng)
    if processes.rank == 0:
        metrics = folder / "metrics.jsonl"
        # With an open file, torch.save() says why a write failed, for example because of a full disk.
        with atomic_write(folder / "checkpoint.pt") as temporary, open(temporary, "wb") as file:
            torch.save({
                "progress": asdict(progress), "settings": settings, "weights": model.trainable_parameters(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": rngs,
                "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}, file)
    processes.barrier()


def restore_or_clear(checkpoint, folder, model, optimizer, scaler, records, processes):
    """Restores the weights, optimizer, scaler and random numbers of `checkpoint` and returns its Progress. If
    it is None, deletes what an earlier run left in the folder. `records`: the training RecordSet."""
    # Without this, scaler.unscale_() would fail in a process without samples.
    scaler.scale(torch.zeros((), device=processes.device))
    if checkpoint is None:
        if processes.rank == 0:  # run.json first, because without it the rest does not count as finished
            for name in ("run.json", "eval.json", "checkpoint.pt", "projector.safetensors", "adapter",
                         "metrics.jsonl", "skipped.txt"):
                delete(folder / name)
        return Progress(records_hash=records.fingerprint())
    progress = Progress(**checkpoint["progress"])
    if progress.records_hash != records.fingerprint():
        raise UserError("--resume: the training records have changed since the run was interrupted, so its "
                        "order of samples is lost; restore the data, or start again with --restart")
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            parameter.copy_(checkpoint["weights"][name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run computed in fp16
        scaler.load_state_dict(checkpoint["scaler"])
    if processes.rank < len(checkpoint["rng"]):  # else there were fewer processes before
        rng = checkpoint["rng"][processes.rank]
        torch.set_rng_state(rng[0])
        if len(rng) > 1 and processes.device.type == "cuda":
            torch.cuda.set_rng_state(rng[1], processes.device)
    return progress


def stop_if_diverged(progress, loss, grad_norm, scaler, records, indices):
    """Raises UserError if the loss or the gradient is not finite, because the step would spoil all weights.
    In fp16 it allows nine such steps in a row, because scaler.step() skips them and scaler.update() lowers
    the scale. `indices` lists the micro-batches of the step, whose records are named."""
    progress.bad_steps = 0 if math.isfinite(loss + grad_norm) else progress.bad_steps + 1
    if progress.bad_steps >= (10 if scaler.is_enabled() else 1):
        ids = [str(records[i].get("id")) for micro_batch in indices for i in micro_batch]
        raise UserError(f"step {progress.step + 1}: loss {loss:g}, gradient norm {grad_norm:g}; try a lower "
                        f"--lr, or look at the records of this step: {', '.join(ids[:16])}")


class StopSignal:
    """A context in which Ctrl-C and SIGTERM only set `number`, which is 0 until then, so that the loop can
    finish its step and save. A second signal ends the process at once, without saving."""

    def __enter__(self):
        self.number = 0
        self.handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
        print("\nfinishing this step, then saving (press again to stop at once)", file=sys.stderr)
