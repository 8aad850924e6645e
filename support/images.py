"""Images by name, from a folder or from a .zip file that is never unpacked."""

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from support.errors import BadRecord, UserError
from support.files import WorkerFile

# Formats that Pillow decodes by itself. (EPS, for example, would start Ghostscript.)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO"]
MAX_FILE_BYTES = 256 * 2**20
# Pillow refuses images with more than twice as many pixels. Above this number itself it would warn, but some
# phones take photos of 200 megapixels.
Image.MAX_IMAGE_PIXELS = 110_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
ORIENTATION = 0x112  # the EXIF tag that says how a camera was held
TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
             7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def decode_image(file, name):
    """Returns the PIL image in `file` (a path or an open file) in RGB and upright.

    Raises ValueError with one sentence about `name` if it is not an image, is cut short, or is unreasonably
    large or long. A damaged file can raise almost any exception inside Pillow, so all of them are caught
    here.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            orientation = image.getexif().get(ORIENTATION)
            image.load()
        if orientation in TRANSPOSE:
            image = image.transpose(TRANSPOSE[orientation])
        if max(image.size) > 100 * min(image.size):  # resizing its short side to 224 would fill the memory
            raise ValueError(f"{image.width} × {image.height} pixels are too long and narrow")
        if image.mode.startswith("I"):  # 16 bits per pixel; convert("RGB") would clip all values above 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")  # drops an alpha channel, as the original code does
    except MemoryError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "it is not an image in a supported format"
        raise ValueError(f"{name} cannot be decoded: {reason}") from error


class ImageStore:
    """The images in a folder or .zip file: `name in store`, `store.open(record, name)`."""

    def __init__(self, root):
        self.root = Path(root)
        self.members = None  # of a .zip file: the names of its members, sorted
        if self.root.is_file():
            self._read_zip_directory()
        elif not self.root.is_dir():
            raise UserError(f"{self.root} does not exist; --images must name a folder or a .zip file")

    def __contains__(self, name):
        if not self.is_inside(name):
            return False
        if self.members is None:
            return os.path.isfile(self.root / name)
        return self._find_member(name) is not None

    def is_inside(self, name):
        """Returns True if the name stays inside the folder, also after symbolic links are followed."""
        path = PurePosixPath(name.replace("\\", "/"))
        drive = re.match("[A-Za-z]:", name)  # of Windows
        if not path.parts or "\0" in name or path.is_absolute() or ".." in path.parts or drive:
            return False
        if self.members is not None:
            return True
        root = os.path.realpath(self.root)
        try:
            return os.path.realpath(os.path.join(root, name)).startswith(root + os.sep)
        except ValueError:  # a lone surrogate (half of a UTF-16 pair), which no file name contains
            return False

    def check(self, record, name):
        """Raises BadRecord if there is no such image."""
        if not self.is_inside(name):
            raise BadRecord(record, "image outside the image folder", repr(name)[:200])
        if name not in self:
            raise BadRecord(record, "image missing", f"{name[:200]!r} is not in {self.root}")

    def open(self, record, name):
        """Returns the image (PIL, RGB, upright). Raises BadRecord if it is missing or cannot be decoded."""
        self.check(record, name)
        try:
            file = self.root / name if self.members is None else io.BytesIO(self._read_member(name))
            return decode_image(file, f"{name} in {self.root}")
        except (ValueError, OSError, zlib.error, struct.error) as error:
            raise BadRecord(record, "image cannot be decoded", str(error)) from error

    def likely_root(self, name):
        """Returns a folder near this one that has the image, or None. A common mistake is to name the folder
        one level too high or too low: images/train2017/ instead of images/."""
        if self.members is None:
            above = self.root.parent
            for folder in [above, *self.root.glob("*/"), *above.glob("*/"), *self.root.glob("*/*/")]:
                if os.path.isfile(folder / name):
                    return folder
        return None

    # -- .zip files ----------------------------------------------------------------------------------------

    def _read_zip_directory(self):
        """Keeps the list of members as two arrays. zipfile's own list is large, and every worker would copy
        it."""
        try:
            with zipfile.ZipFile(self.root) as archive:
                members = [info for info in archive.infolist()
                           if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.root} is not a readable .zip file: {error}; is the download complete?"
                            ) from error
        for info in members:
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{self.root} is encrypted or compressed by a method other than deflate "
                                f"({info.filename}): unpack it and name the folder")
        # If there is one top folder ("train2017/" in COCO's zip), records do not mention it.
        tops = {info.filename.split("/")[0] for info in members if "/" in info.filename}
        self.top = f"{tops.pop()}/" if len(tops) == 1 else ""
        members.sort(key=lambda info: info.filename.encode())
        self.members = np.array([info.filename.encode() for info in members])
        self.places = np.array([(info.header_offset, info.compress_size, info.file_size, info.compress_type,
                                 info.CRC) for info in members], dtype=np.int64).reshape(-1, 5)
        self._file = WorkerFile(self.root)

    def _find_member(self, name):
        """Returns the row of the member called `name`, with or without the top folder, or None."""
        for candidate in (name.encode("utf-8", "replace"), (self.top + name).encode("utf-8", "replace")):
            if len(candidate) <= self.members.dtype.itemsize:  # else NumPy would copy all names
                # Of several members with one name, the last is valid, as for other programs.
                row = int(np.searchsorted(self.members, candidate, side="right")) - 1
                if row >= 0 and self.members[row] == candidate:
                    return row
        return None

    def _read_member(self, name):
        """Returns a member's bytes. Its position is known, so the zip's directory need not be read again."""
        offset, compressed_size, size, method, crc = self.places[self._find_member(name)].tolist()
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name} is {size:,} bytes long, too large for an image")
        # A member starts with 30 bytes that end in two lengths, then its name and an extra field of those
        # lengths (PKWARE's APPNOTE.TXT, section 4.3.7).
        name_length, extra_length = struct.unpack("<26x2H", self._file.read(offset, 30))
        content = self._file.read(offset + 30 + name_length + extra_length, compressed_size)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError(f"{name} is damaged in {self.root} (wrong length or checksum)")
        return content
