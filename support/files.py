"""Files: where the inputs are, and writing outputs so that a killed run never leaves half a file."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from support.errors import UserError, is_out_of_memory

REPOSITORY = Path(__file__).resolve().parents[1]


def find_file(name):
    """Returns the path of a file or folder, relative to the current folder or to this repository."""
    for path in (Path(name), REPOSITORY / name):
        if os.path.exists(path):  # Path.exists() raises an error if the name is too long
            return path
    makers = {"data/small/": ": python -m tools.small writes it", "data/": ": tools/download.sh fetches it"}
    hint = next((hint for start, hint in makers.items() if str(name).startswith(start)), "")
    raise UserError(f"{name} does not exist{hint}")


WRONG_FORMATS = {  # first bytes of files that are often mistaken for JSON or for an image
    b"version https://git-lfs": "a Git LFS pointer instead of the file: run git lfs pull",
    b"PAR1": "a Parquet file: save it as JSON", b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK\3\4": "a .zip file: unpack it", b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8", b"<": "a web page or XML: fetch the file itself",
}


def describe_format(content):
    """Returns what a file is, by its first bytes, and what to do; or None if it may be JSON or an image."""
    start = content[:1000].lstrip()
    return next((kind for first, kind in WRONG_FORMATS.items() if start.startswith(first)), None)


def make_writable_folder(path):
    """Creates a folder and returns its path. Raises UserError if it is not writable."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder with --run"
                        ) from error
    return path


def lock_folder(folder):
    """Locks the folder until this process ends, even if it is killed. Raises UserError if another process
    trains in it."""
    try:
        folder_lock(Path(folder).resolve() / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: wait until it ends, or choose another "
                        "folder with --run") from error
    except OSError as error:
        raise UserError(f"cannot write {folder}/.lock: {error.strerror}") from error


@cache  # a second stage in this process gets the same lock, which it already holds
def folder_lock(path):
    return FileLock(path)


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`; what is written there, a file or a folder, then replaces `path`.
    A run killed at any moment leaves the old or the new version, never half of one. (An old folder is deleted
    first, so a kill in between leaves none.)"""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        delete(temporary)  # left by a run that was killed here
        yield temporary
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
        if path.is_dir() and not path.is_symlink():  # a rename cannot replace a folder with contents
            delete(path)
        os.replace(temporary, path)
    # torch and safetensors report a full disk by errors of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        with suppress(OSError):
            delete(temporary)
        reasons = [getattr(each, "strerror", None) for each in (error, error.__context__)]
        raise UserError(f"cannot write {path}: {reasons[0] or reasons[1] or error}") from error


def delete(path):
    """Deletes a file or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    """Returns the content of a JSON file, or None if there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_part(path, offset, size):
    """Returns `size` bytes of a file, from `offset` on. Opens the file each time, because DataLoader workers
    that shared one handle would move its position while others read."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)
