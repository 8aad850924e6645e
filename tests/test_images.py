"""Images from a folder or a .zip file: the pixels that a viewer shows, or one sentence about the record."""

import io
import multiprocessing
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import COLORS
from PIL import Image
from torch.utils.data import DataLoader

from data import ChatDataset
from support.errors import BadRecord, UserError
from support.images import ImageStore, decode_image
from support.records import read_records

RED = (250, 20, 20)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_rotated():
    image = Image.new("RGB", (4, 2), "white")
    image.paste(RED, (0, 0, 2, 2))  # the left half is red, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn 90° clockwise to view": the red half is on top
    return saved(image, "PNG", exif=exif)


def several_pictures(kind):
    """Returns a file whose first picture is the one to show: an animation, or the MPO of some phones."""
    second = Image.new("RGB", (16, 16), "blue")
    return saved(Image.new("RGB", (16, 16), RED), kind, save_all=True, append_images=[second])


UNUSUAL = {  # name: (content, size, color of the top left pixel)
    "half-transparent": (saved(Image.new("RGBA", (3, 3), (0, 0, 0, 51)), "PNG"), (3, 3), (204, 204, 204)),
    "palette": (saved(Image.new("RGB", (3, 3), RED).quantize(), "PNG"), (3, 3), RED),
    "palette-transparent": (saved(Image.new("P", (3, 3)), "PNG", transparency=b"\0"), (3, 3), (255,) * 3),
    "EXIF-rotated": (exif_rotated(), (2, 4), RED),
    "animated-GIF": (several_pictures("GIF"), (16, 16), RED),
    "MPO": (several_pictures("MPO"), (16, 16), RED),
    "CMYK": (saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95), (16, 16), RED),
}


@pytest.mark.parametrize("content, size, top_left", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_images_give_the_pixels_that_a_viewer_shows(content, size, top_left):
    image = decode_image(content, "unusual")
    assert image.mode == "RGB" and image.size == size
    assert all(abs(a - b) <= 4 for a, b in zip(image.getpixel((0, 0)), top_left))


@pytest.mark.parametrize("top, method", [("", zipfile.ZIP_STORED), ("train2017/", zipfile.ZIP_DEFLATED)])
def test_a_folder_and_its_zip_hold_the_same_pictures(drawn, tmp_path, top, method):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        archive.writestr("README.txt", "Photos.")
        if top:  # as a Mac writes it
            archive.writestr(top, b"")
            archive.writestr(f"__MACOSX/{top}._red.png", b"not an image")
        for image in (drawn / "images").iterdir():
            archive.write(image, top + image.name)
    (tmp_path / "linked").symlink_to(drawn / "images")
    folder = ImageStore(tmp_path)
    archive = pickle.loads(pickle.dumps(ImageStore(tmp_path / "images.zip")))  # as a spawned worker gets it
    for color in COLORS:
        one, other = folder.open({}, f"linked/{color}.png"), archive.open({}, f"{color}.png")
        assert one.size == other.size and one.tobytes() == other.tobytes()
        assert one.tobytes() == Image.open(drawn / "images" / f"{color}.png").convert("RGB").tobytes()
        assert archive.open({}, f"{top}{color}.png").tobytes() == one.tobytes()


def test_loader_workers_share_a_zip_without_disturbing_each_other(drawn, template, image_processor):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    records = read_records(drawn / "chat.json", ImageStore(drawn / "images.zip"))
    records = records.subset(random.Random(0).choices(range(8), k=200))
    dataset = ChatDataset(records, template, image_processor, 500)
    expected = [dataset[i] for i in range(len(dataset))]  # this opens the files before the workers start
    file = records.images.archive.fp.fileno()
    os.lseek(file, 7, os.SEEK_SET)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for sample, own in zip(loader, expected, strict=True):
        assert torch.equal(sample["pixel_values"], own["pixel_values"])
        assert sample["input_ids"] == own["input_ids"] and not sample["skipped"]
    assert os.lseek(file, 0, os.SEEK_CUR) == 7  # no worker has moved the position of this process's file


NOISE = Image.effect_noise((99, 99), 90)
DECODE, MISSING, OUTSIDE = "image cannot be decoded", "image missing", "image outside the image folder"
UNUSABLE = {  # name: (content, reason, what the sentence says)
    "half.jpg": (saved(NOISE, "JPEG")[:900], DECODE, "truncated"),
    "deep.png": (saved(Image.new("I;16", (5, 5)), "PNG"), DECODE, "more than 8 bits"),
    "text.jpg": (b"<html>404 Not Found</html>", DECODE, "is not an image in a supported format"),
    "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 211000000\n", DECODE,
                "is a Git LFS pointer instead of the image: run git lfs pull"),
    "nowhere.jpg": (None, MISSING, "is not in"),
    **{name: (None, OUTSIDE, "is not in") for name in ("/etc/hostname", "C:secret.png", "../secret.png",
                                                       "a\\..\\..\\secret.png", "a/../../secret.png")},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_broken_missing_or_outside_image_is_one_sentence_about_the_record(tmp_path, name):
    """From a folder and from a .zip file; a good image lies outside of both."""
    content, reason, message = UNUSABLE[name]
    Image.new("RGB", (5, 5)).save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        if content is not None:
            (tmp_path / "images" / name).write_bytes(content)
            archive.writestr(name, content)
    for kind in ("images", "images.zip"):
        store, sentences = ImageStore(tmp_path / kind), []
        for _ in range(2):  # the same sentence every time, so that an image is counted once
            with pytest.raises(BadRecord, match=f"'a': {reason}: .*{message}") as error:
                store.open({"id": "a"}, name)
            assert error.value.reason == reason and "\n" not in str(error.value)
            sentences.append(str(error.value))
        assert sentences[0] == sentences[1]
        assert (store.find(name) is None) == (content is None)


def test_half_a_zip_and_a_missing_folder_are_refused_in_one_sentence(drawn, tmp_path):
    (tmp_path / "images.zip").write_bytes((drawn / "images.zip").read_bytes()[:-100])
    for name in ("images.zip", "nowhere"):
        with pytest.raises(UserError, match=name):
            ImageStore(tmp_path / name)
