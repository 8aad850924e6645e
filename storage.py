"""Where records and images lie: a JSON file of any size, a folder or a .zip of pictures.

Not the lesson either, but what decides whether 595,375 records and 6.5 GB of pictures fit into a free Colab.
Two things make Python's own way too large: a list of 595,375 dicts costs gigabytes, and every loader worker
copies it page by page, since merely looking at an object writes its reference count. A zip's list of members
is no smaller. So both are kept as bytes and arrays of positions, which the workers share, and objects are
made one at a time. """

import io
import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pixels import load_image
from plumbing import UserError


class BadRecord(UserError):
    """A record that nothing can be learned from. `reason` is one of few, for counting; the text tells all.

    Whoever goes through many records counts these; uncaught, it ends the script with its sentence.
    """

    def __init__(self, record, reason, detail=""):
        name = record.get("id", "(without an id)")
        super().__init__(f"record {name!r}: {reason}{detail and ': ' + detail}")
        self.reason = reason


class PositionedFile:
    """Reads a file at given positions, with a handle of its own in every process.

    A handle has one position. Opened before loader workers are forked, it would be shared with them, each
    would move it under the others' hands, and what they read would be garbage; and to processes that are
    spawned (macOS, Windows) it cannot be sent at all. So it is opened on the first read in each process.
    """

    def __init__(self, path):
        self.path, self._file, self._process = path, None, None

    def __getstate__(self):
        return {"path": self.path, "_file": None, "_process": None}

    def read(self, offset, size):
        if self._process != os.getpid():
            self._file, self._process = open(self.path, "rb"), os.getpid()
        self._file.seek(offset)
        return self._file.read(size)


# -- records -----------------------------------------------------------------------------------------------


class Records:
    """The records of a JSON file, a list of objects; read from it one at a time."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            text = self.path.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
        self.spans = self._scan(text)  # (records, 2): where each begins and ends, in bytes
        self._file = PositionedFile(self.path)

    def _scan(self, text):
        scan, skip = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*").match
        # Characters are bytes in an ASCII file, as json.dump writes it; elsewhere they must be counted.
        size = (lambda start, end: end - start) if text.isascii() else \
            (lambda start, end: len(text[start:end].encode()))
        spans, at, position = [], 0, 0
        try:
            opening = re.match(r"\ufeff?\s*\[\s*", text)
            if not opening:
                raise ValueError("it does not begin with [")
            here = opening.end()
            while text[here] != "]":
                record, end = scan(text, here)
                if not isinstance(record, dict):
                    raise ValueError(f"entry {len(spans) + 1} is no object but {text[here:end][:40]}")
                start_byte = position + size(at, here)
                position = start_byte + size(here, end)
                spans.append((start_byte, position))
                at, here = end, skip(text, end).end()
        except (ValueError, IndexError, RecursionError) as error:
            message = "it ends in the middle" if isinstance(error, IndexError) else str(error)
            raise UserError(f"{self.path} is not a JSON list of records: {message} (after {len(spans):,} "
                            "whole records); is the download complete?") from error
        if not spans:
            raise UserError(f"{self.path} holds no records")
        return np.array(spans, dtype=np.int64)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        start, end = self.spans[index].tolist()
        return json.loads(self._file.read(start, end - start))


# -- images ------------------------------------------------------------------------------------------------


class ImageStore:
    """Images by name, from a folder or straight from a .zip that is never unpacked."""

    def __init__(self, root):
        self.root = Path(root)
        self._file = PositionedFile(self.root)  # if it is a zip
        self.members = None  # of a zip: its members' names, sorted, and where they are
        if self.root.is_file():
            self._read_directory()
        elif not self.root.is_dir():
            raise UserError(f"{self.root} does not exist; --images wants a folder or a .zip")

    def _read_directory(self):
        try:
            with zipfile.ZipFile(self.root) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.root} is not a readable .zip: {error}; is the download complete?"
                            ) from error
        # The common top folder, "train2017/" in COCO's zip, which the records do not mention.
        tops = {info.filename.split("/")[0] for info in members if "/" in info.filename}
        self.top = tops.pop() + "/" if len(tops) == 1 and all("/" in i.filename for i in members) else ""
        members.sort(key=lambda info: info.filename.encode())
        self.members = np.array([info.filename.encode() for info in members])
        self.places = np.array([(info.header_offset, info.compress_size, info.compress_type, info.CRC)
                                for info in members], dtype=np.int64).reshape(-1, 4)

    def _member(self, name):
        """Row of the member called `name`, with or without the top folder; None if there is none."""
        for candidate in (name.encode("utf-8", "replace"), (self.top + name).encode("utf-8", "replace")):
            row = int(np.searchsorted(self.members, candidate))
            if row < len(self.members) and self.members[row] == candidate:
                return row
        return None

    def __contains__(self, name):
        if self.members is not None:
            return self._member(name) is not None
        return (self.root / name).is_file()

    def name_for(self, record):
        """The name of the record's image, or None if it is a record of text alone.

        Some copies of the data lack `image`; the file is then called like the record's id.
        """
        name = record.get("image")
        if name is None:
            guess = f"{record.get('id')}.jpg"
            return guess if not leaves_root(guess) and guess in self else None
        if not isinstance(name, str):
            raise BadRecord(record, "'image' is not the name of a file", repr(name)[:80])
        return name

    def check(self, record, name):
        """Raises BadRecord if the image is not there, or would be read from outside the folder."""
        outside = leaves_root(name)
        if not outside and self.members is None:  # a link inside the folder may point out of it
            outside = not (self.root / name).resolve().is_relative_to(self.root.resolve())
        if outside:
            raise BadRecord(record, "image outside the image folder", repr(name))
        if name not in self:
            raise BadRecord(record, "image missing", f"{name} is not in {self.root}")

    def open(self, record, name):
        """The image called `name` in RGB, upright. Raises BadRecord if it is missing or cannot be decoded."""
        self.check(record, name)
        try:
            return load_image(self.root / name if self.members is None else self._read_member(name))
        except (OSError, ValueError, SyntaxError, zlib.error, Image.DecompressionBombError,
                Image.DecompressionBombWarning) as error:
            raise BadRecord(record, "image cannot be decoded", f"{name} in {self.root}: {error}") from error

    def likely_root(self, name):
        """A folder near this one in which `name` does lie, or None: the usual slip is one level too many or
        too few, images/train2017/ for images/."""
        if self.members is not None:
            return None
        up = self.root.parent
        for place in [up, *self.root.glob("*/"), *up.glob("*/"), *self.root.glob("*/*/")]:
            if (place / name).is_file():
                return place
        return None

    def _read_member(self, name):
        """A member's bytes, as a file. It is found by its position: zipfile would read the whole directory
        again in every worker."""
        offset, size, method, crc = self.places[self._member(name)].tolist()
        # A member begins with a header of 30 bytes, the last four of which are two lengths, then its name and
        # an extra field of those lengths (PKWARE's APPNOTE.TXT, 4.3.7).
        name_length, extra_length = struct.unpack("<26x2H", self._file.read(offset, 30))
        content = self._file.read(offset + 30 + name_length + extra_length, size)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
        elif method != zipfile.ZIP_STORED:
            raise ValueError(f"compressed by a method that is not read here ({method})")
        if zlib.crc32(content) != crc:
            raise ValueError("the zip is damaged here (checksum)")
        return io.BytesIO(content)


def leaves_root(name):
    """Whether a record's image name points out of the folder that it should lie in."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not name or "\0" in name or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]
