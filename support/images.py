"""Images by name, from a folder or from a .zip file that is never unpacked."""

import io
import os
import re
import zipfile
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from support.errors import BadRecord, UserError, explain_errors

# Formats that Pillow decodes by itself. (EPS, for example, would start Ghostscript.)
PILLOW_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"]


def decode_image(content, name):
    """Returns the image in `content` (bytes) as a PIL image, RGB and upright. Raises UserError if it
    cannot be decoded; `name` is its name in the sentence."""
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{name} is a Git LFS pointer instead of the image: run git lfs pull")
    with explain_errors(f"decode {name}"):
        try:
            image = Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
        except UnidentifiedImageError as error:
            raise UserError(f"{name} is not an image in a supported format") from error
        if image.mode.startswith(("I", "F")):  # Pillow would clip the values instead of scaling them
            raise UserError(f"{name} has more than 8 bits per channel: convert it to 8 bits")
        image.getexif()  # parses the EXIF data, so that the orientation is known without the raw bytes
        image.load()
        image.info.pop("exif", None)  # else exif_transpose() would write it again, which fails for odd tags
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:  # shown on white; the original code shows the hidden colors
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class ImageStore:
    """The images in a folder or .zip file: `store.open(record, name)`."""

    def __init__(self, root):
        self.root = Path(root)
        self.archive = self.process = None
        if self.root.is_file():
            # If there is one top folder ("train2017/" in COCO's zip), records need not mention it.
            names = self.zip_file().NameToInfo
            tops = {name.split("/")[0] for name in names if "/" in name and not name.startswith("__MACOSX/")}
            self.top = f"{tops.pop()}/" if len(tops) == 1 else ""
        elif not self.root.is_dir():
            raise UserError(f"{self.root} does not exist; --images must name a folder or a .zip file")

    def zip_file(self):
        """Returns the open ZipFile of this process. Processes that shared one would move its position while
        others read."""
        if self.process != os.getpid():
            with explain_errors(f"read {self.root}, which must be a folder of images or a .zip file"):
                if self.archive is None:
                    self.archive = zipfile.ZipFile(self.root)
                else:  # a forked worker shares the list of members, which takes 340 MB for 595,375 of them
                    self.archive.fp = open(self.root, "rb")
            self.process = os.getpid()
        return self.archive

    def __getstate__(self):  # for a DataLoader worker that is not forked
        return {**self.__dict__, "archive": None, "process": None}

    def find(self, name):
        """Returns the path or the zip member of the image called `name`, or None."""
        if not self.is_inside(name):
            return None
        if self.root.is_dir():
            return self.root / name if os.path.isfile(self.root / name) else None
        members = self.zip_file().NameToInfo
        return next((member for member in (name, self.top + name) if member in members), None)

    def is_inside(self, name):
        """Returns True if the name cannot leave the folder, because records may come from others."""
        path = PurePosixPath(name.replace("\\", "/"))
        drive = re.match("[A-Za-z]:", name)  # of Windows
        return bool(path.parts) and not ("\0" in name or path.is_absolute() or ".." in path.parts or drive)

    def check(self, record, name):
        """Returns what find() returns. Raises BadRecord if there is no such image."""
        found = self.find(name)
        if found is None:
            reason = "image missing" if self.is_inside(name) else "image outside the image folder"
            raise BadRecord(record, reason, f"{name[:200]!r} is not in {self.root}")
        return found

    def open(self, record, name):
        """Returns the image (PIL, RGB, upright). Raises BadRecord if it is missing or cannot be decoded."""
        found = self.check(record, name)
        try:
            with explain_errors(f"read {name} in {self.root}"):
                content = found.read_bytes() if self.root.is_dir() else self.zip_file().read(found)
            return decode_image(content, f"{name} in {self.root}")
        except UserError as error:
            detail = str(error).removeprefix("cannot decode ")
            raise BadRecord(record, "image cannot be decoded", detail) from error
