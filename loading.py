"""Which records are trained on, in which order, and in which portions; and features that are kept on disk.

Also the check that comes before the first step: whoever learns on Thursday that half the images were missing
has lost three days. Nothing here is about LLaVA. """

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ChatDataset, ChatTemplate, collate
from model import num_image_tokens
from pixels import ImageProcessor
from plumbing import UserError, find_file, find_pretrained, make_folder, write_json
from storage import BadRecord, ImageStore, PositionedFile, Records
from weights import vision_config_of


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
    lengths: np.ndarray  # about how many tokens each of these has
    reasons: dict  # {why not: [the sentence about each such record]}
    cut: int  # how many lose turns to max_length


def check(dataset):
    """Looks at every record of the dataset without decoding an image or, mostly, tokenising a word."""
    template, room = dataset.template, dataset.max_length - dataset.num_image_tokens
    overhead = len(template.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]))
    usable, lengths, reasons, cut = [], [], {}, 0
    for i in tqdm(range(len(dataset)), desc="checking the data", unit="record", leave=False, disable=None):
        record = dataset.record(i)
        try:
            name = dataset.images.name_for(record)
            messages = dataset.messages(record)
            if name is not None:
                dataset.images.check(record, name)
            # A token is at least a byte long, so most records are seen to fit without being tokenised.
            size = sum(len(m["content"].encode()) + overhead for m in messages)
            if size > room:
                kept = dataset.tokens(record)[0]
                cut += len(kept) < len(template.encode(messages, dataset.num_image_tokens)[0])
            usable.append(i)
            lengths.append((name is not None) * dataset.num_image_tokens + size // 4)  # English: 4 a token
        except BadRecord as error:
            reasons.setdefault(error.reason, []).append(str(error))
    return Checked(dataset.indices[usable], np.array(lengths), reasons, cut)


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
    dataset.indices, dataset.lengths = checked.usable, checked.lengths


def check_data(settings):
    """--check-data: looks at all records, without any weights; raises UserError where a run would."""
    vision_folder = find_pretrained(settings.vision_tower)
    template = ChatTemplate(find_pretrained(settings.llm))
    image_processor = ImageProcessor(vision_folder, settings.image_fit)
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
    padding: float  # share of positions that hold padding
    waited: float  # seconds until its data were there


class Windows:
    """The windows of a whole training, to be iterated over once.

    The samples of all epochs, each in an order of its own drawn from (seed, epoch), form one long row. A
    window is the next batch_size × grad_accum × processes of them; the last of an epoch holds what is left
    over. That row depends on nothing but the seed, so a run can be taken up at any position in it, even by
    another number of processes.

    Within a window the samples are sorted by length before they are cut into micro-batches, so that little of
    these is padding. Sorting a whole epoch would save no more and spoil the randomness; in here it changes
    nothing, for the loss is a sum over the window. The longest come first: if memory does not suffice, it
    shows at once. The processes take turns: process r of P gets samples r, r + P, r + 2P, …

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
        if effective > settings.batch_size:
            windows = [window[np.argsort(-dataset.lengths[window], kind="stable")] for window in windows]
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
            started = time.perf_counter()
            parts = [next(loader) for _ in micro_batches]  # of (batch, names, bad); see Collate
            waited = time.perf_counter() - started
            masks = [part[0]["attention_mask"] for part in parts]
            padding = 1 - sum(mask.sum().item() for mask in masks) / max(1, sum(m.numel() for m in masks))
            yield Window([part[0] for part in parts], [name for part in parts for name in part[1]],
                         [sentence for part in parts for sentence in part[2]], size, padding, waited)


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


# -- features kept on disk ---------------------------------------------------------------------------------


class FeatureCache:
    """What the frozen encoder makes of each image of a dataset, Z_v, kept on disk (--cache-features).

    It never changes, so from the second time on that an image is seen, encoding it is wasted work. The price
    is disk: N · D_v numbers an image, 0.5 MB with CLIP ViT-L/14 in half precision, against 10 KB of JPEG.
    That pays for some ten thousand images seen several times, and never for one epoch over 595,375.

        <folder>/features.bin     (samples, N, D_v), in the encoder's type, so that nothing is rounded
        <folder>/features.json    of which images and which encoder they are, and how many are done
    """

    def __init__(self, folder, dataset, model, settings, processes):
        self.shape = (model.num_image_tokens, model.vision_tower.config.hidden_size)  # (N, D_v)
        self.dtype = model.vision_tower.dtype
        self.row_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        folder = make_folder(Path(folder))
        self._file = PositionedFile(folder / "features.bin")
        names = [dataset.images.name_for(dataset.record(i)) for i in range(len(dataset))]
        state = {"vision_tower": settings.vision_tower, "vision_layer": settings.vision_layer,
                 "image_fit": settings.image_fit, "precision": str(self.dtype), "images": settings.images,
                 "image names": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
                 "done": 0, "missing": [i for i, name in enumerate(names) if name is None]}
        path, total = folder / "features.json", len(dataset)
        size = total * self.row_bytes
        if path.exists():
            before = json.loads(path.read_text())
            for name, value in state.items():
                if name not in ("done", "missing") and before[name] != value:
                    raise UserError(f"the features in {folder} were made with another {name}: choose another "
                                    "folder with --cache-features, or delete that one")
            state = before
        elif shutil.disk_usage(folder).free < size + 2**20:
            raise UserError(f"--cache-features needs {size / 2**30:,.1f} GiB in {folder}, and the disk has "
                            f"{shutil.disk_usage(folder).free / 2**30:,.1f} left: train on fewer images "
                            "(--limit), or do without")
        if processes.world > 1 and state["done"] < total:
            raise UserError(f"{folder} is not complete: make it with one process, then start several")
        print(f"features of {total:,} images in {folder}: {size / 2**30:,.2f} GiB, {state['done']:,} done")
        if state["done"] < total:
            self._fill(path, state, dataset, model, settings, processes.device)
        self.missing = frozenset(state["missing"])
        self._compare(folder, dataset, model, processes.device)

    def _fill(self, path, state, dataset, model, settings, device):
        batches = DataLoader(Pixels(dataset, range(state["done"], len(dataset))), settings.batch_size,
                             num_workers=settings.workers, collate_fn=list, worker_init_fn=ignore_interrupts)
        with open(self._file.path, "r+b" if state["done"] else "wb") as file:
            file.seek(state["done"] * self.row_bytes)
            for k, batch in enumerate(tqdm(batches, desc="encoding", leave=False, disable=None)):
                rows = torch.zeros(len(batch), *self.shape, dtype=self.dtype)
                there = [j for j, pixel_values in enumerate(batch) if pixel_values is not None]
                if there:
                    pixel_values = torch.stack([batch[j] for j in there]).to(device)
                    rows[there] = model.clip_features(pixel_values).cpu()
                state["missing"] += [state["done"] + j for j in range(len(batch)) if j not in there]
                file.write(rows.view(torch.uint8).numpy().tobytes())
                state["done"] += len(batch)
                if k % 100 == 99 or state["done"] == len(dataset):
                    file.flush()
                    write_json(path, state)

    def _compare(self, folder, dataset, model, device):
        """Names can lie: an encoder fetched anew, other images under the old names. What the encoder makes of
        the first image now must be what was kept of it."""
        i = next(i for i in range(len(dataset)) if i not in self.missing)
        now = model.clip_features(dataset.pixel_values(dataset.record(i))[None].to(device))[0].cpu().float()
        if not torch.allclose(now, self[i].float(), rtol=0.02, atol=0.02 * now.abs().max().item()):
            raise UserError(f"the features in {folder} are not what the encoder makes of these images now: "
                            "delete that folder, and they are made anew")

    def __getitem__(self, i):
        """(N, D_v); None if there is no image, or none that could be decoded."""
        if i in self.missing:
            return None
        row = bytearray(self._file.read(i * self.row_bytes, self.row_bytes))
        return torch.frombuffer(row, dtype=self.dtype).view(self.shape)


class Pixels(torch.utils.data.Dataset):
    """The pixels of some of a dataset's images; None where there is none, or none that can be decoded."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        try:
            return self.dataset.pixel_values(self.dataset.record(self.indices[i]))
        except BadRecord:  # counted and named when the sample itself is loaded
            return None
