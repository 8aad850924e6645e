"""What people and the internet put into data sets: the right pixels and labels, or one clear sentence."""

import gzip
import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, features

from data import IGNORE_INDEX
from support import images
from support.errors import BadRecord, UserError, printable
from support.images import ImageStore, decode_image
from support.records import RecordFile, RecordSet

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
    image.paste(RED, (0, 0, 2, 2))  # the left half is red, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn 90° clockwise to view": the red half is on top
    return saved(image, "PNG", exif=exif)


def animated():
    second = Image.new("RGB", (6, 6), "blue")
    return saved(Image.new("RGB", (6, 6), RED), "GIF", save_all=True, append_images=[second])


def sixteen_bit(value):
    return saved(Image.fromarray(np.full((5, 5), value, dtype=np.uint16)), "PNG")


def palette():
    return Image.new("RGB", (3, 3), RED).convert("P", palette=Image.Palette.ADAPTIVE)


def two_pictures():
    """Returns what some cameras and phones write: a JPEG with a second picture behind it."""
    second = Image.new("RGB", (16, 16), "blue")
    return saved(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[second])


UNUSUAL = {  # name: (file, size, color of the top left pixel)
    "1×1": (saved(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), RED),
    "RGBA": (saved(Image.new("RGBA", (3, 3), (*RED, 255)), "PNG"), (3, 3), RED),
    "half-transparent": (saved(Image.new("RGBA", (3, 3), (0, 0, 0, 51)), "PNG"), (3, 3), (204, 204, 204)),
    "gray-transparent": (saved(Image.new("LA", (3, 3), (0, 0)), "PNG"), (3, 3), (255, 255, 255)),
    "one-transparent-color": (saved(Image.new("RGB", (3, 3)), "PNG", transparency=(0, 0, 0)), (3, 3),
                              (255, 255, 255)),
    "gray": (saved(Image.new("L", (3, 3), 70), "PNG"), (3, 3), (70, 70, 70)),
    "bilevel": (saved(Image.new("1", (3, 3), 1), "PNG"), (3, 3), (255, 255, 255)),
    "palette": (saved(palette(), "PNG"), (3, 3), RED),
    "palette-transparent": (saved(Image.new("P", (3, 3), 0), "PNG", transparency=b"\0"), (3, 3),
                            (255, 255, 255)),
    "16-bit-white": (sixteen_bit(0xFFFF), (5, 5), (255, 255, 255)),
    "16-bit-gray": (sixteen_bit(0x8080), (5, 5), (128, 128, 128)),
    "16-bit-PGM": (io.BytesIO(b"P5 2 1 65535 " + b"\x80\x80" * 2), (2, 1), (128, 128, 128)),
    "EXIF-rotated": (exif_rotated(), (2, 4), RED),
    "animated-GIF": (animated(), (6, 6), RED),
    "MPO": (two_pictures(), (16, 16), RED),
}


def test_every_supported_format_is_known_to_pillow():
    """An unknown one would end the search of Image.open() with a KeyError."""
    Image.init()
    assert set(images.FORMATS) <= set(Image.OPEN)


@pytest.mark.parametrize("file, size, top_left", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_images_give_the_pixels_that_a_viewer_shows(file, size, top_left):
    image = decode_image(file, "unusual")
    assert image.mode == "RGB" and image.size == size
    assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((0, 0)), top_left))


def test_a_cmyk_jpeg_keeps_its_color():
    file = saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)
    image = decode_image(file, "cmyk")
    red, green, blue = image.getpixel((8, 8))
    assert image.mode == "RGB" and red > 220 and green < 60 and blue < 60


@pytest.mark.parametrize("tag, kind", [(0x100, 2), (0x11A, 2), (0x8769, 2), (0x9286, 3), (0x8825, 5)])
def test_a_picture_with_an_odd_exif_tag_is_turned_upright_like_any_other(tmp_path, tag, kind):
    """The tag 0x112 says that the camera was held sideways. The other tag has a wrong type, for example a
    width as text (type 2). Pillow's exif_transpose() raises struct.error or TypeError for such files."""
    entries = struct.pack("<HHII", tag, kind, 1, 0) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    image = Image.new("RGB", (48, 32), RED)
    image.paste("blue", (0, 0, 16, 32))  # blue on the left becomes blue on top
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    opened = ImageStore(tmp_path).open(RECORD, "photo.jpg")
    assert opened.size == (32, 48) and opened.getpixel((16, 4))[2] > 200 > 60 > opened.getpixel((16, 40))[2]


