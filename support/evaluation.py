"""Measures a model on held-out records: its loss with the correct, a different and a blank image, the answers
that it generates, and the vocabulary tokens nearest to its projected patches.

Both stages call measure_grounding() on all held-out records with an image, and generate_answers() and
nearest_tokens() on the first record. The tools call the same functions on a finished run.
"""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from data import IMAGE_TOKEN, ChatDataset, collate
from model import IGNORE_INDEX
from support.check_records import check_records, print_checked
from support.errors import UserError, printable
from support.records import reopen_heldout


def load_heldout_dataset(run, template, image_processor, num_image_tokens, count=None):
    """Returns the ChatDataset of the records that a run has held out. `run` is its run.json. Only the first
    `count` records are taken if it is given. Records that have become unusable are left out and printed."""
    settings = run["settings"]
    prefix = "heldout_" if settings["heldout_data"] else ""
    records = reopen_heldout(settings[f"{prefix}data"], settings[f"{prefix}images"], run["records"])
    records = records.subset(np.arange(len(records))[:count])
    max_length = settings["max_length"]
    checked = check_records(records, template, num_image_tokens, max_length, decode=True)
    if checked.failures:
        print_checked(records, checked)
    if not len(checked.usable):
        raise UserError(f"none of the {len(records)} held-out records of {records.file.path} can be used")
    return ChatDataset(checked.usable, template, image_processor, num_image_tokens, max_length)


def make_heldout_batches(dataset, pad_token_id, batch_size):
    """Returns the records of a ChatDataset that have an image, as a list of training batches.

    measure_grounding() takes the image of the previous record as the different image. So records that share
    an image are spread: the first record of every image comes first, then the second of every image, and so
    on. A last batch of one record would contain no different image. So np.array_split makes batches of nearly
    equal size, which can be larger than batch_size.
    """
    earlier, order = Counter(), []  # earlier[name]: how many records with this image came before
    for i in range(len(dataset)):
        name = dataset.records.image_name(dataset.records[i])
        if name is not None:
            order.append((earlier[name], i))
            earlier[name] += 1
    samples = [dataset[i] for _, i in sorted(order)]
    chunks = np.array_split(np.arange(len(samples)), max(1, len(samples) // max(2, batch_size)))
    return [collate([samples[i] for i in chunk], pad_token_id) for chunk in chunks]


@torch.no_grad()
def record_losses(model, batch, device):
    """Returns -log p(answers | questions, image) of each record, in nats, summed over its tokens: (B,)."""
    tensors = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
    losses = model(**tensors)  # (K,), in the order of the records
    tokens_per_record = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    return torch.stack([record.sum() for record in losses.split(tokens_per_record)]).cpu().double()  # (B,)


def measure_grounding(model, batches, device, blank=False):
    """Measures how much the held-out answers depend on the image.

    A falling loss does not show that a model uses the image, because it also falls while the model learns the
    style of the captions. So every record is evaluated with the correct image and with a different one, the
    image of the previous record in the batch. Only a model that uses the image does worse with a different
    one.

    Args:
        batches: from make_heldout_batches().
        blank: if true, every record is evaluated with a blank image too.
    Returns: a dict.
        loss, loss_different, loss_blank: nats per token with the correct, a different and a blank image.
        correct_more_likely: fraction of records whose answers are more likely with the correct image. A tie
            counts half, so chance is 0.5.
    """
    was_training = model.training
    model.eval()
    correct, different, blanks, tokens = [], [], [], 0
    for batch in batches:
        pixel_values = batch["pixel_values"]  # (B, 3, S, S)
        correct.append(record_losses(model, batch, device))
        different_batch = {**batch, "pixel_values": pixel_values.roll(1, dims=0)}  # record i gets image i - 1
        different.append(record_losses(model, different_batch, device))
        if blank:  # pixel values are normalized, so zero is CLIP's mean color
            blank_batch = {**batch, "pixel_values": torch.zeros_like(pixel_values)}
            blanks.append(record_losses(model, blank_batch, device))
        tokens += (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()
    model.train(was_training)
    correct, different = torch.cat(correct), torch.cat(different)  # (records,)
    wins = (correct < different).float() + 0.5 * (correct == different)  # (records,)
    measured = {"loss": correct.sum().item() / tokens, "loss_different": different.sum().item() / tokens,
                "correct_more_likely": wins.mean().item()}
    if blank:
        measured["loss_blank"] = torch.cat(blanks).sum().item() / tokens
    return measured


def generate_answers(model, template, prompts, device, max_new_tokens=128, temperature=0.0):
    """Returns the model's answers, as texts, to a list of prompts (see ChatDataset.make_prompt())."""
    batch = collate(prompts, template.tokenizer.pad_token_id, padding_side="left")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    was_training = model.training
    model.eval()
    ids = model.generate(**batch, end_token_ids=[template.end_token_id], max_new_tokens=max_new_tokens,
                         temperature=temperature)
    model.train(was_training)
    return [template.decode(row) for row in ids]


@torch.no_grad()
def nearest_tokens(model, template, pixel_values, count=3):
    """Returns the vocabulary tokens nearest to each projected patch: N lists of `count` pairs (text, cosine).

    The LLM reads a projected patch like a token's embedding. So we compare the patch with all of these
    embeddings. After stage 1 of the toy, the nearest tokens of a patch that shows an object are usually its
    color and its shape. Do not expect this of real models: only about a third of their image tokens can be
    read in this way (arXiv:2602.00462).

    Args: pixel_values: (3, S, S), or None for a record without an image, which has no patches.
    """
    if pixel_values is None:
        return []
    table = model.llm.get_input_embeddings().weight[:len(template.tokenizer)]  # (V, D)
    patches = model.encode_images(pixel_values[None].to(table.device))[0]  # (N, D)
    # The cosine of two vectors is their product, divided by both lengths.
    products = F.normalize(patches.float(), dim=1).to(table.dtype) @ table.T  # (N, D) @ (D, V) -> (N, V)
    lengths = table.norm(dim=1, dtype=torch.float32).clamp(min=1e-6)  # (V,)
    cosines, ids = (products.float() / lengths).nan_to_num().topk(count)  # (N, count)

    def text(i):
        decoded = template.tokenizer.decode([i]).strip()
        readable = decoded and "\ufffd" not in decoded  # a token can be a space, or a part of a character
        return printable(decoded if readable else str(template.tokenizer.convert_ids_to_tokens(i)))

    return [[(text(i), round(cosine, 3)) for i, cosine in zip(*patch)]
            for patch in zip(ids.tolist(), cosines.tolist())]


def mark_labeled(ids, labels, template, color):
    """Returns a sample as text with the labeled tokens marked: in green if `color`, else in [[ ]]."""
    on, off = ("\033[1;32m", "\033[0m") if color else ("[[", "]]")
    text, t = "", 0
    while t < len(ids):
        end = t
        while end < len(ids) and (labels[end] == IGNORE_INDEX) == (labels[t] == IGNORE_INDEX):
            end += 1
        piece = printable(template.tokenizer.decode(ids[t:end]), keep="\n")
        text += piece if labels[t] == IGNORE_INDEX else f"{on}{piece}{off}"
        t = end
    return shorten_image(text, ids.count(template.image_token_id))


def shorten_image(text, count):
    """Returns the text with its `count` consecutive <image> tokens written as <image>×count."""
    return text.replace(IMAGE_TOKEN * count, f"{IMAGE_TOKEN}×{count}") if count else text
