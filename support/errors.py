"""Errors that a user can fix, and how a script ends with them: in one sentence and an exit code."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

# Control characters, line separators, changes of the writing direction, and surrogates (halves of UTF-16
# pairs).
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text, keep=""):
    """Returns the text of a record, a file name or a model with unprintable characters escaped, except
    those to keep, because such a text can contain a code that changes the terminal."""
    return UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


class UserError(Exception):
    """Something that the user can fix. The text is one sentence: what is wrong and what to do."""


class BadRecord(UserError):
    """A record that cannot be trained on. `reason` is one of a fixed set, so callers can count failures by
    kind."""

    def __init__(self, record, reason, detail=""):
        self.reason = reason
        name = repr(record.get("id"))[:80]
        super().__init__(printable(f"record {name}: {reason}{detail and ': ' + detail}"))


@contextmanager
def explain_errors(action):
    """Turns every exception into the UserError "cannot <action>: …", except a UserError and a lack of memory.
    Put it only around calls of a library that read or write a file, because these can raise almost anything
    if the file is damaged or the disk is full. Around code of this project it would hide the line of a bug.
    """
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
    """Runs main(). A UserError or a lack of memory ends with one sentence and code 1. Ctrl-C, or a reader of
    the output that has gone, ends with code 130. Every other error shows its traceback."""
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
        sentence = str(error).rpartition("support.errors.UserError: ")[2].strip()
        sys.exit(f"{script}: {printable(sentence)}")
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if "unable to allocate shared memory" in str(error):
            sys.exit(f"{script}: /dev/shm is too small for the workers: pass --workers 0, or enlarge it "
                     "(docker run --shm-size=1g)")
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{script}: out of memory ({str(error).partition(chr(10))[0]}). Lower --batch-size, and "
                 "raise --grad-accum if there is one; see docs/memory_and_speed.md")
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


def is_out_of_memory(error):
    """Returns True for a lack of memory. PyTorch often reports it as a plain RuntimeError."""
    words = "can't allocate memory", "not enough memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)
