"""Does it see? Measures that need no known truth, so they work on any data, after stage 1 and after stage 2.

A falling loss does not show that a model looks at the image: a language model can learn what captions sound
like and never look. So every held-out record is scored three times, with its own image, with another record's
and with a blank one. Only a model that looks is worse off with the wrong image.
"""

from typing import NamedTuple

import numpy as np
import torch

from data import IGNORE_INDEX, IMAGE_TOKEN, collate
from plumbing import UserError


def held_out_batches(dataset, pad_token_id, batch_size):
    """The dataset's records that have an image, as a list of training batches (see collate())."""
    samples = [sample for sample in (dataset[i] for i in range(len(dataset)))
               if sample["pixel_values"] is not None]
    # Chunks of even size, for a last batch of one record would have no other image to be shown.
    if len(samples) < 2:
        raise UserError(f"{dataset.records.path}: {len(samples)} held-out records have an image, and it "
                        "takes two to tell whether the right one matters (see --held-out)")
    chunks = np.array_split(np.arange(len(samples)), max(1, len(samples) // max(2, batch_size)))
    return [collate([samples[i] for i in chunk], pad_token_id) for chunk in chunks]


@torch.no_grad()
def record_losses(model, batch, device):
    """Summed loss of each record of a batch: (B,), -log p(all its answers | its questions, its image)."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    losses = model(**batch)  # (K,), row after row
    per_row = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    return torch.stack([row.sum() for row in losses.split(per_row)]).double().cpu()  # (B,)


def grounding(model, batches, device, blank=False):
    """How much the held-out answers depend on the image.

    Args:
        batches: from held_out_batches(). blank: also measure with an image of CLIP's mean colour.
    Returns:
        a dict: loss, loss_shuffled (and loss_blank): nats per supervised token with the right image,
        another record's and a blank one; image_match: the share of records whose true answers are more
        probable under their own image than under the other. 0.5 is chance.
    """
    was_training = model.training
    model.eval()
    sums, matches, tokens, records = {"loss": 0.0, "loss_shuffled": 0.0, "loss_blank": 0.0}, 0, 0, 0
    for batch in batches:
        pixel_values = batch["pixel_values"]  # (B, 3, H, W)
        right = record_losses(model, batch, device)
        # Record i with the image of record i - 1.
        other = record_losses(model, {**batch, "pixel_values": pixel_values.roll(1, dims=0)}, device)
        sums["loss"] += right.sum().item()
        sums["loss_shuffled"] += other.sum().item()
        if blank:  # pixel_values are standardised, so 0 is the mean colour
            empty = {**batch, "pixel_values": torch.zeros_like(pixel_values)}
            sums["loss_blank"] += record_losses(model, empty, device).sum().item()
        matches += (right < other).sum().item()
        tokens += (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()
        records += len(right)
    model.train(was_training)
    result = {name: total / tokens for name, total in sums.items() if blank or name != "loss_blank"}
    return {**result, "image_match": matches / records}


@torch.no_grad()
def answer(model, template, prompts, device, max_new_tokens=128):
    """Greedy answers, as texts, to a list of prompts (see ChatDataset.question())."""
    batch = collate(prompts, template.tokenizer.pad_token_id, padding_side="left")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    was_training = model.training
    ids = model.eval().generate(**batch, end_token_ids=[template.end_token_id], max_new_tokens=max_new_tokens)
    model.train(was_training)
    return [template.decode(row) for row in ids]


class Question(NamedTuple):
    """A held-out question with its true answer, asked on its own."""
    dataset: object  # a ChatDataset
    record: int  # which of its records
    turn: int
    text: str
    truth: str
    kind: str  # what kind of question, where the record says so ("kinds"), else ""


def questions(dataset):
    """All questions of a dataset's records, in order."""
    asked = []
    for i in range(len(dataset)):
        record = dataset.record(i)
        messages, kinds = dataset.messages(record), record.get("kinds")
        for turn in range(len(messages) // 2):
            text, truth = messages[2 * turn]["content"], messages[2 * turn + 1]["content"]
            text = text.removeprefix(IMAGE_TOKEN).strip()
            asked.append(Question(dataset, i, turn, text, truth, kinds[turn] if kinds else ""))
    return asked


def answer_all(model, template, asked, device, batch_size, max_new_tokens, others_image=False):
    """Generated answers, as texts, to a list of Questions; or what is said with the next record's image."""
    texts = []
    for start in range(0, len(asked), batch_size):
        prompts = []
        for question in asked[start:start + batch_size]:
            dataset = question.dataset
            prompt, _ = dataset.question(question.record, question.turn)
            if others_image and prompt["pixel_values"] is not None:
                other = dataset.record((question.record + 1) % len(dataset))
                prompt["pixel_values"] = dataset.pixel_values(other)
            prompts.append(prompt)
        texts += answer(model, template, prompts, device, max_new_tokens)
    return texts


def f1(said, true):
    """2PR / (P + R), in which precision and recall are over all captions together.

    Args: two lists of sets, one set for each caption: the things that it names, and those that are there.
    """
    hits = sum(len(named & there) for named, there in zip(said, true))
    return 2 * hits / max(1, sum(map(len, said)) + sum(map(len, true)))
