"""Reads the records of a JSON file one at a time, with their images, and splits off held-out records.

Used by data.py.

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
from support.files import find_file, read_part
from support.images import ImageStore


class RecordFile:
    """The records of a JSON file, a list of objects or JSON lines: `records[i]` is a dict. Its arrays are
    spans (records, 2), the first byte and the end of each record, and image_hashes and record_hashes, both
    (records,), see hash_record()."""

    def __init__(self, path):
        self.path = Path(path)
        with explain_errors(f"read {path}"):
            text = self.path.read_bytes().decode("utf-8")
        self._find_records(text)

    def _find_records(self, text):
        """Fills spans and hashes."""
        decode = json.JSONDecoder().raw_decode
        opening = re.match(r"\ufeff?\s*(\[?)\s*", text)
        is_list = opening[1] == "["  # else the objects of JSON lines follow each other without commas
        # To the next record, the ] or the end.
        skip = re.compile(r"\s*,\s*(?!\])|\s*(?=\]|\Z)" if is_list else r"\s*").match
        spans, hashes, at, position, here = [], bytearray(), 0, 0, opening.end()
        try:
            while text[here] != "]" if is_list else here < len(text):
                record, end = decode(text, here)
                if not isinstance(record, dict):
                    raise ValueError(f"entry {len(spans) + 1} is not an object but {text[here:end][:40]}")
                start_byte = position + len(text[at:here].encode())  # a character can have several bytes
                position = start_byte + len(text[here:end].encode())
                spans.append((start_byte, position))
                hashes += hash_record(record)
                following = skip(text, end)
                if not following:
                    raise ValueError("a comma is missing, or is one too many")
                at, here = end, following.end()
            if text[here + 1:].strip():
                raise ValueError("there is more text after the closing ]")
        except (ValueError, IndexError, RecursionError) as error:
            message = "it ends in the middle" if isinstance(error, IndexError) else str(error)
            raise UserError(f"{self.path} is not a JSON list of records: {message} (after {len(spans):,} "
                            f"complete records; it begins with {text[:40]!r}): correct it, or fetch it again"
                            ) from error
        if not spans:
            raise UserError(f"{self.path} has no records")
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


def image_of(record):
    """Returns record["image"]. A list of one name stands for this name."""
    image = record.get("image")
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def hash_record(record):
    """Returns two 64-bit hashes as bytes: of the record's image, and of image and conversation together.

    A record without an image is identified by its id, or by its conversation if it has no id. The hashes do
    not depend on where the record is in the file, nor on spaces and escapes.
    """
    conversation, identity = record.get("conversations"), record.get("id")
    image = image_of(record) or (f"{identity}.jpg" if identity is not None else conversation)
    return b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest()
                    for text in (f"{image!a}", f"{image!a} {conversation!a}"))


class RecordSet:
    """Some of the records of a RecordFile, in the order of `indices`, with their images in an ImageStore."""

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

    def records_hash(self):
        """Returns a hash of the records in their order."""
        return hashlib.sha256(self.record_hashes.tobytes()).hexdigest()[:16]

    def image_name(self, record):
        """Returns the file name of the record's image, or None if it has no image. Some copies of the data
        lack "image". The file is then named after the record's id."""
        name = image_of(record)
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


def open_records(data, images, heldout_data, heldout_images, heldout, limit, seed):
    """Returns (training, held-out) RecordSets.

    Without `heldout_data`, records of `data` are held out. The order is that of a seeded hash of their image,
    which does not change if records are added, deleted or sorted. The first `heldout` images are held out,
    with one record each. No other record of these images is trained on.
    `limit` counts training records, so the held-out records are the same for every limit. 0 is no limit.
    """
    file, store = RecordFile(find_file(data)), ImageStore(find_file(images))
    random = np.random.default_rng(seed)
    if heldout_data:
        other = RecordFile(find_file(heldout_data))
        return (RecordSet(file, store, random.permutation(len(file))[:limit or None]),
                RecordSet(other, ImageStore(find_file(heldout_images)), np.arange(len(other))[:heldout]))
    hashes = file.image_hashes ^ random.integers(2**64, dtype=np.uint64)  # another order for every seed
    order = np.lexsort((file.record_hashes, hashes))  # by image, and the records of one image by their hash
    first_of_image = np.unique(hashes[order], return_index=True)[1]  # positions in `order`
    if len(first_of_image) <= heldout:
        raise UserError(f"--heldout {heldout} leaves none of the {len(file)} records of {data} to train "
                        "on (records of a held-out image are left out too): lower --heldout")
    train = order[first_of_image[heldout]:]
    return (RecordSet(file, store, train[:limit or None]),
            RecordSet(file, store, order[first_of_image[:heldout]]))


def describe_records(train, heldout):
    """Returns what run.json says about the records of a run: the number and a hash of those that were trained
    on, and the hash of each held-out record."""
    return {"trained_on": {"count": len(train), "hash": train.records_hash()},
            "heldout": [str(value) for value in heldout.record_hashes]}


def reopen_heldout(data, images, described):
    """Returns the RecordSet of exactly the records that a run held out, in the same order. `described` is
    what describe_records() returned. Prints how many are gone. Raises UserError if none is left."""
    file, hashes = RecordFile(find_file(data)), np.array(described["heldout"], dtype=np.uint64)
    found = np.concatenate([np.flatnonzero(file.record_hashes == value)[:1] for value in hashes])
    if not len(found):
        raise UserError(f"{file.path} contains none of the {len(hashes)} records that this run held out: "
                        "restore the file that it was trained with, or train again with --restart")
    if len(found) < len(hashes):
        print(f"NOTE: {len(hashes) - len(found)} of the {len(hashes)} held-out records are gone from "
              f"{file.path}, or have changed, since this run was trained")
    return RecordSet(file, ImageStore(find_file(images)), found)


# Keys of a record or a turn whose content the model would miss without notice, because nothing reads them.
UNREAD_KEYS = ("images", "image_path", "image_file", "img", "video", "videos", "audio", "audios", "system",
               "system_prompt")


def check_turns(record, has_image):
    """Returns the texts of a record's turns: question, answer, question, answer, … Raises BadRecord if its
    conversation is malformed."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord(record, "'conversations' is not a list of turns")
    for fields in (record, *turns):
        for key in UNREAD_KEYS:
            # Empty values are no content, nor is the name of the record's image, written a second time.
            if fields.get(key) and fields[key] not in (image_of(record), [image_of(record)]):
                raise BadRecord(record, f"the key '{key}' is not read, so its content would be missing: "
                                        "remove the key if that is right")
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
