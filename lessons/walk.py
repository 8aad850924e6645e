"""Prints every step of one held-out record, from its JSON to the loss, with real shapes and values.

    python -m lessons.walk                        record 0 of runs/toy, after stage 2 if that is finished
    python -m lessons.walk --stage 1 --record 3
    python -m lessons.walk --run runs/tinyllama

It takes a few seconds for the toy. Each line names the function that makes the step, so it is a guide to
model.py and data.py: keep both open.
"""

import argparse
import json
import math

import torch

from data import collate
from model import IGNORE_INDEX
from support.errors import UserError, printable, run_script
from support.evaluation import load_heldout_dataset
from support.results import add_run_flags, load_run
from support.settings import INT_FROM_0


def show(function, text):
    print(f"\n{function}")
    for line in printable(text, keep="\n").splitlines():
        print(f"    {line[:140]}")


def numbers(vector, count=5):
    """Returns the first values of a vector as text."""
    return "[" + ", ".join(f"{value:.2f}" for value in vector[:count].tolist()) + ", …]"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, precision="fp32")
    parser.add_argument("--record", type=INT_FROM_0, default=0, metavar="N", help="held-out record (default: 0)")
    args = parser.parse_args()
    model, template, image_processor, run = load_run(args)
    dataset = load_heldout_dataset(args.run / f"stage{run['stage']}", template, image_processor, model.num_image_tokens)
    if args.record >= len(dataset):
        raise UserError(f"there is no held-out record {args.record}: they are numbered 0 to "
                        f"{len(dataset) - 1}")
    record, tokenizer = dataset.records[args.record], template.tokenizer

    show("support/records.py, RecordSet.__getitem__: the record", json.dumps(record, indent=1))
    messages = dataset.template.to_messages(record)
    show("data.py, ChatTemplate.to_messages: <image> moves to the front", "\n".join(map(repr, messages)))
    show("data.py, ChatTemplate.render: the chat template", template.render(messages))

    sample = dataset[args.record]
    ids, labels = sample["input_ids"], sample["labels"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    labeled = [t for t, label in enumerate(labels) if label != IGNORE_INDEX]
    rows = [f"{t:>5}{ids[t]:>8}{labels[t] if t in labeled else '-':>8}  {tokens[t]!r}"
            for t in range(len(ids))]
    if len(rows) > 40:
        rows = [*rows[:8], "…", *rows[-30:]]
    show(f"data.py, ChatTemplate.encode: {len(ids)} tokens, of which {len(labeled)} are labeled",
         "\n".join(["    t      id   label  token", *rows]))

    batch = collate([sample], tokenizer.pad_token_id)
    input_ids, pixel_values = (batch[name].to(model.llm.device) for name in ("input_ids", "pixel_values"))
    if not len(pixel_values):
        raise UserError(f"held-out record {args.record} has no image: choose another one with --record")
    show("data.py, ChatDataset.load_pixel_values: resized, cropped, normalized",
         f"pixel_values {tuple(pixel_values.shape)}, from {pixel_values.min():.2f} to "
         f"{pixel_values.max():.2f}")

    z_v = model.vision_tower(pixel_values).last_hidden_state
    show("model.py, Llava.encode_images: CLIP's patches, then the projector",
         f"CLIP's output     {tuple(z_v.shape)}: class token and patches\n"
         f"Z_v               {tuple(z_v[:, -model.num_image_tokens:].shape)}: the patches alone\n"
         f"Z_v of patch 0    {numbers(z_v[0, -model.num_image_tokens])}\n"
         f"H_v = W · Z_v + b {tuple(model.encode_images(pixel_values).shape)}\n"
         f"H_v of patch 0    {numbers(model.encode_images(pixel_values)[0, 0])}")

    inputs_embeds = model.embed(input_ids, pixel_values)
    first = ids.index(template.image_token_id)
    show("model.py, Llava.embed: one sequence of token embeddings and image features",
         f"inputs_embeds {tuple(inputs_embeds.shape)}; positions {first} to "
         f"{first + model.num_image_tokens - 1} are H_v\nposition {first}    {numbers(inputs_embeds[0, first])}")

    losses = model(**{name: batch[name].to(model.llm.device) for name in
                      ("input_ids", "labels", "pixel_values", "attention_mask")})
    rows = [f"position {t - 1:>4} predicts {tokens[t]!r:<16} "
            f"-log p = {loss:6.3f}   p = {math.exp(-loss):.3f}"
            for t, loss in zip(labeled, losses.clamp(min=0).tolist())]
    vocabulary = model.llm.get_output_embeddings().weight.shape[0]
    show("model.py, Llava.forward: logits at the position before each labeled token, and its -log p",
         f"logits ({len(labeled)}, {vocabulary})\n" + "\n".join(rows[:40]))
    show("stage1_align.py, the loop: the loss is the mean over the labeled tokens",
         f"loss = {losses.sum():.3f} / {len(labeled)} = {losses.mean():.3f} nats per token")


if __name__ == "__main__":
    run_script(main)
