"""Reads the records of a JSON file, splits off the held-out records, and checks all of them."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.errors import BadRecord, UserError, explain_errors
from support.files import find_file
from support.images import ImageStore
from support.processes import hide_bar

# Keys that other programs use for content that this project does not read.
UNREAD_KEYS = {"images", "video", "videos", "audio", "system", "image_path"}
MAX_CHECKED = 2000  # more records than this are not checked thoroughly, because that would take long


class Records:
    """Some of the records of a JSON file: `records[i]` is a dict. `images` is their ImageStore.

    595,375 records as Python dicts take 0.7 GB, and each DataLoader worker would copy them page by page,
    because reading an object changes its reference count (github.com/pytorch/pytorch/issues/13246). So the
    records are kept as JSON in one array, which all workers share, and a record is parsed when it is asked
    for.

    Attributes: path. image_numbers (records in the file,): equal for records with the same image, -1
    without one.
    """

    def __init__(self, records, path, images=None):
        self.path, self.images, numbers = path, images, {}
        texts = [json.dumps(record).encode() for record in records]
        self.content = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, texts)])  # record i of the file is content[ends[i]:ends[i + 1]]
        names = map(image_field, records)
        self.image_numbers = np.array([numbers.setdefault(str(name), len(numbers)) if name else -1
                                       for name in names])
        self.indices = np.arange(len(records))

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]
        return json.loads(self.content[self.ends[index]:self.ends[index + 1]].tobytes())

    def subset(self, positions):
        """Returns the Records at these positions, in their order. They share the content."""
        other = Records.__new__(Records)
        other.__dict__ = {**self.__dict__, "indices": self.indices[positions]}
        return other

    def open_image(self, record):
        """Returns the record's image (PIL, RGB) or None. Raises BadRecord if it is missing or cannot be
        decoded."""
        name = image_name(record)
        return None if name is None else self.images.open(record, name)

    def fingerprint(self):
        """Returns a hash of the records in their order."""
        result = hashlib.sha256(self.content)
        result.update(self.indices.tobytes())
        return result.hexdigest()[:16]


def read_records(path, images=None):
    """Returns the Records of a JSON file, a list of objects. Raises UserError if it is something else."""
    with explain_errors(f"read {path}"), open(path, "rb") as file:
        start = file.read(60)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer instead of the file: run git lfs pull")
    try:
        with open(path, encoding="utf-8-sig") as file:
            records = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON list of records: {error}; it begins with {start!r}") from error
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path} is not a JSON list of records, which are objects; it begins with {start!r}")
    for i, record in enumerate(records):
        if record.get("id") is None:  # so that a message about the record says where it is
            record["id"] = f"number {i + 1} of {Path(path).name}"
    return Records(records, path, images)


def split_records(records, heldout, limit, seed):
    """Returns (training, held-out) Records.

    The images are put into a seeded random order. Of the first `heldout` images, one record each is held out,
    and none of their records is trained on. A record without an image is never held out. The other records
    are put into a seeded random order, too, and the first `limit` of them are trained on (0: all).
    """
    rng = np.random.default_rng(seed)
    image_order = rng.permutation(records.image_numbers.max() + 1)
    if len(image_order) == 0:
        raise UserError(f'no record of {records.path} has an image: the key "image" must name its file')
    if len(image_order) <= heldout:
        raise UserError(f"{records.path} has records of {len(image_order)} different images, so --heldout "
                        f"{heldout} leaves none to train on: lower --heldout")
    is_heldout = np.isin(records.image_numbers, image_order[:heldout])
    numbers, first = np.unique(records.image_numbers, return_index=True)  # the first record of each image
    first = first[numbers >= 0]
    train = rng.permutation(np.flatnonzero(~is_heldout))[:limit or None]
    print(f"{records.path}: {len(records):,} records, of which {heldout:,} are held out; "
          f"{is_heldout.sum() - heldout:,} others show the same images and are left out")
    return records.subset(train), records.subset(first[image_order[:heldout]])


def load_records(args, template):
    """Returns the usable (training, held-out) Records that the settings of a stage name, and about how many
    tokens each training sample has.

    The first --heldout records of --heldout-data are held out. Without --heldout-data, records of --data are
    held out, see split_records(). At most allow_bad of the training records may be unusable. Of the held-out
    records, any number may be unusable, but not all. Their images are all opened, because if one failed
    later, the dataset would return the next sample instead, and that one would count twice.
    """
    train, heldout = read_unchecked_records(args)
    train, lengths = select_usable_records(train, template, args.max_length, args.allow_bad)
    heldout, _ = select_usable_records(heldout, template, args.max_length, thorough=True)
    return train, heldout, lengths


def read_unchecked_records(args):
    """Returns the (training, held-out) Records, not yet checked. The toy's pictures are drawn before its
    first run (about 10 s)."""
    if args.data.startswith("toy/data/"):
        import toy.world  # here, because real data do not need it
        toy.world.draw_if_missing()
    data, images = find_file(args.data), find_file(args.images)
    heldout_data, heldout_images = (find_file(name) if name else None for name in
                                    (args.heldout_data, args.heldout_images))
    records = read_records(data, ImageStore(images))
    if not heldout_data:
        return split_records(records, args.heldout, args.limit, args.seed)
    order = np.random.default_rng(args.seed).permutation(len(records))
    train = records.subset(order[:args.limit or None])
    heldout = read_records(heldout_data, ImageStore(heldout_images)).subset(slice(args.heldout))
    if heldout_images == images:
        shared = {str(image_field(record)) for record in heldout if image_field(record)} & {
            str(image_field(record)) for record in train}
        if shared:
            print(f"WARNING: {len(shared)} held-out images are also trained on: pass other --heldout-data")
    return train, heldout


def image_field(record):
    """Returns record["image"]. A list of one name stands for this name."""
    image = record.get("image")
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def image_name(record):
    """Returns the file name of the record's image, or None if it has no image."""
    name = image_field(record)
    if name in (None, "", []):
        return None
    if not isinstance(name, str) or not name.strip():
        raise BadRecord(record, "'image' is not the name of one file", repr(name)[:80])
    return name


