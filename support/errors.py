"""Errors that a user can fix, and how a script ends with them: in one sentence and an exit code."""

import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

# Control characters, line separators, changes of the writing direction, and half characters.
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text, keep=""):
    """Returns the text with unprintable characters escaped, except those to keep, because a file name can
    contain a line break or a code that changes the terminal."""
    return UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


class UserError(Exception):
    """Something that the user can fix. The text is one sentence: what is wrong and what to do."""


class BadRecord(UserError):
    """A record that cannot be trained on. `reason` is one of a fixed set, so callers can count failures by
    kind. A DataLoader worker passes the error on with one finished sentence as its only argument."""

    def __init__(self, record, reason=None, detail=""):
        self.reason = reason
        name = record.get("id", "without an id") if isinstance(record, dict) else None
        super().__init__(record if reason is None else
                         printable(f"record {repr(name)[:80]}: {reason}{detail and ': ' + detail}"))


@contextmanager
def explain_errors(action):
    """Turns every exception into the UserError "cannot <action>: …". It is for reading and writing files,
    because libraries can raise almost anything if a file is damaged or the disk is full."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot {action}: {reason[:300]}") from error


def run_script(main):
    """Runs main(). A UserError exits with its sentence and code 1; a bug still shows its traceback."""
    transformers.logging.disable_progress_bar()  # the bar of loading weights
    # peft 0.21 asks transformers 5 for an attribute by its old name. The user can do nothing about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # Older versions of transformers 5 lack the new names activation_checkpointing_enable and cache.
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated.*Use `cache`", FutureWarning)
    script = Path(sys.argv[0]).name
    for output in (sys.stdout, sys.stderr):  # a character that the terminal lacks must not end a run
        if hasattr(output, "reconfigure"):  # not in a notebook
            output.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():  # not after an error, because other processes may still be waiting in a sum
            dist.destroy_process_group()
    except UserError as error:
        # An error of a DataLoader worker arrives as text, with the worker's traceback above it.
        sentence = re.split(r"support\.errors\.(?:UserError|BadRecord): ", str(error))[-1].strip()
        sys.exit(f"{script}: {printable(sentence)}")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "shared memory" in str(error):
            sys.exit(f"{script}: the worker processes have too little shared memory to pass their batches "
                     "on. Pass --workers 0, or start Docker with --shm-size=4g")
        if re.search("DataLoader worker.*(exited unexpectedly|signal: Killed)", str(error)):
            sys.exit(f"{script}: a worker process was killed, probably because the memory was full. Lower "
                     "--workers")
        if not is_out_of_memory(error):
            raise
        details = (str(error).splitlines() or ["no details"])[0]
        advice = ("Lower --batch-size and raise --grad-accum; see docs/memory_and_speed.md"
                  if script.startswith("stage") else
                  "Lower --batch-size, if there is one; or use a GPU with more memory, or --device cpu")
        sys.exit(f"{script}: out of memory ({details}). {advice}")
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


def is_out_of_memory(error):
    """Returns True for a lack of memory. On a CPU, PyTorch reports it as a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory"))
