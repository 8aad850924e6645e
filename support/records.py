"""Reads the records of a JSON file one at a time, with their images, and splits off held-out records.

595,375 records as Python dicts take 0.7 GB. Each DataLoader worker would also copy them page by page, because
reading an object changes its reference count. So RecordFile keeps only the position of each record in the
file and two hashes, in NumPy arrays that all workers share, and parses a record when it is asked for.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from support.errors import BadRecord, UserError, explain_errors
from support.files import find_file, describe_format, read_part
from support.images import ImageStore


class RecordFile:
    """The records of a JSON file, a list of objects or JSON lines: `records[i]` is a dict.

    Attributes: spans (records, 2), first byte and end of each record. image_hashes and record_hashes, both
    (records,), see hash_record(). sha256, of the file. If the argument `spans` is given, the file is not
    parsed, and there are no hashes and no sha256.
    """

    def __init__(self, path, spans=None):
        self.path, self.spans = Path(path), spans
        if spans is None:
            with explain_errors(f"read {path}"):
                content = self.path.read_bytes()
            kind = describe_format(content)
            if re.match(rb"[^\n\0-\x08\[{<]*[,;\t][^\n\0-\x08]*\n", content):
                kind = "a table (CSV or TSV): save it as JSON"
            if kind:
                raise UserError(f"{path} is {kind}")
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
            self.sha256 = hashlib.sha256(content).hexdigest()
            self._find_records(content)

    def _find_records(self, content):
        """Fills spans and hashes."""
        text = content.decode("latin-1")  # one character per byte, so positions are those in the file
        find_end = json.JSONDecoder().raw_decode
        opening = re.match(r"(?:\xef\xbb\xbf)?\s*(\[?)\s*", text)  # UTF-8 may begin with these three bytes
        is_list = opening[1] == "["  # else the objects of JSON lines follow each other without commas
        # To the next record, the ] or the end.
        skip = re.compile(r"\s*,\s*(?!\])|\s*(?=\]|\Z)" if is_list else r"\s*").match
        spans, hashes, here = [], bytearray(), opening.end()
        try:
            while text[here] != "]" if is_list else here < len(text):
                _, end = find_end(text, here)
                record = json.loads(content[here:end])
                if not isinstance(record, dict):
                    raise ValueError(f"entry {len(spans) + 1} is not an object but {text[here:end][:40]}")
                spans.append((here, end))
                hashes += hash_record(record)
                following = skip(text, end)
                if not following:
                    raise ValueError("a comma is missing, or is one too many")
                here = following.end()
            if text[here + 1:].strip():
                raise ValueError("there is more text after the closing ]")
        except (ValueError, IndexError, RecursionError) as error:
            message = "it ends in the middle" if isinstance(error, IndexError) else str(error)
            raise UserError(f"{self.path} is not a JSON list of records: {message} (after {len(spans):,} "
                            "complete records): correct it, or fetch it again") from error
        if not spans:
            raise UserError(f"{self.path} has no records")
        if not is_list and len(spans) == 1 and "conversations" not in record:
            keys = ", ".join(map(repr, record))[:80]
            raise UserError(f"{self.path} is one JSON object ({keys}) instead of a list of records: save "
                            "only the list")
        self.spans = np.array(spans, dtype=np.int64)
        self.image_hashes, self.record_hashes = np.frombuffer(hashes, "<u8").reshape(-1, 2).T.copy()

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        start, end = self.spans[index].tolist()
        record = json.loads(read_part(self.path, start, end - start))
        if record.get("id") is None:  # so that a message about the record says where it is
            record["id"] = f"number {index + 1} of {self.path.name}"
        return record


def image_field(record):
    """Returns record["image"]. A list of one name stands for this name."""
    image = record.get("image")
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def hash_record(record):
    """Returns two 64-bit hashes as bytes: of the record's image, and of image and conversation together.
    A record without an image is identified by its id, or by its conversation if it has no id."""
    conversation, identity = record.get("conversations"), record.get("id")
    image = image_field(record) or (f"{identity}.jpg" if identity is not None else conversation)
    return b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest()
                    for text in (f"{image!a}", f"{image!a} {conversation!a}"))


class RecordSet:
    """Some of the records of a RecordFile, with their ImageStore. indices: which records, in this order."""

    def __init__(self, file, images, indices):
        self.file, self.images, self.indices = file, images, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.file[self.indices[i]]

    def subset(self, positions):
        return RecordSet(self.file, self.images, self.indices[positions])

    @property
    def record_hashes(self):
        return self.file.record_hashes[self.indices]

    def fingerprint(self):
        """Returns a hash of the records in their order."""
        return hashlib.sha256(self.record_hashes.tobytes()).hexdigest()[:16]

    def image_name(self, record):
        """Returns the file name of the record's image, or None if it has no image. Some copies of the data
        lack "image". The file is then named after the record's id."""
        name = image_field(record)
        if name in ("", []):  # text only, as other programs write it
            return None
        if name is None:
            name = f"{record.get('id')}.jpg"
            return name if name in self.images else None
        if not isinstance(name, str) or not name.strip():
            raise BadRecord(record, "'image' is not the name of one file", repr(name)[:80])
        return name

    def open_image(self, record):
        """Returns the record's image (PIL, RGB) or None. Raises BadRecord if it is missing or cannot be
        decoded."""
        name = self.image_name(record)
        return None if name is None else self.images.open(record, name)


