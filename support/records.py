"""Reads the records of a JSON file one at a time, with their images, and splits off held-out records.

595,375 records as Python dicts need gigabytes. Each DataLoader worker would also copy them page by page,
because reading an object changes its reference count. So RecordFile keeps only the position of each record in
the file, in one NumPy array that all workers share, and parses a record when it is asked for.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from support.errors import BadRecord, UserError
from support.files import WorkerFile, find_file
from support.images import ImageStore

# Limits of one record. More takes seconds to tokenize, and nearly all of it would be cut off.
MAX_CHARACTERS, MAX_TURNS = 1_000_000, 10_000


class RecordFile:
    """The records of a JSON file, which must be a list of objects: `records[i]` is a dict."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            text = self.path.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
        self.spans = self._find_spans(text)  # (records, 2): first byte and end of each record
        self._file = WorkerFile(self.path)

    def _find_spans(self, text):
        decode = json.JSONDecoder().raw_decode
        skip = re.compile(r"\s*,\s*(?!\])|\s*(?=\]|\Z)").match  # to the next record, the ] or the end
        # In an ASCII file, as json.dump writes it, characters are bytes. Elsewhere they must be counted.
        size = (lambda start, end: end - start) if text.isascii() else \
            (lambda start, end: len(text[start:end].encode()))
        spans, at, position = [], 0, 0
        try:
            opening = re.match(r"\ufeff?\s*\[\s*", text)
            if not opening:
                raise ValueError("it does not begin with [")
            here = opening.end()
            while text[here] != "]":
                record, end = decode(text, here)
                if not isinstance(record, dict):
                    raise ValueError(f"entry {len(spans) + 1} is not an object but {text[here:end][:40]}")
                start_byte = position + size(at, here)
                position = start_byte + size(here, end)
                spans.append((start_byte, position))
                following = skip(text, end)
                if not following:
                    raise ValueError("a comma is missing, or is one too many")
                at, here = end, following.end()
            if text[here + 1:].strip():
                raise ValueError("there is more text after the closing ]")
        except (ValueError, IndexError, RecursionError) as error:
            message = "it ends in the middle" if isinstance(error, IndexError) else str(error)
            raise UserError(f"{self.path} is not a JSON list of records: {message} (after {len(spans):,} "
                            "complete records); is the download complete?") from error
        if not spans:
            raise UserError(f"{self.path} has no records")
        return np.array(spans, dtype=np.int64)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        start, end = self.spans[index].tolist()
        record = json.loads(self._file.read(start, end - start))
        if record.get("id") is None:  # so that a message about the record says where it is
            record["id"] = f"number {index + 1} of {self.path.name}"
        return record


class RecordSet:
    """Some of the records of a file, with their images.

    Args: file: a RecordFile. images: an ImageStore. indices: which records, in this order.
    """

    def __init__(self, file, images, indices):
        self.file, self.images, self.indices = file, images, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.file[self.indices[i]]

    def subset(self, positions):
        return RecordSet(self.file, self.images, self.indices[positions])

    def fingerprint(self):
        """Returns a hash of where the records are in their file. It changes if records come, go or move.
        An edit that keeps all lengths is not noticed."""
        return hashlib.sha256(self.file.spans[self.indices].tobytes()).hexdigest()[:16]

    def image_name(self, record):
        """Returns the file name of the record's image, or None if it has no image.

        Some copies of the data lack "image". The file is then named after the record's id.
        """
        name = record.get("image")
        if name is None:
            name = f"{record.get('id')}.jpg"
            return name if name in self.images else None
        if not isinstance(name, str) or not name.strip():
            raise BadRecord(record, "'image' is not the name of a file", repr(name)[:80])
        return name

    def open_image(self, record):
        """Returns the record's image (PIL, RGB) or None. Raises BadRecord if it is missing or cannot be
        decoded."""
        name = self.image_name(record)
        return None if name is None else self.images.open(record, name)


def open_records(data, images, heldout_data, heldout_images, held_out, limit, seed):
    """Returns (training, held-out) RecordSets.

    Without `heldout_data`, records of `data` are held out: the first `held_out` ones of a seeded shuffle that
    have different images. Other records of these images are left out, so no held-out image is trained on.
    `limit` counts training records, so the held-out records are the same for every limit. 0 is no limit.
    """
    records, images = RecordFile(find_file(data)), ImageStore(find_file(images))
    order = np.random.default_rng(seed).permutation(len(records))
    if heldout_data:
        other = RecordFile(find_file(heldout_data))
        other_images = ImageStore(find_file(heldout_images))
        heldout_records = RecordSet(other, other_images, np.arange(len(other))[:held_out])
        return RecordSet(records, images, order[:limit or None]), heldout_records
    heldout, heldout_names, train = [], set(), []
    for i in order:
        record = records[i]
        name = str(record.get("image") or record.get("id") or i)
        if name in heldout_names:
            continue
        if len(heldout) < held_out:
            heldout.append(i)
            heldout_names.add(name)
        elif not limit or len(train) < limit:
            train.append(i)
        else:
            break
    if not train:
        raise UserError(f"--held-out {held_out} leaves none of the {len(records)} records of {data} to train "
                        "on (records of a held-out image are left out too): lower --held-out")
    return RecordSet(records, images, np.array(train)), RecordSet(records, images, np.array(heldout))


def check_turns(record, has_image):
    """Returns the texts of a record's turns: question, answer, question, answer, … Raises BadRecord if its
    conversation is malformed."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord(record, "'conversations' is not a list of turns")
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    # The original code also skips an answer that comes before the first question.
    skipped = int(bool(turns) and roles.get(str(turns[0].get("from"))) == "assistant")
    turns = turns[skipped:]
    if len(turns) < 2:
        raise BadRecord(record, "no human turn with a gpt turn after it")
    texts = [turn.get("value") for turn in turns]
    for i, (turn, text) in enumerate(zip(turns, texts)):
        number, role = i + 1 + skipped, "assistant" if i % 2 else "user"
        if roles.get(str(turn.get("from"))) != role or not isinstance(text, str):
            speaker = "gpt" if i % 2 else "human"
            raise BadRecord(record, "turns that do not alternate between human and gpt",
                            f"turn {number} should be from {speaker}, and its value a text")
        if bad := re.search("[\ud800-\udfff]", text):  # half of a UTF-16 pair cannot be encoded
            raise BadRecord(record, "a character that no text should have", f"{ascii(bad[0])}, turn {number}")
        if i % 2 and not text.strip():  # it would teach the model to say nothing
            raise BadRecord(record, "an empty answer", f"turn {number}")
    if len(texts) > MAX_TURNS:
        raise BadRecord(record, f"more than {MAX_TURNS:,} turns", f"{len(texts):,}")
    if (length := sum(map(len, texts))) > MAX_CHARACTERS:
        raise BadRecord(record, f"more than {MAX_CHARACTERS:,} characters of text", f"{length:,}")
    count = sum(text.count("<image>") for text in texts[::2])
    if count > int(has_image):
        raise BadRecord(record, "more <image> in its human turns than images",
                        f"{count} <image>, {int(has_image)} images")
    return texts[:len(texts) // 2 * 2]  # without a last question that has no answer
