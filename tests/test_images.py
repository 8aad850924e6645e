"""Images from a folder or a .zip file: the pixels that a viewer shows, or one sentence about the record."""

import os
import gzip
import io
import json
import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import COLORS, N
from PIL import Image
from torch.utils.data import DataLoader

from data import ChatDataset
from support.errors import BadRecord, UserError
from support.images import ImageStore, decode_image
from support.records import RecordFile, RecordSet

RECORD = {"id": "a"}
RED = (250, 20, 20)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


# -- formats -----------------------------------------------------------------------------------------------


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


def palette():
    return Image.new("RGB", (3, 3), RED).convert("P", palette=Image.Palette.ADAPTIVE)


UNUSUAL = {  # name: (file, size, color of the top left pixel)
    "1×1": (saved(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), RED),
    "half-transparent": (saved(Image.new("RGBA", (3, 3), (0, 0, 0, 51)), "PNG"), (3, 3), (204, 204, 204)),
    "gray-transparent": (saved(Image.new("LA", (3, 3), (0, 0)), "PNG"), (3, 3), (255, 255, 255)),
    "bilevel": (saved(Image.new("1", (3, 3), 1), "PNG"), (3, 3), (255, 255, 255)),
    "palette": (saved(palette(), "PNG"), (3, 3), RED),
    "palette-transparent": (saved(Image.new("P", (3, 3), 0), "PNG", transparency=b"\0"), (3, 3),
                            (255, 255, 255)),
    "16-bit": (saved(Image.fromarray(np.full((5, 5), 49_152, np.uint16)), "PNG"), (5, 5), (191, 191, 191)),
    "16-bit-TIFF": (saved(Image.fromarray(np.full((5, 5), 49_152, np.uint16)), "TIFF"), (5, 5), (191,) * 3),
    "EXIF-rotated": (exif_rotated(), (2, 4), RED),
    "animated-GIF": (several_pictures("GIF"), (16, 16), RED),
    "MPO": (several_pictures("MPO"), (16, 16), RED),
    "CMYK": (saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95), (16, 16), RED),
}


@pytest.mark.parametrize("file, size, top_left", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_images_give_the_pixels_that_a_viewer_shows(file, size, top_left):
    image = decode_image(file, "unusual")
    assert image.mode == "RGB" and image.size == size
    assert all(abs(a - b) <= 4 for a, b in zip(image.getpixel((0, 0)), top_left))


# -- folders and .zip files --------------------------------------------------------------------------------


@pytest.mark.parametrize("top, method", [("", zipfile.ZIP_STORED), ("train2017/", zipfile.ZIP_DEFLATED)])
def test_a_folder_and_its_zip_hold_the_same_pictures(drawn, tmp_path, top, method):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        for image in (drawn / "images").iterdir():
            archive.write(image, top + image.name)
    folder = ImageStore(drawn / "images")
    archive = pickle.loads(pickle.dumps(ImageStore(tmp_path / "images.zip")))  # as a spawned worker gets it
    for color in COLORS:
        name = f"{color}.png"
        one, other = folder.open({}, name), archive.open({}, name)
        assert one.size == other.size and one.tobytes() == other.tobytes()
        assert one.tobytes() == Image.open(drawn / "images" / name).convert("RGB").tobytes()
        assert archive.open({}, top + name).tobytes() == one.tobytes()


def test_a_zip_with_the_hidden_files_of_a_mac_and_a_file_beside_its_one_folder_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("README.txt", "Photos.")
        archive.writestr("photos/", b"")
        archive.writestr("photos/a.png", saved(Image.new("RGB", (5, 5), RED), "PNG").getvalue())
        archive.writestr("__MACOSX/photos/._a.png", b"not an image")
    store = ImageStore(tmp_path / "images.zip")
    assert store.open(RECORD, "a.png").size == store.open(RECORD, "photos/a.png").size == (5, 5)
    assert "b.png" not in store


def test_loader_workers_share_a_zip_without_disturbing_each_other(drawn, template, image_processor):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    indices = np.random.default_rng(0).integers(0, 8, 200)
    records = RecordSet(RecordFile(drawn / "chat.json"), ImageStore(drawn / "images.zip"), indices)
    dataset = ChatDataset(records, template, image_processor, N, 500)
    expected = [dataset[i] for i in range(len(dataset))]  # this opens the files before the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for sample, own in zip(loader, expected, strict=True):
        assert torch.equal(sample["pixel_values"], own["pixel_values"])
        assert sample["input_ids"] == own["input_ids"] and not sample["skipped"]


# -- what cannot be used -----------------------------------------------------------------------------------

NOISE = Image.effect_noise((99, 99), 90)
UNUSABLE = {  # name: (content, what the sentence says)
    "half.jpg": (saved(NOISE, "JPEG").getvalue()[:900], "decoded"),
    "half.png": (saved(NOISE, "PNG").getvalue()[:3000], "decoded"),
    "text.jpg": (b"<html>404 Not Found</html>", "not an image in a supported format, but a web page"),
    "empty.jpg": (b"", "not an image in a supported format"),
    "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 211000000\n",
                "Git LFS pointer.*git lfs pull"),
    "gzip.jpg": (gzip.compress(b"an image"), "gzip"),
    "strip.png": (saved(Image.new("RGB", (1, 4000)), "PNG").getvalue(), "too long and narrow"),
    "float.tiff": (saved(Image.fromarray(np.full((5, 5), .5, np.float32)), "TIFF").getvalue(),
                   "floating-point or 32-bit.*save it with 8 or 16 bits"),
    "nowhere.jpg": (None, "missing"), "../secret.png": (None, "outside"), "/etc/hostname": (None, "outside"),
}


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """The same unusable files in a folder and in a zip, and a good one outside of both."""
    root = tmp_path_factory.mktemp("unusable")
    (root / "images").mkdir()
    Image.new("RGB", (5, 5)).save(root / "secret.png")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name, (content, _) in UNUSABLE.items():
            if content is not None:
                (root / "images" / name).write_bytes(content)
                archive.writestr(name, content)
    return root


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_broken_missing_or_outside_image_is_one_sentence_about_the_record(unusable, name):
    content, message = UNUSABLE[name]
    for kind in ("images", "images.zip"):
        store, sentences = ImageStore(unusable / kind), set()
        for _ in range(2):  # the same sentence every time, so that an image is counted once
            with pytest.raises(BadRecord, match=f"'a'.*{message}") as error:
                store.open(RECORD, name)
            sentences.add(str(error.value))
        assert len(sentences) == 1 and "\n" not in sentences.pop()
        assert (name in store) == (content is not None)


