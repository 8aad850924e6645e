"""A stage's folder: what an earlier run left there, checkpoints, resuming, and stopping on Ctrl-C.

    <run>/stage1/metrics.jsonl           one line per logged step and per evaluation
    <run>/stage1/checkpoint.pt           all that the next step depends on; deleted at the end
    <run>/stage1/skipped.txt             records whose images could not be decoded, if there are any
    <run>/stage1/.lock                   keeps a second process out of the folder
    <run>/stage1/projector.safetensors   the result (stage 2 also writes adapter/), written at the end
    <run>/stage1/run.json                how it was trained, written last
"""

import atexit
import multiprocessing
import os
import signal
import stat
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from support.errors import Stopped, UserError
from support.files import atomic_write, delete, lock_folder, make_writable_folder, read_json

# Settings that a resumed run may change, because they do not change what is computed. batch_size and
# grad_accum may change if their product stays the same, which is checked separately.
MAY_CHANGE = {"preset", "run", "device", "workers", "eval_every", "log_every", "save_every", "batch_size",
              "grad_accum", "allow_bad", "tracker", "activation_checkpointing", "resume", "restart",
              "check_data", "decode", "effective_batch"}
# Ctrl-C, the signal of kill and of cluster schedulers, and that of a closed terminal (not on Windows).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Progress:
    """How far a run has come."""
    step: int = 0  # optimizer steps taken
    samples: int = 0  # samples seen, over all processes
    before: dict = None  # the held-out measurement before the first step
    bad_steps: int = 0  # steps in a row whose loss or gradient was not finite
    skipped: list = field(default_factory=list)  # sentences about images that could not be decoded


def open_stage_folder(folder, settings, world_size):
    """Creates a stage's folder and returns its checkpoint to resume from, or None to begin at step 0.

    Also sets settings.effective_batch, the number of samples per step. Raises UserError if the folder is not
    writable, or another process trains in it, or it holds a run and neither --resume nor --restart was given,
    or --resume comes with other settings. Raises Stopped if --resume finds a run that is finished.
    """
    settings.effective_batch = settings.batch_size * settings.grad_accum * world_size
    folder = make_writable_folder(folder)
    if int(os.environ.get("RANK", 0)) == 0:  # of torchrun's processes, only one writes
        lock_folder(folder)
    for name in ("metrics.jsonl", "skipped.txt"):  # files that are appended to
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a symbolic link, and its target would be changed: delete it")
    path = folder / "checkpoint.pt"
    # If torchrun has restarted its workers, they continue from their checkpoint, even with --restart.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if settings.restart and not (restarted and path.exists()):
        return None
    resume = settings.resume or restarted
    if finished := read_json(folder / "run.json"):
        if resume:
            before = finished.get("settings") if isinstance(finished, dict) else None
            if not isinstance(before, dict):
                raise UserError(f"{folder}/run.json is damaged: train again with --restart")
            check_same_settings(folder, before, settings)
            discard_checkpoint(folder)  # left if the run was killed just before its end
            raise Stopped(f"{folder} holds a finished run, so there is nothing to resume", 0)
        raise UserError(f"{folder} holds a finished run: discard it with --restart, or choose another folder "
                        "with --run")
    if path.exists() and not resume:
        raise UserError(f"{folder} holds an unfinished run: continue it with --resume, discard it with "
                        "--restart, or choose another folder with --run")
    if not path.exists():
        if resume:
            print(f"{folder} has no checkpoint, so this run begins at step 0")
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load() does not compare the checksums in the file
                raise ValueError("wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before, progress = checkpoint["settings"], Progress(**checkpoint["progress"])
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path} is damaged ({reason}): start again with --restart") from error
    check_same_settings(folder, before, settings)
    print(f"resuming {folder} at step {progress.step:,}")
    return checkpoint


