"""The sanity check: does the trained model answer a question about an image, and does the image matter?

    python sanity_check.py --sample 0            first question of a held-out record, and the model's answer
    python sanity_check.py --image photo.jpg     a question about any image; --question "What is this?"
    python sanity_check.py --sample 0 --every-stage      the answer without the image, with an untrained
                                                         projector, and after each stage; also with --image
    python sanity_check.py --nearest-tokens 0    the vocabulary tokens that are nearest to the image patches

The script needs a finished stage. It loads stage 2 of the run if that is finished, else stage 1; with
--stage 1, it loads stage 1. For the toy, each command takes a few seconds.

--sample also prints the loss of the reference answers with the correct image, a different image and a blank
image. If the three are equal for many records, the model ignores the image. --sample uses held-out records,
because a good answer about a training image may be memorized.
"""

import argparse
import copy
import math
from contextlib import contextmanager

import torch
from torch import nn

from data import IMAGE_TOKEN, collate, count_labeled
from support.answers import AnswerPrinter, stream_answer
from support.errors import UserError, printable, run_script
from support.evaluation import nearest_tokens, record_losses, records_with_other_images, shorten_image
from support.pretrained import load_image
from support.records import image_name
from support.settings import INT_FROM_0, INT_FROM_1, add_run_flags
from support.trained import load_heldout_dataset, load_run

MAX_PATCHES = 24  # printed by --nearest-tokens


def print_generation(model, template, prompt, args):
    """Prints PROMPT, then GENERATED word by word."""
    text = printable(template.tokenizer.decode(prompt["input_ids"]), keep="\n")
    text = shorten_image(text, prompt["input_ids"].count(template.image_token_id))
    print(f"PROMPT\n{text.rstrip()}\nGENERATED")
    stream_answer(model, template, prompt, AnswerPrinter(template), args.max_new_tokens)


def print_every_stage(args):
    """Prints the answers to one question: without the image, with an untrained projector, after stage 1, and
    after stage 2, if that is finished."""
    last = 2 if (args.run / "stage2" / "run.json").exists() else 1
    for stage in range(1, last + 1):
        model, template, image_processor, _ = load_run(args, stage)
        if args.image is not None:
            question, pixel_values = args.question, load_image(args.image, image_processor)  # (3, S, S)
        else:
            dataset = load_heldout_dataset(args.run / f"stage{last}", template, image_processor)
            record = heldout_record(dataset, args.sample)
            question = template.to_messages(record)[0]["content"].removeprefix(IMAGE_TOKEN).strip()
            pixel_values = dataset.load_pixel_values(record)
        if pixel_values is None:
            raise UserError(f"held-out record {args.sample} has no image: choose another one")
        if stage == 1:
            print(printable(f"QUESTION\n{question}", keep="\n"))
            print_image_answer("WITHOUT AN IMAGE", model, template, question, None, args)
            with untrained_projector(model):
                print_image_answer("UNTRAINED PROJECTOR", model, template, question, pixel_values, args)
        print_image_answer(f"AFTER STAGE {stage}", model, template, question, pixel_values, args)
        del model  # so that two large models need not fit into the memory
    if last == 1:
        print("\nStage 2 is not finished.")


def print_image_answer(title, model, template, question, pixel_values, args):
    """Prints a title and the answer to a question about an image, (3, S, S), or about none."""
    print(f"\n{title}")
    prompt = make_image_prompt(template, question, pixel_values)
    stream_answer(model, template, prompt, AnswerPrinter(template), args.max_new_tokens)


def make_image_prompt(template, question, pixel_values):
    """Returns the prompt that asks about an image, (3, S, S), or without one if pixel_values is None."""
    message = template.make_question(question.replace(IMAGE_TOKEN, ""), pixel_values is not None)
    return {"input_ids": template.encode_prompt([message]), "pixel_values": pixel_values}


def heldout_record(dataset, i):
    """Returns held-out record i. Raises UserError if there is none."""
    if i >= len(dataset):
        raise UserError(f"there is no held-out record {i}: they are numbered 0 to {len(dataset) - 1}")
    return dataset.records[i]


@contextmanager
def untrained_projector(model):
    """Gives the model a projector with fresh random weights, until the context ends."""
    trained, model.projector = model.projector, copy.deepcopy(model.projector)
    torch.manual_seed(0)
    model.projector.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
    try:
        yield
    finally:
        model.projector = trained


