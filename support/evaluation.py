"""Measures a model on held-out records: its loss with the correct, a different and a blank image, the answers
that it generates, and the vocabulary tokens nearest to its projected patches.

Both stages call evaluate_heldout(). The tools call the functions that it uses on a finished run.
"""

from collections import Counter, defaultdict
from itertools import groupby, islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import IMAGE_TOKEN, collate, count_labeled
from model import IGNORE_INDEX
from support.errors import UserError, printable
from support.processes import hide_bar
from support.records import image_name


def make_heldout_batches(dataset, batch_size):
    """Returns the records of a ChatDataset that have an image, as a list of training batches.
    batch["image_names"] lists the names of the images. Raises UserError if there are fewer than two."""
    # measure_heldout() takes the image of the previous record as the different image. So the first record
    # of every image comes first, then the second of every image, and so on.
    earlier, order = Counter(), []  # earlier[name]: how many records with this image came before
    for i in range(len(dataset)):
        name = image_name(dataset.records[i])
        if name is not None:
            order.append((earlier[name], i, name))
            earlier[name] += 1
    if len(earlier) < 2:
        raise UserError(f"{dataset.records.path}: the usable held-out records have fewer than two different "
                        "images, so none can be evaluated with a different one; raise --heldout")
    order.sort()
    chunks = (order[k:k + batch_size] for k in range(0, len(order), batch_size))
    return [collate([dataset[i] for _, i, _ in chunk], dataset.template.pad_token_id)
            | {"image_names": [name for _, _, name in chunk]} for chunk in chunks]


@torch.no_grad()
def record_losses(model, batch):
    """Returns -log p(answers | questions, image) of each record, in nats, summed over its tokens: (B,)."""
    tensors = {name: value.to(model.llm.device) for name, value in batch.items()
               if torch.is_tensor(value)}
    losses = model(**tensors)  # (K,), in the order of the records
    per_record = losses.split(count_labeled(batch).tolist())
    return torch.stack([record.sum() for record in per_record]).cpu().double()  # (B,)


def measure_heldout(model, batches, blank=False):
    """Measures how much the held-out answers depend on the image.

    A falling loss does not show that a model uses the image, because it also falls while the model learns the
    style of the captions. So every record is evaluated with the correct image and with a different one, the
    image of the previous record. (The first record gets the image of the last one.) Only a model that uses
    the image does worse with a different one. A record whose predecessor has the same image counts only in
    "loss" and "loss_blank".

    Args: batches: from make_heldout_batches(). blank: evaluate with a blank image too.
    Returns: a dict.
        loss, loss_different, loss_blank: nats per token with the correct, a different and a blank image.
        correct_more_likely: fraction of records whose answers are more likely with the correct image. A tie
            counts half, so chance is 0.5.
        same_image: number of records without a different image, if there are any.
        not_finite: image names of the records that are left out, because one of their losses is not a finite
            number, if there are any. fp16 can overflow.
    """
    was_training = model.training
    model.eval()
    parts = defaultdict(list)  # for each kind of image: the losses of the records, one tensor per batch
    for i, batch in enumerate(tqdm(batches, "evaluating", leave=False, disable=hide_bar())):
        pixels = batch["pixel_values"]  # (B, 3, S, S)
        # Record k of the batch gets the image of record k - 1.
        previous = torch.cat([batches[i - 1]["pixel_values"][-1:], pixels[:-1]])  # (B, 3, S, S)
        images = {"correct": pixels, "different": previous}
        if blank:  # zero is the mean color, which the preprocessing subtracts
            images["blank"] = torch.zeros_like(pixels)
        for kind, image in images.items():
            parts[kind].append(record_losses(model, batch | {"pixel_values": image}))  # (B,)
    model.train(was_training)
    losses = {kind: torch.cat(tensors) for kind, tensors in parts.items()}  # (records,) each
    tokens = torch.cat([count_labeled(batch) for batch in batches])  # (records,)
    names = [name for batch in batches for name in batch["image_names"]]
    differs = torch.tensor([name != names[i - 1] for i, name in enumerate(names)])
    finite = torch.stack(list(losses.values())).isfinite().all(dim=0)
    tokens, differs = tokens[finite], differs[finite]
    losses = {kind: loss[finite] for kind, loss in losses.items()}  # (finite records,) each
    correct, different = losses["correct"], losses["different"]
    correct_wins = ((correct < different).double() + 0.5 * (correct == different))[differs]
    metrics = {"loss": (correct.sum() / tokens.sum()).item(),
               "loss_different": (different[differs].sum() / tokens[differs].sum()).item(),
               "correct_more_likely": correct_wins.mean().item()}
    if blank:
        metrics["loss_blank"] = (losses["blank"].sum() / tokens.sum()).item()
    if not differs.all():
        metrics["same_image"] = (~differs).sum().item()
    if not finite.all():
        metrics["not_finite"] = [name for name, ok in zip(names, finite.tolist()) if not ok]
    return metrics


