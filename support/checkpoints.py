"""A stage's folder: what an earlier run left there, checkpoints, resuming, and stopping on Ctrl-C.

    <run>/stage1/heldout.json            the held-out records, in the format of the data
    <run>/stage1/metrics.jsonl           one line per logged step and per evaluation
    <run>/stage1/checkpoint.pt           all that changes while training; deleted at the end
    <run>/stage1/.lock                   keeps a second process out of the folder
    <run>/stage1/projector.safetensors   the result (stage 2 also writes adapter/), written at the end
    <run>/stage1/run.json                how it was trained, written last
"""

import hashlib
import os
import shlex
import signal
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from support.devices import DTYPES
from support.errors import UserError, explain_errors
from support.files import atomic_write, delete, lock_folder, read_json, write_json

# Settings that a resumed run may change, because the same samples are trained on in the same order. (With
# another batch_size or grad_accum, samples_per_step must still be the same.)
MAY_CHANGE = {"preset", "run", "device", "workers", "eval_every", "save_every", "batch_size", "grad_accum",
              "allow_bad", "activation_checkpointing", "resume", "restart"}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # of Ctrl-C; of kill and of cluster schedulers


@dataclass
class Progress:
    """How far a run has come."""
    steps_taken: int = 0  # optimizer steps
    samples_seen: int = 0  # of all processes
    first_metrics: dict | None = None  # what measure_heldout() returned before the first step
    bad_steps: int = 0  # steps in a row whose loss or gradient was not finite
    skipped: list = field(default_factory=list)  # sentences about records that turned out to be unusable
    records_hash: str = ""  # of the training and held-out records


def open_folder(args, stage, processes):
    """Locks the folder of a stage and reads the checkpoint of an earlier run. Returns a StageFolder. Ends the
    process if --resume finds a finished run. With --check-data, it touches nothing."""
    folder = StageFolder(args, stage, processes)
    if not args.check_data:
        if processes.rank == 0:
            lock_folder(folder.path)
        folder.read_earlier_run(args.resume, args.restart)
    return folder


class StageFolder:
    """The folder of one stage of a run. open_folder() has locked it, in rank 0, which alone writes.

    Attributes: path, stage. settings: all settings, for run.json and checkpoints. checkpoint: what
    --resume continues from, or None.
    """

    def __init__(self, args, stage, processes):
        self.path, self.stage = Path(args.run) / f"stage{stage}", stage
        self.processes, self.checkpoint = processes, None
        if self.path.parent.name in ("stage1", "stage2"):
            raise UserError(f"pass --run {shlex.quote(str(self.path.parents[1]))}, the folder of the run")
        precision = next(name for name, dtype in DTYPES.items() if dtype == processes.dtype)
        self.settings = {**vars(args), "precision": precision, "samples_per_step":
                         args.batch_size * args.grad_accum * processes.world_size}
        if stage == 2 and not args.check_data:
            # --resume refuses to continue if stage 1 has been trained again since.
            path = self.path.parent / "stage1" / "projector.safetensors"
            with explain_errors(f"read {path}"):
                self.settings["stage1_projector"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def read_earlier_run(self, resume, restart):
        """Raises UserError if a run can neither begin nor continue here. With resume, reads the checkpoint,
        or ends the process if the run is finished."""
        if restart:
            return
        path, finished = self.path / "checkpoint.pt", read_json(self.path / "run.json")
        if not resume and (finished or path.exists()):
            way = "discard it" if finished else "continue it with --resume, discard it"
            raise UserError(f"{self.path} holds {'a finished' if finished else 'an unfinished'} run: {way} "
                            "with --restart, or choose another folder with --run")
        if finished:
            self._check_same_settings(finished.get("settings", {}))
            if self.processes.rank == 0:
                delete(path)  # left if the run was killed just before its end
                print(f"{self.path} holds a finished run, so there is nothing to resume", file=sys.stderr)
            sys.exit(0)
        if not path.exists():
            if resume:
                print(f"{self.path} has no checkpoint, so this run begins at step 0")
            return
        with explain_errors(f"read {path} (if it is damaged, start again with --restart)"):
            if damaged := zipfile.ZipFile(path).testzip():  # torch.load() ignores the checksums
                raise ValueError(f"{damaged} has a wrong checksum")
            self.checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self._check_same_settings(self.checkpoint["settings"])
        print(f"resuming {self.path} at step {self.checkpoint['progress']['steps_taken']:,}")

    def _check_same_settings(self, before):
        """Raises UserError if --resume comes with other settings than `before`, those of the earlier run."""
        for name, value in self.settings.items():
            if name not in MAY_CHANGE and before.get(name) != value:
                raise UserError(f"--resume: the run in {self.path} has {name} {before.get(name)}, not "
                                f"{value}; use the same flags and files, or start again with --restart")

    def start_new(self, train_records, heldout_records):
        """Deletes the result of an earlier run and writes heldout.json. Returns the Progress of a new run."""
        if self.processes.rank == 0:
            # run.json is deleted first, so that a run that is killed here does not count as finished.
            for name in ("run.json", "checkpoint.pt", "projector.safetensors", "adapter", "metrics.jsonl"):
                delete(self.path / name)
            for path in self.path.glob("eval*.json"):
                delete(path)
            write_json(self.path / "heldout.json", list(heldout_records))
        return Progress(records_hash=hash_records(train_records, heldout_records))

    def restore(self, model, optimizer, scaler, train_records, heldout_records):
        """Restores weights, optimizer and scaler of the checkpoint. Returns the Progress. Random numbers need
        not be restored, because they depend only on seed, epoch, step and, for dropout, process."""
        checkpoint = self.checkpoint
        progress = Progress(**checkpoint["progress"])
        if progress.records_hash != hash_records(train_records, heldout_records):
            raise UserError("--resume: the records have changed since the run was interrupted, so it cannot "
                            "continue; restore the data, or start again with --restart")
        with torch.no_grad():
            for name, parameter in model.trainable_parameters().items():
                parameter.copy_(checkpoint["weights"][name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless the run computed in fp16
            scaler.load_state_dict(checkpoint["scaler"])
        return progress

    def save_checkpoint(self, progress, model, optimizer, scaler):
        """Writes checkpoint.pt, in rank 0. The other processes wait for it."""
        if self.processes.rank == 0:
            metrics = self.path / "metrics.jsonl"
            # With an open file, torch.save() says why a write failed, for example because of a full disk.
            with atomic_write(self.path / "checkpoint.pt") as temporary, open(temporary, "wb") as file:
                torch.save({"progress": asdict(progress), "settings": self.settings,
                            "weights": model.trainable_parameters(), "optimizer": optimizer.state_dict(),
                            "scaler": scaler.state_dict(),
                            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}, file)
        self.processes.barrier()


def hash_records(train_records, heldout_records):
    return train_records.fingerprint() + heldout_records.fingerprint()


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
        # print() could interrupt another print(), which is an error.
        os.write(2, b"\nfinishing this step, then saving (press again to stop at once)\n")