def open_records(settings):
    """Returns the (training, held-out) RecordSets that the settings name.

    Without --heldout-data, records of --data are held out. Images are sorted by a seeded hash of their name,
    so the choice does not change if records are added, deleted or sorted. The first --heldout images are held
    out, with one record each. No other record of these images is trained on.
    --limit counts training records, so the held-out records are the same for every limit.
    """
    file, store = RecordFile(find_file(settings.data)), ImageStore(find_file(settings.images))
    rng, heldout, limit = np.random.default_rng(settings.seed), settings.heldout, settings.limit or None
    if settings.heldout_data:
        other, images = RecordFile(find_file(settings.heldout_data)), find_file(settings.heldout_images)
        return (RecordSet(file, store, rng.permutation(len(file))[:limit]),
                RecordSet(other, ImageStore(images), np.arange(len(other))[:heldout]))
    hashes = file.image_hashes ^ rng.integers(2**64, dtype=np.uint64)  # another order for every seed
    order = np.lexsort((file.record_hashes, hashes))  # by image, and the records of one image by their hash
    first_of_image = np.unique(hashes[order], return_index=True)[1]  # positions in `order`
    if len(first_of_image) <= heldout:
        raise UserError(f"--heldout {heldout} leaves none of the {len(file)} records of {settings.data} to "
                        "train on, because all records of a held-out image are left out: lower --heldout")
    train = order[first_of_image[heldout]:]
    return (RecordSet(file, store, train[:limit]),
            RecordSet(file, store, order[first_of_image[:heldout]]))


def describe_records(train, heldout):
    """Returns what run.json says about the records of a run: a hash and the number of those that were trained
    on, and for each held-out record its hash, its position in the file, its first byte and its end."""
    rows = zip(heldout.record_hashes, heldout.indices, heldout.file.spans[heldout.indices])
    return {"trained_on": {"count": len(train), "hash": train.fingerprint()},
            "heldout_file": {"sha256": heldout.file.sha256, "records": len(heldout.file)},
            "heldout": [f"{value} {index} {start} {end}" for value, index, (start, end) in rows]}


