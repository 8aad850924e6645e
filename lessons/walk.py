"""Prints every step of one held-out record, from its JSON to the loss and back to the projector's gradient.

    python -m lessons.walk                        runs/toy, stage 1, record 0: the caption that stage 1 prints
    python -m lessons.walk --record 3
    python -m lessons.walk --stage 2              a record of stage 2, a conversation
    python -m lessons.walk --run runs/tinyllama

It takes a few seconds for the toy. Each heading names the function that makes the step, so keep data.py and
model.py open while you read.
"""

import argparse
import json
import math
from pathlib import Path
from textwrap import fill

import torch
import torch.nn.functional as F

from data import collate
from model import IGNORE_INDEX
from support.devices import choose_device
from support.errors import UserError, printable, run_script
from support.trained import load_heldout_dataset, load_trained
from support.settings import INT_FROM_0

NO_LABEL = """The sign - stands for the label {ignored}. Image positions are never labeled, because their
id, {id}, {reason}: the LLM has the ids 0 to {last}. In the original code, the id of the image is −200
(IMAGE_TOKEN_INDEX)."""
READING_ORDER = """The LLM reads the {n} patches as it reads {n} words, row by row. RoPE gives them the
consecutive positions {first} to {last}, so a patch comes {side} positions after the one above it. RoPE does
not say that it is below, but CLIP has added a position embedding of its own. Attention is causal, so each
patch sees only the text and the patches before it, while question and answer, which come after the image, see
all patches. The lesson image_attention tries another mask."""
COMPARE = """Compare the words that any caption contains with those that only the image can tell."""
FROZEN = """The LLM is frozen, so no gradient is stored for its weights. But the loss is a function of H_v
through all of its blocks, so by the chain rule the gradient passes through them to H_v, and from there to W
and b, which are trained. No image position has a label, so the gradient arrives at the patches only through
attention, from later positions that read their keys and values."""


def show(function, text):
    print(f"\n{function}")
    for line in printable(text, keep="\n").splitlines():
        print(f"    {line if len(line) <= 140 else line[:139] + '…'}".rstrip())


def explain(text, **values):
    return fill(text.format(**values), 106)


def numbers(vector, count=5):
    """Returns the first values of a vector as text."""
    return "[" + ", ".join(f"{value:.2f}" for value in vector[:count].tolist()) + ", …]"


def shape(tensor):
    return str(tuple(tensor.shape))


