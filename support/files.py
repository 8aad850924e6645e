"""Files: where the inputs are, and writing results so that a kill leaves the old or the new file."""

import errno
import json
import os
import shutil
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from support.errors import UserError, explain_errors

REPOSITORY = Path(__file__).resolve().parents[1]


def find_file(name):
    """Returns the path of a file or folder, relative to the current folder or to this repository."""
    folder = os.fspath(name).removesuffix(".zip")  # tools.download writes a folder in place of a .zip file
    for path in (Path(name), REPOSITORY / name, Path(folder), REPOSITORY / folder):
        if os.path.exists(path):  # Path.exists() raises an error if the name is too long
            return path
    hints = {"data/small/": ": python -m tools.small writes it",
             "data/": ": python -m tools.download fetches a part of it, and tools/download.sh all",
             "toy/data/": ": delete toy/data, so that it is drawn again"}
    hint = next((hint for start, hint in hints.items() if str(name).startswith(start)), "")
    raise UserError(f"{name} does not exist{hint}")


def lock_folder(folder):
    """Creates a folder and locks it until this process ends, even if it is killed. Raises UserError if it is
    not writable, or if another process trains in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder_lock(folder.resolve() / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: wait until it ends, or choose another "
                        "folder with --run") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder with --run"
                        ) from error


@cache  # a second stage in this process gets the same lock, which it already holds
def folder_lock(path):
    return FileLock(path)


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`; what is written there, a file or a folder, then replaces `path`.
    A kill leaves the old or the new file, never half of one. An old folder is deleted first, so a kill can
    leave none or a part of it. If `path` is a link, the file that it points to is replaced.
    Raises UserError if the file cannot be written (a full disk), or would replace a folder or a device."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        delete(temporary)  # left by a run that was killed here
        yield temporary
        if path.exists() and not (path.is_dir() if temporary.is_dir() else path.is_file()):
            raise OSError(errno.EEXIST, "something else has this name")
        os.umask(mask := os.umask(0))  # it can only be read by setting it
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)  # safetensors lets only the owner read its files
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
        if path.is_dir():  # a rename cannot replace a folder with contents
            delete(path)
        os.replace(temporary, path)
    except BaseException as error:  # also Ctrl-C
        with suppress(OSError):
            delete(temporary)
        # torch reports a full disk by a RuntimeError of its own, while it handles the OSError.
        cause = error.__context__ if type(error) is RuntimeError else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        raise UserError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from error


def delete(path):
    """Deletes a file or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path):
    """Returns the content of a JSON file, or None if there is no such file."""
    if not os.path.exists(path):
        return None
    with explain_errors(f"read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))
