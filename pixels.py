"""From an image file to what the encoder is given: decoding, and CLIP's preprocessing.

There is nothing to run in this file.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from plumbing import UserError


def load_image(file):
    """A path or an open file → PIL image in RGB, upright; of an animation, the first frame.

    Raises OSError for what is no image, half of one, or 100 times as long as wide, and Pillow's
    decompression-bomb errors for a small file that claims to be gigantic.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow only warns of small bombs
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)  # cameras store a turned picture and a note how to hold it
    if max(image.size) > 100 * min(image.size):  # resized to 224 on the short side, it would fill the memory
        raise OSError(f"{image.width} × {image.height} is a strip, and no picture")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would cut off everything above 255
        pixels = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")  # as the reference does; an alpha channel is dropped


class ImageProcessor:
    """The encoder's preprocessing, from its preprocessor_config.json: resize, crop the centre, scale.

    Written out because it is short and because pixels must be the same on every machine: transformers picks
    another implementation where torchvision is installed. A test compares it with transformers' own.

    Args:
        image_fit: "crop": as the file says; CLIP resizes the short side and crops the centre (whatever stands
            at the edge of a wide photo is lost), SigLIP squeezes the image into a square. "pad": first made
            square by bars in CLIP's mean colour, as LLaVA-1.5 does (expand2square() in its mm_utils.py).
    """

    def __init__(self, vision_folder, image_fit="crop"):
        path = Path(vision_folder) / "preprocessor_config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        self.image_fit = image_fit
        size, crop = config["size"], config.get("crop_size")  # an int in old files, a dict in newer ones
        self.shortest_edge = size.get("shortest_edge") if isinstance(size, dict) else size
        final = size if self.shortest_edge is None or not config.get("do_center_crop", True) else crop
        self.size = (final["width"], final["height"]) if isinstance(final, dict) else (final, final)
        self.resample = config["resample"]
        self.mean = np.array(config["image_mean"], dtype=np.float32)
        self.std = np.array(config["image_std"], dtype=np.float32)

    def __call__(self, image):
        """PIL image in RGB → pixel_values (3, height, width), fp32, about -2 … 2."""
        if self.image_fit == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.shortest_edge is None:
            image = image.resize(self.size, self.resample)
        else:
            width, height = image.size
            long = int(self.shortest_edge * max(width, height) / min(width, height))
            scaled = (self.shortest_edge, long) if width <= height else (long, self.shortest_edge)
            left, top = (scaled[0] - self.size[0]) // 2, (scaled[1] - self.size[1]) // 2
            centre = (left, top, left + self.size[0], top + self.size[1])
            image = image.resize(scaled, self.resample).crop(centre)
        pixels = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3) in 0 … 1
        pixels = (pixels - self.mean) / self.std
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, H, W)