def forget_projector(model, seed):
    """Gives the projector fresh random weights, those of the stage's seed."""
    torch.manual_seed(seed)
    for module in model.projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def backward(model, batch):
    """Calls model(**batch) and backward(), as stage 1 does. Returns the loss of each labeled token, and a
    list of (name, tensor with its gradient), from the logits back to the projector."""
    kept = []

    def keep(name):
        def hook(module, inputs, output=None):
            tensor = inputs[0] if output is None else output
            tensor.retain_grad()  # autograd keeps the gradient of parameters only
            kept.append((name, tensor))
        return hook

    blocks = list(enumerate(model.llm.get_decoder().layers, start=1))
    hooks = [model.projector.register_forward_hook(keep("H_v")),
             *(block.register_forward_pre_hook(keep(f"input of block {i}")) for i, block in blocks),
             model.llm.get_output_embeddings().register_forward_hook(keep("logits"))]
    model.projector.requires_grad_(True)
    losses = model(**batch)
    losses.mean().backward()
    for hook in hooks:
        hook.remove()
    names = {"weight": "W", "bias": "b"}
    parameters = [(names.get(name, name), p) for name, p in model.projector.named_parameters()]
    return losses.detach(), [*reversed(kept), *parameters]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1,
                        help="whose held-out records to take (default: 1)")
    parser.add_argument("--record", type=INT_FROM_0, default=0, metavar="N",
                        help="number of the held-out record (default: 0)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = choose_device(args.device)
    model, template, image_processor, saved = load_trained(args.run / "stage1", device, torch.float32)
    dataset = load_heldout_dataset(args.run / f"stage{args.stage}", template, image_processor)
    if args.record >= len(dataset):
        raise UserError(f"there is no held-out record {args.record}: they are numbered 0 to "
                        f"{len(dataset) - 1}")
    record, tokenizer, n = dataset.records[args.record], template.tokenizer, model.num_image_tokens

    show("support/records.py, Records.__getitem__: the record", json.dumps(record, indent=1))
    messages = template.to_messages(record)
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
    image_id, table_size = template.image_token_id, len(model.llm.get_input_embeddings().weight)
    reason = "has no logit" if image_id >= table_size else "has a logit that was never trained"
    show(f"data.py, ChatTemplate.encode: {len(ids)} tokens, of which {len(labeled)} are labeled",
         "\n".join(["    t      id   label  token", *rows, "",
                    explain(NO_LABEL, ignored=IGNORE_INDEX, id=image_id, reason=reason,
                            last=table_size - 1)]))

    batch = collate([sample], template.pad_token_id)
    del batch["skipped"]
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    input_ids, pixel_values = batch["input_ids"], batch["pixel_values"]
    if not len(pixel_values):
        raise UserError(f"held-out record {args.record} has no image: choose another one with --record")
    show("data.py, ChatDataset.load_pixel_values: resized, cropped, normalized",
         f"pixel_values {shape(pixel_values)}, from {pixel_values.min():.2f} to {pixel_values.max():.2f}")

    with torch.no_grad():
        z_v = model.vision_tower(pixel_values).last_hidden_state
        h_v = model.encode_images(pixel_values)
        inputs_embeds = model.embed(input_ids, pixel_values)
    show("model.py, Llava.encode_images: CLIP's patches, then the projector (after stage 1)",
         f"CLIP's output     {shape(z_v)}: class token and patches\n"
         f"Z_v               {shape(z_v[:, -n:])}: the patches alone\n"
         f"Z_v of patch 0    {numbers(z_v[0, -n])}\n"
         f"H_v = W · Z_v + b {shape(h_v)}\n"
         f"H_v of patch 0    {numbers(h_v[0, 0])}")
    first = ids.index(image_id)
    show("model.py, Llava.embed: one sequence of token embeddings and image features",
         f"inputs_embeds {shape(inputs_embeds)}; positions {first} to {first + n - 1} are H_v\n"
         f"position {first}    {numbers(inputs_embeds[0, first])}\n\n" +
         explain(READING_ORDER, n=n, first=first, last=first + n - 1, side=math.isqrt(n)))

    # Three models read the same record: with an untrained projector, after stage 1 and after stage 2.
    with torch.no_grad():
        losses = {"after stage 1": model(**batch)}
    forget_projector(model, saved["settings"]["seed"])
    untrained, gradients = backward(model, batch)
    losses = {"untrained projector": untrained, **losses}
    del model  # so that two large models need not fit into the memory
    if (args.run / "stage2" / "run.json").exists():
        model = load_trained(args.run / "stage2", device, torch.float32)[0]
        with torch.no_grad():
            losses["after stage 2"] = model(**batch)
    # abs(), because rounding can make the loss of a certain token -0.0 or slightly negative.
    columns = [[abs(loss) for loss in column.tolist()] for column in losses.values()]
    width = max(len(repr(tokens[t])) for t in labeled)
    rows = [f"{t - 1:>8}  {tokens[t]!r:<{width}}" +
            "".join(f"{loss:>13.3f}{math.exp(-loss):>8.3f}" for loss in row)
            for t, row in zip(labeled, zip(*columns))]
    logits = gradients[0][1].detach()  # (K, V)
    show("model.py, Llava.forward: logits at the position before each labeled token, and its -log p",
         f"logits {shape(logits)}\n\n{'position predicts':<{width + 10}}" +
         "".join(f"{name:>21}" for name in losses) + "\n" + " " * (width + 10) +
         len(losses) * f"{'-log p':>13}{'p':>8}" + "\n" + "\n".join(rows[:40] + ["…"] * (len(rows) > 40)) +
         "\n\n" + COMPARE)
    show("stage1_align.py, the loop: the loss is the mean over the labeled tokens, in nats",
         "\n".join(f"{name:<20} loss = {sum(column):.3f} / {len(labeled)} = {sum(column) / len(labeled):.3f}"
                   for name, column in zip(losses, columns)))

    targets = input_ids[0, labeled[:3]]
    ignored = targets.clone()
    ignored[-1] = IGNORE_INDEX
    show(f"What {IGNORE_INDEX} does: three positions of the untrained projector, and their cross-entropy",
         f"labels {targets.tolist()!s:<18} {F.cross_entropy(logits[:3], targets):.3f}\n"
         f"labels {ignored.tolist()!s:<18} {F.cross_entropy(logits[:3], ignored):.3f}\n"
         f"labels {targets[:-1].tolist()!s:<18} {F.cross_entropy(logits[:2], targets[:-1]):.3f}"
         "   no change, so the third position does not count")

    rows = [f"{name:<20}{shape(tensor):<18}{tensor.grad.norm():>12.2e}" +
            (f"{tensor.grad[0, first:first + n].norm():>22.2e}" if name.startswith("input of") else "")
            for name, tensor in gradients]
    show("stage1_align.py, backward(): the gradient of this loss before the first step, on its way back",
         f"{'gradient of':<20}{'shape':<18}{'norm':>12}{'at the patches alone':>22}\n" +
         "\n".join(rows) + "\n\n" + explain(FROZEN))


if __name__ == "__main__":
    run_script(main)
