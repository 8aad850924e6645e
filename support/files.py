"""Files: where the inputs are, and writing outputs so that a killed run never leaves half a file.

Used by data.py.
"""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from support.errors import UserError, explain_errors

REPOSITORY = Path(__file__).resolve().parents[1]


def find_file(name):
    """Returns the path of a file or folder, relative to the current folder or to this repository."""
    for path in (Path(name), REPOSITORY / name):
        if os.path.exists(path):  # Path.exists() raises an error if the name is too long
            return path
    hint = ": tools/download.sh fetches it" if str(name).startswith("data/") else ""
    raise UserError(f"{name} does not exist{hint}")


def make_writable_folder(path):
    """Creates a folder and returns its path. Raises UserError if it is not writable."""
    path = Path(path)
    with explain_errors(f"write to {path}; choose another folder with --run"):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path


@cache  # keeps the lock; a second stage in this process gets the one that the process already holds
def lock_folder(folder):
    """Locks a folder, given by its absolute path, until this process ends. Raises UserError if another
    process holds the lock. The operating system releases it, so a killed run leaves no lock behind."""
    lock = FileLock(folder / ".lock")
    with explain_errors(f"lock {folder}"):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"another process is training in {folder}: wait until it ends, or choose another "
                            "folder with --run") from error
    return lock


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`; what is written there, a file or a folder, then replaces `path`.

    The data are flushed to the disk before the rename. A run killed at any moment leaves the old or the new
    version, never half of one. (An old folder is deleted first, so a kill in between leaves none.)
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_errors(f"write {path}"):
        delete(temporary)  # left by a run that was killed here
        yield temporary
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
        if path.is_dir():  # a rename cannot replace a folder with contents
            delete(path)
        os.replace(temporary, path)


def delete(path):
    """Deletes a file or a folder with everything in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    """Returns the content of a JSON file, or None if there is no such file."""
    if not os.path.exists(path):
        return None
    with explain_errors(f"read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_part(path, offset, size):
    """Returns `size` bytes of a file. It opens the file for every call (about 0.01 ms), because DataLoader
    workers that share an open file would move its position while others read."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