def read_turns(record):
    """Returns the texts of a record's turns: question, answer, question, answer, … Raises BadRecord if its
    conversation is malformed."""
    has_image = image_name(record) is not None
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        hint = "; rename 'messages' to 'conversations'" if "messages" in record else ""
        raise BadRecord(record, f"'conversations' is not a list of turns{hint}")
    for key in sorted(UNREAD_KEYS & set(record)):
        if record[key]:
            raise BadRecord(record, f"the key {key!r} is not read, so its content would be missing: remove "
                                    "the key if that is right, or rename it if it names the image")
    if any("role" in turn and "from" not in turn for turn in turns):
        raise BadRecord(record, "turns in OpenAI's form: rename 'role' to 'from' and 'content' to 'value'")
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    # The original code also skips an answer that comes before the first question.
    leading = int(bool(turns) and roles.get(str(turns[0].get("from"))) == "assistant")
    turns = turns[leading:]
    if len(turns) < 2:
        raise BadRecord(record, "no human turn with a gpt turn after it")
    texts = [turn.get("value") for turn in turns]
    for i, (turn, text) in enumerate(zip(turns, texts)):
        number, role = i + 1 + leading, "assistant" if i % 2 else "user"
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


def select_usable_records(records, template, max_length, allow_bad=1.0, thorough=False, quiet=False):
    """Checks every record and prints why records cannot be used. Returns the usable Records and, as an array,
    about how many tokens the sample of each has.

    Args:
        template, max_length: of the ChatDataset in which the records will be used.
        allow_bad: the fraction of the records that may be unusable.
        thorough: open every image and tokenize every text. Without it, this is done for at most MAX_CHECKED
            records. Of more, images are looked up, and lengths are estimated.
        quiet: print nothing if all records are usable.
    Raises UserError if too many records are unusable, or if the LLM cannot read max_length tokens.
    """
    if max_length > template.context_length:
        raise UserError(f"--max-length {max_length} is more than the LLM can read: pass --max-length "
                        f"{template.context_length} or less")
    thorough = thorough or len(records) <= MAX_CHECKED
    empty_turn = template.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
    added_bytes = len(empty_turn.encode())  # what the template adds to a question and its answer
    usable, lengths, failures = [], [], {}  # failures: {reason: [one sentence per unusable record]}
    for i in tqdm(range(len(records)), "checking the data", unit="record", leave=False, disable=hide_bar()):
        try:
            lengths.append(check_record(records, i, template, max_length, thorough, added_bytes))
            usable.append(i)
        except BadRecord as error:
            failures.setdefault(error.reason, []).append(str(error))
    if failures or not quiet:
        print(f"checked {len(records):,} records of {records.path}: {len(usable):,} usable")
    for reason, sentences in failures.items():
        print(f"  {len(sentences):,} unusable: {reason}")
        print("\n".join(f"    {sentence}" for sentence in sentences[:10]))
        if len(sentences) > 10:
            print(f"    … and {len(sentences) - 10:,} more")
    bad = len(records) - len(usable)
    if bad > allow_bad * len(records) or not usable:
        most_frequent = max(failures, key=lambda reason: len(failures[reason]))
        advice = {"image missing": f"is {records.images.root} the right place of the images?",
                  "too long for --max-length": "raise --max-length"}
        advice = advice.get(most_frequent, "see the reasons above")
        if allow_bad < 1:
            advice += "; --allow-bad says how many may be left out"
        raise UserError(f"{bad:,} of {len(records):,} records of {records.path} cannot be used: {advice}")
    return records.subset(usable), np.array(lengths)


def check_record(records, i, template, max_length, thorough, added_bytes):
    """Returns about how many tokens sample i has; exactly if thorough, or if it may be too long. Raises
    BadRecord if record i cannot be used. added_bytes: what the template adds to a question and its answer."""
    record = records[i]
    name, messages = image_name(record), template.to_messages(record)
    if name is not None and thorough:
        records.images.open(record, name)
    elif name is not None:
        records.images.check(record, name)
    num_image_tokens = 0 if name is None else template.num_image_tokens
    num_bytes = len(messages) // 2 * added_bytes
    num_bytes += sum(len(message["content"].encode()) for message in messages)
    # A token nearly always stands for at least one byte. So a text with few bytes fits, and is not tokenized
    # now, because that would take long for 595,375 records.
    if thorough or num_image_tokens + num_bytes > max_length:
        return len(template.encode_record(record, max_length)[0])  # after the cut
    return num_image_tokens + num_bytes // 4  # English text has about four bytes per token
