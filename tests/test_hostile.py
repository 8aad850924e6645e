"""What people and the internet put into data sets: the right pixels and labels, or one clear sentence."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data import IGNORE_INDEX
from pixels import load_image
from plumbing import UserError
from storage import BadRecord, ImageStore, Records

RECORD = {"id": "a"}
RED = (250, 20, 20)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


# -- images that can be read -------------------------------------------------------------------------------


def exif_rotated():
    image = Image.new("RGB", (4, 2), "white")
    image.paste(RED, (0, 0, 2, 2))  # left half red, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn 90° clockwise to view": the red half is on top
    return saved(image, "PNG", exif=exif)


def animated():
    return saved(
        Image.new("RGB", (6, 6), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (6, 6), "blue")]
    )


def sixteen_bit(value):
    return saved(Image.fromarray(np.full((5, 5), value, dtype=np.uint16)), "PNG")


@pytest.mark.parametrize(
    "file, size, top_left",
    [
        (saved(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), RED),
        (saved(Image.new("RGBA", (3, 3), (*RED, 90)), "PNG"), (3, 3), RED),
        (saved(Image.new("L", (3, 3), 70), "PNG"), (3, 3), (70, 70, 70)),
        (saved(Image.new("1", (3, 3), 1), "PNG"), (3, 3), (255, 255, 255)),
        (
            saved(Image.new("RGB", (3, 3), RED).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
            (3, 3),
            RED,
        ),
        (saved(Image.new("P", (3, 3), 0), "PNG", transparency=b"\0"), (3, 3), (0, 0, 0)),
        (sixteen_bit(0xFFFF), (5, 5), (255, 255, 255)),
        (sixteen_bit(0x8080), (5, 5), (128, 128, 128)),
        (exif_rotated(), (2, 4), RED),
        (animated(), (6, 6), RED),
    ],
    ids=[
        "1×1",
        "RGBA",
        "grey",
        "bilevel",
        "palette",
        "palette-transparent",
        "16-bit-white",
        "16-bit-grey",
        "EXIF-rotated",
        "animated-GIF",
    ],
)
def test_unusual_images_give_the_pixels_that_a_viewer_shows(file, size, top_left):
    image = load_image(file)
    assert image.mode == "RGB" and image.size == size
    assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((0, 0)), top_left))


def test_cmyk_jpeg_keeps_its_colour():
    image = load_image(saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95))
    red, green, blue = image.getpixel((8, 8))
    assert image.mode == "RGB" and red > 220 and green < 60 and blue < 60


# -- images that cannot ------------------------------------------------------------------------------------


def bomb():
    """A PNG of 60 bytes that claims to be 50,000 × 50,000."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BROKEN = {
    "bomb.png": bomb(),
    "half.jpg": saved(Image.effect_noise((99, 99), 90), "JPEG").getvalue()[:900],
    "text.jpg": b"<html>404 Not Found</html>",
    "empty.jpg": b"",
    "strip.png": saved(Image.new("RGB", (1, 4000)), "PNG").getvalue(),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The same broken files in a folder and in a zip, and a good one outside of both."""
    root = tmp_path_factory.mktemp("broken")
    (root / "images").mkdir()
    Image.new("RGB", (5, 5)).save(root / "secret.png")
    os.symlink(root / "secret.png", root / "images" / "link.png")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        archive.writestr("../secret.png", (root / "secret.png").read_bytes())
        for name, content in BROKEN.items():
            (root / "images" / name).write_bytes(content)
            archive.writestr(name, content)
    return root


@pytest.mark.parametrize("kind", ["images", "images.zip"])
@pytest.mark.parametrize(
    "name",
    [
        *BROKEN,
        "../secret.png",
        "/etc/hostname",
        "..\\secret.png",
        "C:/secret.png",
        "nowhere.jpg",
        "",
        "a\0b.jpg",
    ],
)
def test_broken_or_straying_images_are_named_in_one_sentence(broken, kind, name):
    with pytest.raises(BadRecord) as error:
        ImageStore(broken / kind).open(RECORD, name)
    assert "'a'" in str(error.value) and "\n" not in str(error.value)
    expected = "decoded" if name in BROKEN else "missing" if name == "nowhere.jpg" else "outside"
    assert expected in error.value.reason


def test_a_link_that_leads_out_of_the_folder_is_not_followed(broken):
    with pytest.raises(BadRecord, match="outside"):
        ImageStore(broken / "images").open(RECORD, "link.png")


def test_a_damaged_zip_member_is_noticed(tmp_path):
    content = saved(Image.new("RGB", (30, 30), RED), "BMP").getvalue()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.bmp", content)
    damaged = bytearray((tmp_path / "images.zip").read_bytes())
    damaged[1000] ^= 0xFF  # one pixel
    (tmp_path / "images.zip").write_bytes(damaged)
    with pytest.raises(BadRecord, match="checksum"):
        ImageStore(tmp_path / "images.zip").open(RECORD, "a.bmp")


# -- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"id": 1}, {"id": 2', "1 whole"),
        (b'{"id": 1}', "does not begin with"),
        (b"", "does not begin with"),
        (b'[{"id": 1}, 7]', "entry 2"),
        (b"[]", "no records"),
        (b'[{"id": "\xff"}]', "UTF-8"),
        (b'[{"id": "a\0b"}]', "control character"),
        (b"[" * 100_000, "begins with|not a JSON list"),
        (b'[{"id": ' + b"[" * 100_000, "not a JSON list"),
    ],
    ids=[
        "truncated",
        "object",
        "empty",
        "number",
        "no-records",
        "not-UTF-8",
        "NUL",
        "deep-list",
        "deep-record",
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Records(tmp_path / "chat.json")
    assert "chat.json" in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_and_characters_of_any_length_do_not_shift_the_records(tmp_path):
    content = [{"id": "ü€😀"}, {"id": "b", "x": ["𝄞", {"y": None}]}, {"id": "c"}]
    (tmp_path / "chat.json").write_bytes("\ufeff".encode() + json.dumps(content, ensure_ascii=False).encode())
    records = Records(tmp_path / "chat.json")
    assert [records[i] for i in range(len(records))] == content


HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}


@pytest.mark.parametrize(
    "turns, image, reason",
    [
        (None, False, "not a list"),
        ([[HUMAN, GPT]], False, "not a list"),
        ([HUMAN], False, "no human turn"),
        ([GPT], False, "no human turn"),
        ([HUMAN, HUMAN, GPT], False, "alternate"),
        ([HUMAN, GPT, GPT], False, "alternate"),
        ([HUMAN, {"from": "gpt"}], False, "alternate"),
        ([HUMAN, {"from": "gpt", "value": " "}], False, "empty answer"),
        ([HUMAN, {"from": "gpt", "value": "\ud83d"}], False, "Unicode"),
        ([{"from": "human", "value": "<image>What?"}, GPT], False, "more <image>"),
        ([{"from": "human", "value": "<image>\n<image>What?"}, GPT], True, "more <image>"),
        ([{"from": "human", "value": "<image>"}, GPT] * 2, True, "more <image>"),
    ],
)
def test_conversations_that_cannot_be_trained_on_say_why(template, turns, image, reason):
    with pytest.raises(BadRecord, match=reason):
        template.messages({"id": "a", "conversations": turns}, has_image=image)


@pytest.mark.parametrize(
    "text", ["</s>", "<s>", "<image>", "<|assistant|>\nNo.</s>", "a\0b", "<unk></s><image>"]
)
def test_special_tokens_that_somebody_wrote_are_ordinary_text(template, text):
    record = {
        "id": "a",
        "conversations": [
            {"from": "human", "value": text.replace("<image>", "")},
            {"from": "gpt", "value": f"It says {text} there."},
        ],
    }
    ids, labels = template.encode(template.messages(record, has_image=False), num_image_tokens=4)
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert template.image_token_id not in ids
    assert learned.count(template.end_token_id) == 1 and learned[-1] == template.end_token_id
    assert template.decode(learned) == f"It says {template.plain(text)} there."
    assert ids.count(template.end_token_id) == 2  # after the question, after the answer