def check_same_settings(folder, before, settings):
    """Raises UserError if --resume comes with other settings than `before`, those of the earlier run."""
    if before.get("stage1_checksum") != vars(settings).get("stage1_checksum"):  # stage 2 has this setting
        raise UserError(f"--resume: stage 1 has been trained again since the run in {folder} began; start "
                        "stage 2 again with --restart")
    for name, value in vars(settings).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--resume: the run in {folder} has {flag} {before.get(name)}, not {value}; use "
                            "the same value, or start another run with --run")
    if settings.effective_batch != before.get("effective_batch"):
        raise UserError(f"--resume: the run in {folder} has {before.get('effective_batch')} samples per step, "
                        f"not {settings.effective_batch}; change --batch-size and --grad-accum together")


def discard_results(folder):
    """Deletes what an earlier run wrote here, so that it cannot be mistaken for the result of this run."""
    # run.json first, because without it the rest does not count as finished.
    for name in ("run.json", "checkpoint.pt", "projector.safetensors", "adapter", "metrics.jsonl",
                 "skipped.txt"):
        delete(folder / name)


def discard_checkpoint(folder):
    """Deletes the checkpoint of a run that is finished."""
    delete(folder / "checkpoint.pt")


def save(folder, progress, model, optimizer, scaler, settings, fingerprint, processes):
    """Writes checkpoint.pt. Every process calls this, because each has random numbers of its own; rank 0
    writes.

    fingerprint: of the training records, see RecordSet.fingerprint().
    """
    rng = [torch.get_rng_state()]
    if processes.device.type == "cuda":
        rng.append(torch.cuda.get_rng_state(processes.device))
    rngs = processes.gather(rng)
    if processes.rank == 0:
        metrics = folder / "metrics.jsonl"
        # torch.save() says why a write failed (for example, a full disk) only if it gets an open file.
        with atomic_write(folder / "checkpoint.pt") as temporary, open(temporary, "wb") as file:
            torch.save({
                "progress": asdict(progress), "settings": vars(settings),
                "weights": model.trainable(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "rng": rngs, "records": fingerprint,
                "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}, file)
    processes.barrier()


def restore(checkpoint, model, optimizer, scaler, fingerprint, processes):
    """Restores weights, optimizer, scaler and random numbers, and returns the Progress."""
    if checkpoint["records"] != fingerprint:
        raise UserError("--resume: the training records have changed since the run was interrupted, so its "
                        "order of samples is lost; restore the data, or start again with --restart")
    trainable = model.trainable()
    if trainable.keys() != checkpoint["weights"].keys():
        raise UserError("--resume: the checkpoint belongs to another model; start again with --restart")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(checkpoint["weights"][name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run computed in fp16
        scaler.load_state_dict(checkpoint["scaler"])
    if processes.rank < len(checkpoint["rng"]):  # else there were fewer processes before
        rng = checkpoint["rng"][processes.rank]
        torch.set_rng_state(rng[0])
        if len(rng) > 1 and processes.device.type == "cuda":
            torch.cuda.set_rng_state(rng[1], processes.device)
    return Progress(**checkpoint["progress"])


class StopSignal:
    """Remembers a stop signal, so that the loop can finish its step and save. `number` is 0 until then.

    A second Ctrl-C or SIGTERM ends the process at once. Nothing is saved then, and nothing is damaged.
    """

    def __init__(self):
        self.number = 0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup lets a run ignore SIGHUP
                signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if number not in (signal.SIGINT, signal.SIGTERM):  # the terminal is gone; printing would fail
            for output in (sys.stdout.fileno(), sys.stderr.fileno()):
                if stat.S_ISCHR(os.fstat(output).st_mode):  # a terminal, and not a log file
                    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        elif self.number:
            os._exit(128 + number)
        self.number = number
        print("\nfinishing this step, then saving (press again to stop at once)", file=sys.stderr)


def ignore_signals_in_worker(worker):
    """Lets DataLoader workers ignore the stop signals, which reach every process. The main process still
    needs the workers to finish its step. Afterwards it ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """Kills DataLoader workers that are left at exit, after an error. Otherwise multiprocessing would send
    them SIGTERM, which they ignore, and wait forever."""
    if os.name != "nt":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report them as lost
    for child in multiprocessing.active_children():
        child.kill()
