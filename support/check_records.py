"""Checks the data before the first step, so that a missing image does not stop the run hours later.

Uses data.py.
"""

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ChatDataset
from support.checkpoints import ignore_signals_in_worker
from support.errors import BadRecord, UserError, explain_errors
from support.records import RecordSet


class Checked(NamedTuple):
    """What check_records() found."""
    usable: RecordSet  # the records that can be trained on
    lengths: np.ndarray  # (usable,) approximate number of tokens of each
    failures: dict  # {reason: [one sentence per unusable record]}
    shortened: int  # how many usable records lose turns to --max-length
    with_image: int  # how many usable records have an image


def drop_unusable_records(train_records, heldout_records, template, num_image_tokens, settings):
    """Checks both RecordSets, prints what it finds, and returns the usable records: (train_records, lengths,
    heldout_records). lengths[i] is the approximate number of tokens of training record i.

    Without --decode, training images are only looked up, because opening 595,375 of them takes long. Held-out
    images are always opened. Raises UserError if too many records are unusable.
    """
    workers = settings.workers if settings.decode else 0
    train = check_records(train_records, template, num_image_tokens, settings.max_length, settings.decode,
                          workers)
    print_checked(train_records, train)
    if not settings.decode:
        print("  The images of these records were looked up but not opened; --decode opens them.")
    heldout = check_records(heldout_records, template, num_image_tokens, settings.max_length, decode=True)
    print_checked(heldout_records, heldout)
    both = np.isin(heldout.usable.record_hashes, train.usable.record_hashes).sum()
    if both:
        print(f"WARNING: {both} of {len(heldout.usable)} held-out records are also trained on: choose others")
    total = len(train_records) + len(heldout_records)
    bad = total - len(train.usable) - len(heldout.usable)
    if bad > settings.allow_bad * total or not len(train.usable):
        hint = " (is --images wrong?)" if "image missing" in train.failures else ""
        raise UserError(f"{bad:,} of {total:,} records cannot be used, which leaves {len(train.usable):,} to "
                        f"train on; --allow-bad {settings.allow_bad} is the fraction allowed{hint}")
    if heldout.with_image < 2:
        raise UserError(f"{heldout_records.file.path}: fewer than two usable held-out records have an image, "
                        "so none can be evaluated with a different image; raise --heldout")
    return train.usable, train.lengths, heldout.usable


class RecordChecks(ChatDataset):
    """Item i is (approximate number of tokens, whether turns are lost, whether it has an image) of record i,
    or (reason, sentence) if the record is unusable.

    Most records are not even tokenized. A token is at least one byte long, so a text with at most
    max_length - num_image_tokens bytes fits.
    """

    def __init__(self, *args, decode):
        super().__init__(*args)
        self.look = self.records.images.open if decode else self.records.images.check
        empty_turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        # Upper bound of what the template adds to one message.
        self.overhead = len(self.template.render(empty_turn))

    def __getitem__(self, i):
        record, lost = self.records[i], False
        try:
            name, messages = self.records.image_name(record), self.to_messages(record)
            if name is not None:
                self.look(record, name)
            num_bytes = sum(len(message["content"].encode()) + self.overhead for message in messages)
            if num_bytes > self.max_length - self.num_image_tokens:
                length = len(self.encode(record)[0])
                lost = length < len(self.template.encode(messages, self.num_image_tokens)[0])
        except BadRecord as error:
            return error.reason, str(error)
        has_image = name is not None
        length = has_image * self.num_image_tokens + num_bytes // 4  # a token has about 4 bytes
        return length, lost, has_image


def check_records(records, template, num_image_tokens, max_length, decode=False, workers=0):
    """Looks at every record of a RecordSet and returns a Checked. Opens the images if `decode` is true."""
    checks = RecordChecks(records, template, None, num_image_tokens, max_length, decode=decode)
    loader = DataLoader(checks, batch_size=64, collate_fn=list, num_workers=workers,
                        worker_init_fn=ignore_signals_in_worker,
                        generator=torch.Generator())  # see load_steps()
    usable, results, failures = [], [], {}
    for i, result in enumerate(tqdm(chain.from_iterable(loader), "checking the data", len(records),
                                    unit="record", leave=False, disable=None)):
        if len(result) == 3:
            usable.append(i)
            results.append(result)
        else:
            failures.setdefault(result[0], []).append(result[1])
    lengths, lost, has_image = np.array(results, dtype=np.int64).reshape(-1, 3).T
    return Checked(records.subset(usable), lengths, failures, int(lost.sum()), int(has_image.sum()))


def print_checked(records, checked):
    """Prints how many of the records are usable, and why the others are not."""
    print(f"checked {len(records):,} records of {records.file.path}: {len(checked.usable):,} usable, "
          f"{checked.with_image:,} of them with an image; {checked.shortened:,} lose turns to --max-length")
    for reason, sentences in checked.failures.items():
        print("\n    ".join([f"  {len(sentences):,} unusable: {reason}", *sentences[:10]]))
        if len(sentences) > 10:
            print(f"    … and {len(sentences) - 10:,} more")


def note_skipped_images(skipped, sentences, folder, allow_bad, num_samples):
    """Adds the sentences about images that could not be decoded to the list `skipped` and to
    <folder>/skipped.txt, each record once. Raises UserError if they are more than the fraction `allow_bad` of
    `num_samples`. Each of several processes counts the records that it has seen itself."""
    new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in skipped]
    if new:
        skipped += new
        path = folder / "skipped.txt"
        with explain_errors(f"write {path}"), open(path, "a", encoding="utf-8") as file:
            file.writelines(sentence + "\n" for sentence in new)
        if len(skipped) > allow_bad * num_samples:
            raise UserError(f"the images of {len(skipped)} records cannot be decoded, more than --allow-bad "
                            f"{allow_bad} allows of {num_samples:,}; see {path}; the last: {new[-1]}")