def print_losses(model, heldout_dataset, i):
    """Prints the loss of record i with the correct image, a different image and a blank image."""
    batch = collate([heldout_dataset[i]], heldout_dataset.template.pad_token_id)
    correct = batch["pixel_values"]  # (1, 3, S, S)
    images = {"correct image": correct}
    [record] = records_with_other_images(heldout_dataset.records, i)
    images["different image"] = heldout_dataset.load_pixel_values(record)[None]
    images["blank image"] = torch.zeros_like(correct)
    tokens = count_labeled(batch).item()
    print(f"loss per token (nats) of this record's reference answers, which have {tokens} tokens:")
    losses = {name: record_losses(model, {**batch, "pixel_values": pixels}).item() / tokens
              for name, pixels in images.items()}
    for name, loss in losses.items():
        print(f"  {name:<18}{loss:.3f}")
    if max(abs(loss - losses["correct image"]) for loss in losses.values()) < 0.01:  # nats per token
        print("The image makes almost no difference for this record. Look at several records.")
    elif losses["correct image"] > min(losses.values()):
        print("Another or a blank image makes this record's reference answers more likely than the correct "
              "image does.")


def print_nearest_tokens(model, template, pixel_values, stage):
    """Prints the two nearest tokens of each patch, with an untrained projector and with the trained one. Of
    more than MAX_PATCHES, only those with the largest cosines are printed."""
    after = nearest_tokens(model, template, pixel_values, count=2)
    with untrained_projector(model):
        before = nearest_tokens(model, template, pixel_values, count=2)
    side, patches = math.isqrt(len(after)), list(range(len(after)))
    if len(patches) > MAX_PATCHES:
        patches = sorted(patches, key=lambda patch: -after[patch][0][1])[:MAX_PATCHES]
    print(f"{'patch':<16}{'untrained projector':<36}after stage {stage}")
    for patch in patches:
        place = f"row {patch // side + 1}, col {patch % side + 1}"
        cells = ("  ".join(f"{token:<10.10} {cosine:.2f}" for token, cosine in nearest[patch])
                 for nearest in (before, after))
        print(f"{place:<16}" + "    ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sample", type=INT_FROM_0, metavar="N", help="answer held-out record N (default: 0)")
    mode.add_argument("--image", metavar="FILE", help="answer a question about this image")
    mode.add_argument("--nearest-tokens", type=INT_FROM_0, metavar="N",
                      help="nearest tokens of the patches of record N")
    parser.add_argument("--question", help="question about --image; default: ask for a brief description")
    parser.add_argument("--every-stage", action="store_true", help="ask the question of --sample or --image "
                        "without the image, with an untrained projector, after stage 1 and after stage 2")
    parser.add_argument("--max-new-tokens", type=INT_FROM_1, default=128, help="longest answer in tokens")
    args = parser.parse_args()
    if args.image is None and args.question is not None:
        raise UserError("--question needs --image, because a held-out record has its own question")
    if args.every_stage and (args.stage or args.nearest_tokens is not None):
        raise UserError("--every-stage needs --sample or --image, and no --stage, because it shows both")
    args.question = args.question or "Provide a brief description of the given image."
    args.sample = args.sample or 0
    if args.every_stage:
        print_every_stage(args)
        return

    model, template, image_processor, saved = load_run(args)
    if args.image is not None:
        pixel_values = load_image(args.image, image_processor)  # (3, S, S)
        prompt = make_image_prompt(template, args.question, pixel_values)
        print_generation(model, template, prompt, args)
        return

    heldout_dataset = load_heldout_dataset(args.run / f"stage{saved['stage']}", template, image_processor)
    i = args.sample if args.nearest_tokens is None else args.nearest_tokens
    record = heldout_record(heldout_dataset, i)
    print(printable(f"held-out record {i} of {len(heldout_dataset)}: id {record.get('id')}, "
                    f"image {image_name(record)}"))
    prompt, reference = heldout_dataset.make_prompt(i)
    if args.nearest_tokens is not None:
        if prompt["pixel_values"] is None:
            raise UserError(f"held-out record {i} has no image: choose another one")
        print(printable(f"reference answer: {reference}\n", keep="\n"))
        print_nearest_tokens(model, template, prompt["pixel_values"], saved["stage"])
        return
    print_generation(model, template, prompt, args)
    print(printable(f"REFERENCE\n{reference}\n", keep="\n"))
    if prompt["pixel_values"] is not None:
        print_losses(model, heldout_dataset, i)


if __name__ == "__main__":
    run_script(main)