def records_with_other_images(records, i, count=1):
    """Returns the next `count` records after record i that have a different image. The first record
    follows the last. Raises UserError if there is none."""
    following = (records[j % len(records)] for j in range(i + 1, i + len(records)))
    excluded_names = (None, image_name(records[i]))
    found = list(islice((record for record in following if image_name(record) not in excluded_names), count))
    if not found:
        raise UserError(f"{records.path}: all held-out records have the same image; raise --heldout")
    return found


def evaluate_heldout(model, dataset, batches):
    """Returns (metrics, example): what measure_heldout() returns for all held-out batches, and of the first
    record the generated and reference answers and the nearest tokens, as a dict. Each of several processes
    evaluates all."""
    prompt, reference = dataset.make_prompt(0)
    metrics = measure_heldout(model, batches)
    [generated] = generate_answers(model, dataset.template, [prompt], max_new_tokens=64)
    return metrics, {"generated": generated, "reference": reference,
                     "nearest_tokens": nearest_tokens(model, dataset.template, prompt["pixel_values"])}


def prompt_batch(template, prompts, device):
    """Returns the batch of a list of prompts (see ChatDataset.make_prompt()) on the device."""
    batch = collate(prompts, template.pad_token_id, padding_side="left")
    return {name: tensor.to(device) for name, tensor in batch.items()}


def generate_answers(model, template, prompts, max_new_tokens=128):
    """Returns the model's answers to a list of prompts, as texts."""
    was_training = model.training
    model.eval()
    room = template.context_length - max(len(prompt["input_ids"]) for prompt in prompts)
    batch = prompt_batch(template, prompts, model.llm.device)
    ids = model.generate(**batch, end_token_ids=template.end_token_ids,
                         max_new_tokens=max(1, min(max_new_tokens, room)))
    model.train(was_training)
    return [template.decode(row) for row in ids]


@torch.no_grad()
def nearest_tokens(model, template, pixel_values, count=3):
    """Returns the vocabulary tokens nearest to each projected patch: N lists of `count` pairs (text, cosine).
    pixel_values: (3, S, S), or None for a record without an image, which has no patches.

    After stage 1 of the toy, the nearest tokens of a patch that shows an object are usually its color and
    its shape. Of the image tokens of real models, about a third can be read in this way, and two thirds by
    comparing them with token vectors inside the LLM (LatentLens, arXiv:2602.00462).
    """
    if pixel_values is None:
        return []
    table = model.llm.get_input_embeddings().weight[:len(template.tokenizer)]  # (V, D)
    patches = model.encode_images(pixel_values[None].to(table.device))[0]  # (N, D)
    # The cosine of two vectors is their product, divided by both lengths.
    products = F.normalize(patches.float(), dim=1).to(table.dtype) @ table.T  # (N, D) @ (D, V) -> (N, V)
    lengths = table.norm(dim=1, dtype=torch.float32).clamp(min=1e-6)  # (V,)
    cosines, ids = (products.float() / lengths).nan_to_num().topk(count)  # (N, count)
    return [[(token_text(template, i), round(cosine, 3)) for i, cosine in zip(*patch)]
            for patch in zip(ids.tolist(), cosines.tolist())]


def token_text(template, i):
    """Returns the text of one token, or its name in the vocabulary if it cannot be read alone."""
    text = template.tokenizer.decode([i]).strip()
    readable = text and "\ufffd" not in text  # a token can be a space, or a part of a character
    return printable(text if readable else str(template.tokenizer.convert_ids_to_tokens(i)))


def print_first_sample(dataset):
    """Prints the first sample of a ChatDataset with its labeled tokens in [[ ]]."""
    template = dataset.template
    ids, labels = template.encode_record(dataset.records[0], dataset.max_length)
    text = ""
    for labeled, group in groupby(range(len(ids)), key=lambda t: labels[t] != IGNORE_INDEX):
        piece = printable(template.tokenizer.decode([ids[t] for t in group]), keep="\n")
        text += f"[[{piece}]]" if labeled else piece
    print("first sample; labeled tokens are in [[ ]]")
    print(shorten_image(text, ids.count(template.image_token_id)))


def shorten_image(text, count):
    """Returns the text with its `count` consecutive <image> tokens written as <image>×count."""
    return text.replace(IMAGE_TOKEN * count, f"{IMAGE_TOKEN}×{count}") if count else text
