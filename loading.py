"""Which records are trained on, in which order, and in which portions.

Also the check that comes before the first step: whoever learns on Thursday that half the images were missing
has lost three days. Nothing here is about LLaVA. """

import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ChatDataset, ChatTemplate, ImageProcessor, collate
from model import num_image_tokens, vision_config_of
from plumbing import UserError, find_file, find_pretrained
from storage import BadRecord, ImageStore, Records


def open_datasets(settings, template, image_processor, num_image_tokens):
    """(training, held-out) ChatDatasets for a stage's settings; the flags' help says what each means.

    The seeded shuffle comes before everything, so that the held-out records are the same for every --limit.
    """
    parts = (template, image_processor, num_image_tokens, settings.max_length)
    records, images = Records(find_file(settings.data)), ImageStore(find_file(settings.images))
    order = np.random.default_rng(settings.seed).permutation(len(records))
    if settings.heldout_data:
        held_records = Records(find_file(settings.heldout_data))
        held_images = ImageStore(find_file(settings.heldout_images))
        indices = np.arange(len(held_records))[:settings.held_out]
        held_out = ChatDataset(held_records, held_images, indices, *parts)
    else:
        held_out = ChatDataset(records, images, order[:settings.held_out], *parts)
        order = order[settings.held_out:]
    if len(order) == 0:
        raise UserError(f"{settings.data} has {len(records)} records, and --held-out {settings.held_out} "
                        "keeps them back: none is left to train on")
    return ChatDataset(records, images, order[:settings.limit or None], *parts), held_out


# -- the check ---------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    usable: np.ndarray  # indices of the records that can be trained on
    reasons: dict  # {why not: [the sentence about each such record]}
    cut: int  # how many lose turns to max_length


def check(dataset):
    """Looks at every record of the dataset without decoding an image or, mostly, tokenising a word."""
    template, room = dataset.template, dataset.max_length - dataset.num_image_tokens
    overhead = len(template.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]))
    usable, reasons, cut = [], {}, 0
    for i in tqdm(range(len(dataset)), desc="checking the data", unit="record", leave=False, disable=None):
        record = dataset.record(i)
        try:
            name = dataset.images.name_for(record)
            messages = dataset.messages(record)
            if name is not None:
                dataset.images.check(record, name)
            # A token is at least a byte long, so most records are seen to fit without being tokenised.
            if sum(len(m["content"].encode()) + overhead for m in messages) > room:
                whole = template.encode(messages, dataset.num_image_tokens)[0]
                cut += len(dataset.tokens(record)[0]) < len(whole)
            usable.append(i)
        except BadRecord as error:
            reasons.setdefault(error.reason, []).append(str(error))
    return Checked(dataset.indices[usable], reasons, cut)


def keep_usable(dataset, share_allowed):
    """Checks the dataset, prints what was found, and leaves only usable records in it.

    Raises UserError if more than `share_allowed` of the records are unusable.
    """
    total, checked = len(dataset), check(dataset)
    print(f"checked {total:,} records of {dataset.records.path}: {len(checked.usable):,} usable; "
          f"{checked.cut:,} of these lose turns to --max-length {dataset.max_length}")
    for reason, sentences in checked.reasons.items():
        print(f"  {len(sentences):,} unusable: {reason}")
        for sentence in sentences[:10]:
            print(f"    {sentence}")
        if len(sentences) > 10:
            print(f"    … and {len(sentences) - 10:,} more")
    bad = total - len(checked.usable)
    if bad > share_allowed * total:
        hint = ""
        if missing := checked.reasons.get("image missing"):
            name = missing[0].split(": ")[-1].split(" is not in ")[0]
            root = dataset.images.likely_root(name)
            hint = f" (is --images wrong? {name} lies in {root})" if root else " (is --images wrong?)"
        raise UserError(f"{bad:,} of {total:,} records of {dataset.records.path} cannot be used, more than "
                        f"--allow-bad {share_allowed} allows{hint}")
    dataset.indices = checked.usable


def check_data(settings):
    """--check-data: looks at all records, without any weights; raises UserError where a run would."""
    vision_folder = find_pretrained(settings.vision_tower)
    template, image_processor = ChatTemplate(find_pretrained(settings.llm)), ImageProcessor(vision_folder)
    n = num_image_tokens(vision_config_of(vision_folder))
    for dataset in open_datasets(settings, template, image_processor, n):
        keep_usable(dataset, settings.allow_bad)


# -- the order ---------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """What one optimizer step sees, of one process's share."""
    batches: list  # micro-batches, each as collate() makes it
    names: list  # the ids of their records
    bad: list  # sentences about images that could not be decoded, and were replaced
    size: int  # samples, over all processes


class Windows:
    """The windows of a whole training, to be iterated over once.

    The samples of all epochs, each in an order of its own drawn from (seed, epoch), form one long row. A
    window is the next batch_size × grad_accum × processes of them; the last of an epoch holds what is left
    over. Within a window the processes take turns: process r of P gets samples r, r + P, r + 2P, … That row
    depends on nothing but the seed, so a run can be taken up at any position in it, even by another number of
    processes.

    Args:
        samples_done: how many samples of the row were seen before, by a run that is now resumed.
        steps_done: in how many optimizer steps.
    """

    def __init__(self, dataset, settings, pad_token_id, processes, samples_done=0, steps_done=0):
        effective = settings.batch_size * settings.grad_accum * processes.world
        if settings.max_steps is None:
            epochs, most = settings.epochs, None
        else:  # as many epochs as the steps need
            epochs = -(-(samples_done + settings.max_steps * effective) // len(dataset))
            most = max(0, settings.max_steps - steps_done)
        windows = []
        for epoch in range(samples_done // len(dataset), epochs):
            order = np.random.default_rng([settings.seed, epoch]).permutation(len(dataset))
            begin = max(0, samples_done - epoch * len(dataset))
            windows += [order[i:i + effective] for i in range(begin, len(order), effective)]
        self.sizes = [len(window) for window in windows[:most]]  # over all processes
        self.total_steps = steps_done + len(self.sizes)

        mine = [window[processes.rank::processes.world].tolist() for window in windows[:most]]
        size = settings.batch_size
        self._micro_batches = [[share[i:i + size] for i in range(0, len(share), size)] for share in mine]
        self._loader = DataLoader(
            dataset, batch_sampler=[batch for window in self._micro_batches for batch in window],
            collate_fn=Collate(pad_token_id), num_workers=settings.workers, worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # its own, so that making a loader draws nothing from the global one
            pin_memory=processes.device.type == "cuda")

    def __iter__(self):
        loader = iter(self._loader)
        for micro_batches, size in zip(self._micro_batches, self.sizes):
            parts = [next(loader) for _ in micro_batches]  # of (batch, names, bad); see Collate
            yield Window([part[0] for part in parts], [name for part in parts for name in part[1]],
                         [sentence for part in parts for sentence in part[2]], size)


class Collate:
    """collate(), with the names of the records and of what could not be read beside the tensors. A class and
    no lambda, because processes that are spawned (macOS, Windows) get it pickled."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, samples):
        return (collate(samples, self.pad_token_id), [sample["name"] for sample in samples],
                [sentence for sample in samples for sentence in sample["bad"]])


def ignore_interrupts(worker):
    """Ctrl-C reaches every process; the main one wants to finish its step, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
