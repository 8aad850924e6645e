"""Checks the data before the first step, so that a missing image does not stop the run hours later."""

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ChatDataset
from model import count_patches
from support.processes import ignore_signals_in_worker
from support.errors import BadRecord, UserError, explain_errors
from support.pretrained import load_image_processor, load_vision_config
from support.records import RecordSet, image_field


class CheckResult(NamedTuple):
    """What check_records() found."""
    usable: RecordSet  # the records that can be trained on
    lengths: np.ndarray  # (usable,) approximate number of tokens of each
    failures: dict  # {reason: [one sentence per unusable record]}
    shortened: int  # how many usable records lose turns to --max-length
    with_image: int  # how many usable records have an image
    found_by_id: int  # how many of these lack "image", and are found by their id


def check_and_make_datasets(train_records, heldout_records, template, settings, processes):
    """Checks both RecordSets and prints what it finds. Returns (train_dataset, heldout_dataset, lengths): two
    ChatDatasets of the usable records. lengths[i] is the approximate number of tokens of training sample i.

    Without --decode, training images are only looked up, because opening 595,375 of them takes long. Held-out
    images are always opened. Raises UserError if too many records are unusable (--allow-bad), or if
    --max-length is more than the LLM can read.
    """
    max_length, allow_bad = settings.max_length, settings.allow_bad
    if max_length > template.context_length:
        raise UserError(f"--max-length {max_length} is more than {settings.llm} can read: pass --max-length "
                        f"{template.context_length} or less")
    num_image_tokens = count_patches(load_vision_config(settings.vision_tower))  # N
    train = check_records(train_records, template, num_image_tokens, max_length, settings.decode,
                          settings.workers if settings.decode else 0, processes)
    print_check_result(train_records, train)
    if not settings.decode:
        print("  The images of these records were looked up but not opened; --decode opens them.")
    heldout = check_records(heldout_records, template, num_image_tokens, max_length, decode=True,
                            processes=processes)
    print_check_result(heldout_records, heldout)
    num_overlapping = np.isin(heldout.usable.record_hashes, train.usable.record_hashes).sum()
    if num_overlapping:
        print(f"WARNING: {num_overlapping} of {len(heldout.usable)} held-out records are also trained on: "
              "pass other --heldout-data")
    total = len(train_records) + len(heldout_records)
    bad = total - len(train.usable) - len(heldout.usable)
    if bad > allow_bad * total or not len(train.usable):
        hint = " (is --images wrong?)" if "image missing" in train.failures else ""
        which = f"more than --allow-bad {allow_bad} allows" if len(train.usable) else "all of --data included"
        raise UserError(f"{bad:,} of {total:,} records cannot be used, {which}{hint}")
    image_processor = load_image_processor(settings.vision_tower)
    return (*(ChatDataset(records, template, image_processor, num_image_tokens, max_length)
              for records in (train.usable, heldout.usable)), train.lengths)


class RecordChecks(ChatDataset):
    """Item i is (approximate number of tokens, whether turns are lost, whether it has an image, whether this
    was found by its id) of record i, or its BadRecord."""

    def __init__(self, *args, decode):
        super().__init__(*args)
        self.decode = decode
        empty_turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        # Upper bound of what the template adds to one message.
        self.overhead = len(self.template.render(empty_turn))

    def __getitem__(self, i):
        record, images, lost = self.records[i], self.records.images, False
        try:
            name, messages = self.records.image_name(record), self.messages_of(record)
            if name is not None:
                check_image = images.open if self.decode else images.check
                check_image(record, name)
            num_bytes = sum(len(message["content"].encode()) + self.overhead for message in messages)
            # A token is at least one byte long. So a text with fewer bytes than this always fits.
            if num_bytes > self.max_length - self.num_image_tokens:
                length = len(self.encode_record(record)[0])
                lost = length < len(self.template.encode(messages, self.num_image_tokens)[0])
            # English text has about four bytes per token.
            has_image = name is not None
            length = has_image * self.num_image_tokens + num_bytes // 4
            return length, lost, has_image, has_image and image_field(record) is None
        except BadRecord as error:
            return error


def check_records(records, template, num_image_tokens, max_length, decode=False, workers=0, processes=None):
    """Checks every record of a RecordSet and returns a CheckResult. Opens the images if `decode` is true.
    Each of several processes checks a part of the records, and all return the same."""
    rank, world_size = (processes.rank, processes.world_size) if processes else (0, 1)
    part = records.subset(np.arange(len(records))[rank::world_size])
    checks = RecordChecks(part, template, None, num_image_tokens, max_length, decode=decode)
    loader = DataLoader(checks, batch_size=64, collate_fn=list, num_workers=workers,
                        worker_init_fn=ignore_signals_in_worker,
                        generator=torch.Generator())  # see load_steps() in step_batches.py
    results = [None] * len(records)
    results[rank::world_size] = tqdm(chain.from_iterable(loader), "checking the data", len(part),
                                     unit="record", leave=False, disable=None)
    if processes:
        for other, part_results in enumerate(processes.gather(results[rank::world_size])):
            results[other::world_size] = part_results
    usable = [i for i, result in enumerate(results) if not isinstance(result, BadRecord)]
    lengths, *flags = np.array([results[i] for i in usable], dtype=np.int64).reshape(-1, 4).T
    failures = {}
    for result in results:
        if isinstance(result, BadRecord):
            failures.setdefault(result.reason, []).append(str(result))
    return CheckResult(records.subset(usable), lengths, failures, *(int(flag.sum()) for flag in flags))


def print_check_result(records, result):
    """Prints how many of the records are usable, and why the others are not."""
    print(f"checked {len(records):,} records of {records.file.path}: {len(result.usable):,} usable, of "
          f"which {result.shortened:,} lose turns to --max-length")
    print(f"  {result.with_image:,} with an image, of which {result.found_by_id:,} are found by their id; "
          f"{len(result.usable) - result.with_image:,} without an image")
    for reason, sentences in result.failures.items():
        print(f"  {len(sentences):,} unusable: {reason}")
        for sentence in sentences[:10]:
            print(f"    {sentence}")
        if len(sentences) > 10:
            print(f"    … and {len(sentences) - 10:,} more")


def record_skipped_or_stop(skipped, sentences, folder, allow_bad, num_samples):
    """Adds the sentences about images that could not be decoded to the list `skipped` and to
    <folder>/skipped.txt, each record once. Raises UserError if they are more than the fraction `allow_bad` of
    `num_samples`. Each of several processes counts the records that it has seen itself."""
    new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in skipped]
    if not new:
        return
    skipped += new
    path = folder / "skipped.txt"
    with explain_errors(f"write {path}"), open(path, "a", encoding="utf-8") as file:
        file.writelines(sentence + "\n" for sentence in new)
    if len(skipped) > allow_bad * num_samples:
        raise UserError(f"{len(skipped)} records cannot be used, more than --allow-bad "
                        f"{allow_bad} allows of {num_samples:,}; see {path}; the last: {new[-1]}")