@pytest.mark.parametrize("name", [7, ["a.jpg", "b.jpg"]])
def test_an_image_that_is_no_file_name_is_named_as_such(unusable, name, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "a"}, {"image": name}]))
    records = RecordSet(RecordFile(tmp_path / "chat.json"), ImageStore(unusable / "images"), np.arange(2))
    with pytest.raises(BadRecord, match="'number 2 of chat.json': 'image' is not the name of one file"):
        records.open_image(records[1])


def test_a_damaged_zip_member_is_noticed(tmp_path):
    content = saved(Image.new("RGB", (30, 30), RED), "BMP").getvalue()  # opens with a damaged pixel too
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.bmp", content)
    damaged = bytearray((tmp_path / "images.zip").read_bytes())
    damaged[1000] ^= 0xFF  # one pixel
    (tmp_path / "images.zip").write_bytes(damaged)
    with pytest.raises(BadRecord, match="'a'.*checksum"):
        ImageStore(tmp_path / "images.zip").open(RECORD, "a.bmp")


def test_half_a_zip_and_a_missing_folder_are_refused_in_one_sentence(drawn, tmp_path):
    (tmp_path / "images.zip").write_bytes((drawn / "images.zip").read_bytes()[:-100])
    with pytest.raises(UserError, match="images.zip"):
        ImageStore(tmp_path / "images.zip")
    with pytest.raises(UserError, match="nowhere"):
        ImageStore(tmp_path / "nowhere")


def test_symbolic_links_below_the_image_folder_are_followed(tmp_path):
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (5, 5), RED).save(tmp_path / "coco" / "a.png")
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "coco", tmp_path / "images" / "coco")
    os.symlink(tmp_path / "coco" / "a.png", tmp_path / "images" / "b.png")
    os.symlink("loop.png", tmp_path / "images" / "loop.png")
    store = ImageStore(tmp_path / "images")
    assert store.open(RECORD, "coco/a.png").size == store.open(RECORD, "b.png").size == (5, 5)
    with pytest.raises(BadRecord, match="missing"):
        store.open(RECORD, "loop.png")
    with pytest.raises(BadRecord, match="outside"):
        store.open(RECORD, "coco/../../coco/a.png")


def test_a_text_file_is_no_image_and_no_table(tmp_path):
    (tmp_path / "notes.txt").write_text("Cats, dogs and birds.\n")
    with pytest.raises(ValueError, match="it is not an image in a supported format$"):
        decode_image(tmp_path / "notes.txt", "notes.txt")