@pytest.mark.parametrize("name", ["12:30.jpg", "ä ö.png", "a\\b.png", "%20.jpg", "…" * 60 + ".png"])
def test_unusual_file_names_are_found_in_a_folder_and_in_a_zip(tmp_path, name):
    (tmp_path / "images").mkdir()
    content = saved(Image.new("RGB", (5, 5), RED), "PNG").getvalue()
    (tmp_path / "images" / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("other.png", content)
        archive.writestr(name, content)
    for store in (ImageStore(tmp_path / "images"), ImageStore(tmp_path / "images.zip")):
        assert store.open(RECORD, name).getpixel((0, 0)) == RED


def test_a_zip_made_on_a_mac_is_read_without_its_hidden_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("photos/", b"")
        archive.writestr("photos/a.png", saved(Image.new("RGB", (5, 5), RED), "PNG").getvalue())
        archive.writestr("__MACOSX/photos/._a.png", b"not an image")
    store = ImageStore(tmp_path / "images.zip")
    assert store.open(RECORD, "a.png").size == store.open(RECORD, "photos/a.png").size == (5, 5)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_file_beside_its_one_folder_or_with_two_members_of_one_name_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("README.txt", "Photos.")
        for side in (5, 6):  # unzip and zipfile take the last
            archive.writestr("photos/a.png", saved(Image.new("RGB", (side, side), RED), "PNG").getvalue())
    store = ImageStore(tmp_path / "images.zip")
    assert store.open(RECORD, "a.png").size == store.open(RECORD, "photos/a.png").size == (6, 6)
    assert "README.txt" in store and "b.png" not in store


# -- images that cannot ------------------------------------------------------------------------------------


def bomb(size=50_000):
    """Returns a PNG of 60 bytes that claims to be 50,000 × 50,000."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 211000000\n"
NOISE = Image.effect_noise((99, 99), 90)
BROKEN = {
    "bomb.png": bomb(),
    "real bomb.png": saved(Image.new("1", (15_000, 15_000)), "PNG").getvalue(),
    "half.jpg": saved(NOISE, "JPEG").getvalue()[:900],
    "half.png": saved(NOISE, "PNG").getvalue()[:3000],
    "text.jpg": b"<html>404 Not Found</html>",
    "empty.jpg": b"",
    "strip.png": saved(Image.new("RGB", (1, 4000)), "PNG").getvalue(),
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "float.tiff": saved(Image.fromarray(np.full((5, 5), .5, np.float32)), "TIFF").getvalue(),
    "depth.tiff": saved(Image.fromarray(np.full((5, 5), 200, np.int32)), "TIFF").getvalue(),
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
}
MISSING = ["nowhere.jpg", "", ".", "./", "a\0b.jpg", "\ud800.jpg", "a" * 300 + ".jpg", "b" * 10_000, "c/" * 3000]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The same broken files in a folder and in a zip."""
    root = tmp_path_factory.mktemp("broken")
    (root / "images").mkdir()
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name, content in BROKEN.items():
            (root / "images" / name).write_bytes(content)
            archive.writestr(name, content)
    return root


@pytest.mark.parametrize("kind", ["images", "images.zip"])
@pytest.mark.parametrize("name", [*BROKEN, *MISSING], ids=lambda name: ascii(name)[1:21])
def test_broken_and_missing_images_are_one_sentence_about_the_record(broken, kind, name):
    store = ImageStore(broken / kind)
    with pytest.raises(BadRecord) as error:
        store.open(RECORD, name)
    sentence = str(error.value)
    assert "'a'" in sentence and "\n" not in sentence and len(sentence) < 600
    sentence.encode()  # it can be printed and written to skipped.txt
    assert ("decoded" if name in BROKEN else "missing") in error.value.reason
    assert (name in store) == (name in BROKEN)
    if name in ("text.jpg", "empty.jpg", "vector.png", "script.eps"):
        assert "it is not an image in a supported format" in sentence
    if name in BROKEN:  # the same sentence every time, so that an image is counted once
        with pytest.raises(BadRecord) as again:
            store.open(RECORD, name)
        assert str(again.value) == sentence
    else:
        with pytest.raises(BadRecord):
            store.check(RECORD, name)


@pytest.mark.parametrize("identity", ["x" * 300, "../secret", "\ud800", "a\0", "/", ["list"], None, 7])
def test_a_record_with_an_odd_id_and_no_image_is_only_text(broken, identity, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([{"id": identity}]))
    for kind in ("images", "images.zip"):
        records = RecordSet(RecordFile(tmp_path / "chat.json"), ImageStore(broken / kind), np.arange(1))
        assert records.image_name(records[0]) is None


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


@pytest.mark.parametrize("name", ["float.tiff", "depth.tiff"])
def test_pixels_whose_white_is_unknown_are_refused_instead_of_black(broken, name):
    with pytest.raises(BadRecord, match="floating-point or 32-bit.*save it with 8 or 16 bits"):
        ImageStore(broken / "images").open(RECORD, name)


def test_an_image_that_is_a_git_lfs_pointer_is_named_as_such(tmp_path):
    (tmp_path / "a.jpg").write_bytes(LFS_POINTER)
    with pytest.raises(BadRecord, match="a.jpg.*begins with .*version https://git-lfs"):
        ImageStore(tmp_path).open(RECORD, "a.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "ICO", "JPEG2000"])
def test_a_damaged_image_is_decoded_or_refused_but_raises_nothing_else(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("GIF", "BMP", "ICO", "JPEG2000") else {"exif": exif}
    content = saved(NOISE.convert("RGB").crop((0, 0, 48, 32)), kind, **options).getvalue()
    random, refused = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 6):
            damaged[position] = random.integers(256)
        try:
            assert decode_image(io.BytesIO(damaged), "damaged").mode == "RGB"
        except ValueError as error:
            assert "damaged cannot be decoded" in str(error)
            refused += 1
    assert refused > 0 or kind == "BMP"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_a_bad_record(tmp_path):
    """Pillow raises RuntimeError for it. Data sets from the web hold such files under the name .jpg."""
    content = bytearray(saved(NOISE.convert("RGB"), "AVIF").getvalue())
    begin = content.index(b"mdat") + 4  # the compressed pixels
    content[begin:] = bytes(len(content) - begin)
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(BadRecord, match="photo.jpg"):
        ImageStore(tmp_path).open(RECORD, "photo.jpg")


@pytest.mark.parametrize("name", [" ", 7, ["a.jpg", "b.jpg"]])
def test_an_image_that_is_no_file_name_is_named_as_such(broken, name, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "a"}, {"image": name}]))
    records = RecordSet(RecordFile(tmp_path / "chat.json"), ImageStore(broken / "images"), np.arange(2))
    with pytest.raises(BadRecord, match="'number 2 of chat.json': 'image' is not the name of one file"):
        records.open_image(records[1])