def reopen_heldout(data, images, described):
    """Returns the RecordSet of exactly the records that a run held out, in the same order. `described` is
    what describe_records() returned. If the file has changed, prints what is missing."""
    path, store, total = find_file(data), ImageStore(find_file(images)), described["heldout_file"]["records"]
    rows = np.array([[int(word) for word in row.split()] for row in described["heldout"]], dtype=np.uint64)
    hashes, indices = rows[:, 0], rows[:, 1].astype(np.int64)
    with explain_errors(f"read {path}"):
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if sha256 == described["heldout_file"]["sha256"]:  # the other records need not be parsed
        spans = np.zeros((total, 2), dtype=np.int64)
        spans[indices] = rows[:, 2:]
        return RecordSet(RecordFile(path, spans), store, indices)
    file = RecordFile(path)
    found = np.concatenate([np.flatnonzero(file.record_hashes == value)[:1] for value in hashes])
    if not len(found):
        raise UserError(f"{path} contains none of the {len(hashes)} records that this run held out: restore "
                        "the file that it was trained with, or train again with --restart")
    more, gone = len(file) - total, len(hashes) - len(found)
    counted = f"{abs(more):,} {'more' if more > 0 else 'fewer'} records" if more else "as many records"
    print(f"NOTE: {path} has changed since this run was trained: it has {counted}, and "
          f"{gone or 'none'} of the {len(hashes)} held-out records are gone or changed")
    return RecordSet(file, store, found)


# A key with media or a system text: "videos", "image_path", "system_prompt". Not: "image_id", "kinds".
MEDIA_KEY = re.compile(
    r"(.*[\W_\d])?(image|img|picture|photo|frame|pixel|clip|video|audio|sound|speech|voice|media|system)s?"
    r"[\W_\d]*((file|path|name|url|uri|list|data|bytes|base64|value|prompt|message|text|content)s?[\W_\d]*)*",
    re.IGNORECASE)
MEDIA_FILE = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?|heic|mp4|avi|mov|mkv|webm|wav|mp3|flac)", re.I)


def check_keys(record, has_image):
    """Raises BadRecord if the record or a turn has content for the model under a key that is not read. Such
    keys are known by their name and, if the record has no image, by a value such as "a.jpg". Numbers and
    empty values are no content, nor is the name of the record's image, written a second time."""
    image = image_field(record)
    for fields in ({**record, "id": None, "image": None}, *record["conversations"]):
        for key, value in fields.items():
            words = re.sub("(?<=[a-z])(?=[A-Z])", "_", key)  # imagePath becomes image_Path
            is_file = isinstance(value, str) and key != "value" and MEDIA_FILE.fullmatch(value)
            if (value and isinstance(value, (str, list, dict)) and value not in (image, [image])
                    and (MEDIA_KEY.fullmatch(words) or is_file and not has_image)):
                raise BadRecord(record, f"the key {repr(key)[:40]} is not read, so its content would be "
                                        "missing: remove the key if that is right")


def check_turns(record, has_image):
    """Returns the texts of a record's turns: question, answer, question, answer, … Raises BadRecord if its
    conversation is malformed."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord(record, "'conversations' is not a list of turns")
    check_keys(record, has_image)
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    # The original code also skips an answer that comes before the first question.
    skipped = int(bool(turns) and roles.get(str(turns[0].get("from"))) == "assistant")
    turns = turns[skipped:]
    if len(turns) < 2:
        raise BadRecord(record, "no human turn with a gpt turn after it")
    texts = [turn.get("value") for turn in turns]
    for i, (turn, text) in enumerate(zip(turns, texts)):
        number, role = i + 1 + skipped, "assistant" if i % 2 else "user"
        if roles.get(str(turn.get("from"))) != role:
            raise BadRecord(record, "turns that do not alternate between human and gpt",
                            f"turn {number} should be from {'gpt' if i % 2 else 'human'}")
        if not isinstance(text, str):
            raise BadRecord(record, "a value that is not a text", f"turn {number}: {repr(text)[:80]}")
        if bad := re.search("[\ud800-\udfff]", text):  # half of a UTF-16 pair cannot be encoded
            raise BadRecord(record, "a character that no text should have", f"{ascii(bad[0])}, turn {number}")
        if i % 2 and not text.strip():  # it would teach the model to say nothing
            raise BadRecord(record, "an empty answer", f"turn {number}")
    count = sum(text.count("<image>") for text in texts[::2])
    if count > int(has_image):
        raise BadRecord(record, "more <image> in its human turns than images",
                        f"{count} <image>, {int(has_image)} images")
    return texts[:len(texts) // 2 * 2]  # without a last question that has no answer
