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
from PIL import Image, ImageOps

from support.errors import BadRecord, UserError, explain_errors
from support.files import describe_format, read_part

# Formats that Pillow decodes by itself. (EPS, for example, would start Ghostscript.)
PILLOW_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO"]
# Pillow refuses images with more than twice as many pixels. Above this number itself it would warn, but some
# phones take photos of 200 megapixels.
Image.MAX_IMAGE_PIXELS = 110_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(file, name):
    """Returns the PIL image in `file` (a path or an open file) in RGB and upright. Raises ValueError with one
    sentence about `name` if it cannot be used. A damaged file can raise almost any exception in Pillow."""
    try:
        content = file if hasattr(file, "read") else io.BytesIO(Path(file).read_bytes())
        with Image.open(content, formats=PILLOW_FORMATS) as image:
            image.getexif()  # Pillow keeps what it has parsed
            image.load()
        image.info.pop("exif", None)  # else exif_transpose() would write it again, which fails for odd tags
        ImageOps.exif_transpose(image, in_place=True)
        if max(image.size) > 100 * min(image.size):  # resizing its short side to 224 would fill the memory
            raise ValueError(f"{image.width} × {image.height} pixels are too long and narrow")
        # convert("RGB") would clip all values to 0 … 255.
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("its pixels are floating-point or 32-bit numbers, and the file does not say "
                             "which of them is white: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits per pixel
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:  # shown on white; the original code shows the hidden colors
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            content.seek(0)
            kind = describe_format(content.read(1000))
            reason = f"it is not an image in a supported format{f', but {kind}' if kind else ''}"
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
        """Returns True if the name cannot leave the folder, because records may come from others."""
        path = PurePosixPath(name.replace("\\", "/"))
        drive = re.match("[A-Za-z]:", name)  # of Windows
        return bool(path.parts) and not ("\0" in name or path.is_absolute() or ".." in path.parts or drive)

    def check(self, record, name):
        """Raises BadRecord if there is no such image."""
        if name not in self:
            reason = "image missing" if self.is_inside(name) else "image outside the image folder"
            raise BadRecord(record, reason, f"{name[:200]!r} is not in {self.root}")

    def open(self, record, name):
        """Returns the image (PIL, RGB, upright). Raises BadRecord if it is missing or cannot be decoded."""
        self.check(record, name)
        try:
            file = self.root / name if self.members is None else io.BytesIO(self._read_member(name))
            return decode_image(file, f"{name} in {self.root}")
        except (ValueError, OSError, zlib.error, struct.error) as error:
            raise BadRecord(record, "image cannot be decoded", str(error)) from error

    # -- .zip files ----------------------------------------------------------------------------------------

    def _read_zip_directory(self):
        """Keeps the list of members as two arrays, because every worker would copy zipfile's larger list."""
        try:
            with zipfile.ZipFile(self.root) as archive:
                members = [info for info in archive.infolist()
                           if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
        except (zipfile.BadZipFile, OSError) as error:
            with explain_errors(f"read {self.root}"), open(self.root, "rb") as file:
                kind = describe_format(file.read(1000).removeprefix(b"PK"))
            raise UserError(f"{self.root} is {kind or f'not a readable .zip file ({error}): fetch it again'}"
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
        """Returns a member's bytes."""
        offset, compressed_size, size, method, crc = self.places[self._find_member(name)].tolist()
        # A member starts with 30 bytes that end in two lengths, then its name and an extra field of those
        # lengths (PKWARE's APPNOTE.TXT, section 4.3.7).
        name_length, extra_length = struct.unpack("<26x2H", read_part(self.root, offset, 30))
        content = read_part(self.root, offset + 30 + name_length + extra_length, compressed_size)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError(f"{name} is damaged in {self.root} (wrong length or checksum)")
        return content