def test_a_line_break_or_a_terminal_code_in_a_name_is_escaped(refusal, flags):
    sentence = refusal("stage1_align", *flags(1, data="no\nsuch\x1b[31m\u202e.json"))
    assert sentence.startswith(r"stage1_align.py: no\nsuch\x1b[31m\u202e.json does not exist")
    assert str(BadRecord(RECORD, "image missing", "a\nb\x1b[0m")) == r"record 'a': image missing: a\nb\x1b[0m"
    assert printable("ü 漢 🙂 אב") == "ü 漢 🙂 אב"


# -- .zip files --------------------------------------------------------------------------------------------


def zip_with(path, content, method=zipfile.ZIP_STORED, **directory):
    """Writes a zip with the member a.png, whose entry in the zip's directory is changed to `directory`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", content)
        for name, value in directory.items():
            setattr(archive.infolist()[0], name, value)
    return path


PICTURE = saved(Image.new("RGB", (30, 30), RED), "PNG").getvalue()


def test_a_damaged_zip_member_is_noticed(tmp_path):
    content = saved(Image.new("RGB", (30, 30), RED), "BMP").getvalue()  # opens with a damaged pixel too
    path = zip_with(tmp_path / "images.zip", content)
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 0xFF  # one pixel
    path.write_bytes(damaged)
    with pytest.raises(BadRecord, match="'a'.*checksum"):
        ImageStore(path).open(RECORD, "a.png")


@pytest.mark.parametrize("how", [
    {"flag_bits": 1}, {"method": zipfile.ZIP_BZIP2}, {"method": zipfile.ZIP_LZMA}], ids=str)
def test_an_encrypted_zip_or_one_with_another_compression_is_refused_at_once(tmp_path, how):
    with pytest.raises(UserError, match="images.zip is encrypted or compressed.*a.png.*unpack it"):
        ImageStore(zip_with(tmp_path / "images.zip", PICTURE, **how))


@pytest.mark.parametrize("directory", [
    {"header_offset": 10**6}, {"header_offset": 3}, {"CRC": 5}, {"compress_size": 3}, {"compress_size": 10**6}],
                         ids=str)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_with_a_wrong_directory_is_a_bad_record(tmp_path, directory, method):
    content = bytes(5000) if method == zipfile.ZIP_DEFLATED else PICTURE
    path = zip_with(tmp_path / "images.zip", content, method, **directory)
    with pytest.raises(BadRecord, match="'a'"):
        ImageStore(path).open(RECORD, "a.png")


# -- JSON --------------------------------------------------------------------------------------------------

NOT_RECORDS = {  # name: (content, what the sentence says)
    "truncated": (b'[{"id": 1}, {"id": 2', "1 complete"),
    "truncated after a comma": (b'[{"id": 1},', "ends in the middle.*1 complete"),
    "without a comma": (b'[{"id": 1} {"id": 2}]', "comma is missing.*1 complete"),
    "comma after the last": (b'[{"id": 1}, ]', "comma.*one too many|Expecting value"),
    "two commas": (b'[{"id": 1},, {"id": 2}]', "Expecting value.*1 complete"),
    "comma before the first": (b'[, {"id": 1}]', "Expecting value"),
    "without an end": (b'[{"id": 1}', "ends in the middle.*1 complete"),
    "only [": (b"[", "ends in the middle"),
    "nothing": (b"", "no records"),
    "web page": (b"<html>404</html>", "begins with '<html>"),
    "CSV": (b"id,image,question\n1,a.jpg,What?\n", "begins with 'id,image"),
    "Parquet": (b"PAR1\x15\x04\xff\xfe", "cannot read.*UnicodeDecodeError"),
    "gzip": (gzip.compress(b"[]"), "cannot read.*UnicodeDecodeError"),
    "Git LFS": (LFS_POINTER, "begins with 'version https://git-lfs"),
    "words": (b"nothing to see", "not a JSON list of records: Expecting value"),
    "half a JSON line": (b'{"id": 1}\n{"id": 2', "1 complete"),
    "number": (b'[{"id": 1}, 7]', "entry 2"),
    "text": (b'["a"]', "entry 1"),
    "no records": (b"[]", "no records"),
    "nonsense": (b'[{"id": 1}, nonsense]', "1 complete"),
    "not UTF-8": (b'[{"id": "\xff"}]', "cannot read.*utf-8"),
    "UTF-16": ('[{"ä": 1}]'.encode("utf-16"), "cannot read.*utf-8"),
    "NUL": (b'[{"id": "a\0b"}]', "control character"),
    "long number": (b'[{"id": ' + b"9" * 5000 + b"}]", "not a JSON list"),
    "deep list": (b"[" * 100_000, "not a JSON list"),
    "deep record": (b'[{"id": ' + b"[" * 100_000, "not a JSON list"),
}


@pytest.mark.parametrize("content, message", NOT_RECORDS.values(), ids=NOT_RECORDS)
def test_a_file_that_is_no_list_of_records_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        RecordFile(tmp_path / "chat.json")
    assert "chat.json" in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_and_characters_of_any_length_do_not_shift_the_records(tmp_path):
    content = [{"id": "ü€😀"}, {"id": "b", "x": ["𝄞", {"y": None}]}, {"id": "c"}]
    text = "\ufeff" + json.dumps(content, ensure_ascii=False)
    (tmp_path / "chat.json").write_bytes(text.encode())
    records = RecordFile(tmp_path / "chat.json")
    assert [records[i] for i in range(len(records))] == content


HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}


@pytest.mark.parametrize("turns, image, reason", [
    (None, False, "not a list"),
    ([[HUMAN, GPT]], False, "not a list"),
    ([HUMAN], False, "no human turn"),
    ([GPT], False, "no human turn"),
    ([HUMAN, HUMAN, GPT], False, "alternate"),
    ([HUMAN, GPT, GPT], False, "alternate"),
    ([HUMAN, {"from": "gpt"}], False, "a value that is not a text: turn 2: None"),
    ([HUMAN, {"from": "gpt", "value": 3}], False, "a value that is not a text: turn 2: 3"),
    ([HUMAN, {"from": "gpt", "value": " "}], False, "empty answer: turn 2"),
    ([GPT, HUMAN, {"from": "gpt", "value": " "}], False, "empty answer: turn 3"),
    ([HUMAN, {"from": "gpt", "value": "\ud83d"}], False, r"no text should have: '\\ud83d', turn 2"),
    ([{"from": "human", "value": "\ud83d"}, GPT], False, r"no text should have: '\\ud83d', turn 1"),
    ([{**HUMAN, "images": ["b.jpg"]}, GPT], True, "the key 'images' is not read"),
    ([{"from": "human", "value": "<image>What?"}, GPT], False, "more <image>"),
    ([{"from": "human", "value": "<image>\n<image>What?"}, GPT], True, "more <image>"),
    ([{"from": "human", "value": "<image>"}, GPT] * 2, True, "more <image>"),
])
def test_conversations_that_cannot_be_trained_on_say_why(template, turns, image, reason):
    with pytest.raises(BadRecord, match=reason):
        template.to_messages({"id": "a", "conversations": turns}, has_image=image)


@pytest.mark.parametrize("has_image, key, value", [
    (False, "video", "a.mp4"), (False, "videos", ["a.mp4"]), (False, "images", ["a.jpg", "b.jpg"]),
    (False, "image_path", "a.jpg"), (True, "images", ["b.jpg"]), (True, "img", "b"),
    (False, "audio", {"bytes": "RIFF"}), (True, "system", "Be brief."), (False, "system_prompt", "Be brief.")])
def test_content_under_a_key_that_is_not_read_makes_a_record_unusable(template, has_image, key, value):
    record = {"id": "a", key: value, "conversations": [HUMAN, GPT]}
    with pytest.raises(BadRecord, match=f"'a': the key '{key}' is not read"):
        template.to_messages(record, has_image)
    for empty in ("", None, []):  # as tables leave it where there is none
        template.to_messages({**record, key: empty}, has_image)


def test_harmless_keys_are_ignored(template):
    keys = {"model": "gpt-4", "kinds": ["count"], "source": "coco", "width": 640, "image_id": "391895",
            "image_size": [640, 480], "num_images": 1, "has_image": True, "system_fingerprint": "fp_1",
            "topic": "a", "license": "CC-BY", "url": "http://a/b.jpg",
            "image": "a.jpg", "image_name": "a.jpg", "images": ["a.jpg"]}
    turns = [{**HUMAN, "timestamp": "12:30", "weight": 0}, GPT]
    template.to_messages({"id": "a.jpg", "conversations": turns, **keys}, has_image=True)


@pytest.mark.parametrize("text", ["</s>", "<s>", "<image>", "<|assistant|>\nNo.</s>", "a\0b",
                                  "<unk></s><image>"])
def test_special_tokens_in_a_text_are_ordinary_text(template, text):
    record = {"id": "a", "conversations": [{"from": "human", "value": text.replace("<image>", "")},
                                           {"from": "gpt", "value": f"It says {text} there."}]}
    messages = template.to_messages(record, has_image=False)
    ids, labels = template.encode(messages, num_image_tokens=4)
    trained = [label for label in labels if label != IGNORE_INDEX]
    assert template.image_token_id not in ids
    assert trained.count(template.end_token_id) == 1 and trained[-1] == template.end_token_id
    assert template.decode(trained) == f"It says {template.escape(text)} there."
    assert ids.count(template.end_token_id) == 2  # after the question, after the answer
