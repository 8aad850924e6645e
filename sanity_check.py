"""The sanity check: load projector and adapter, show an image, read the answer. A relevant one means that it
works.

    python sanity_check.py --sample 0      a held-out record: PROMPT, GENERATED, the true answer
    python sanity_check.py --image photo.jpg --question "What object is shown?"
    python sanity_check.py --show-mask 0   a record as the model reads it, and what it is trained to say
    python sanity_check.py --eval          every held-out record: a table, eval.json, sheet.png, curves.png
    python sanity_check.py --sheet out.png        some held-out pictures, questions, answers and truths
    python sanity_check.py --attention out.png    where in the image each word of an answer looks
    python sanity_check.py --chat --image photo.jpg          a conversation; see chat.py

Takes stage 2 of the run where there is one, else stage 1 (--stage 1 asks for it). Samples come from the
held-out records: the model has seen every training record, and a memorised caption looks just like sight.
--hf FOLDER asks a model that export_hf.py (or anybody else) has saved as transformers' Llava instead.
"""

import argparse
from pathlib import Path

import torch
from transformers import TextStreamer

import plumbing
from data import IGNORE_INDEX, IMAGE_TOKEN, collate
from evaluate import answer_all, f1, grounding, held_out_batches, questions, record_losses
from loading import keep_usable, open_datasets
from pictures import (attention_sheet, attention_to_image, contact_sheet, draw_curves, read_picture,
                      shown_image, spread)
from plumbing import UserError
from toy_world import objects_in
from weights import load

EVAL_BATCH = 64


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("toy", "tinyllama"), default="toy", help="whose")
    parser.add_argument("--run", help="folder of the run; default: runs/<preset>")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: 2 where there is one, else 1")
    parser.add_argument("--hf", metavar="FOLDER", help="a model of transformers' Llava, instead of the run's")
    parser.add_argument("--sample", type=int, metavar="N", help="answer this held-out record (default: 0)")
    parser.add_argument("--image", help="a picture of your own")
    parser.add_argument("--question", help="default: ask for a short description")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show-mask", type=int, metavar="N", help="show this held-out record, and no more")
    what.add_argument("--eval", action="store_true", help="measure on all held-out records")
    what.add_argument("--sheet", metavar="PNG", help="draw a sheet of held-out records and answers")
    what.add_argument("--attention", metavar="PNG", help="draw where each word of the answer looks")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="records on the sheet")
    parser.add_argument("--layer", type=int, metavar="L", help="whose attention, the LLM's first being 1; "
                        "default: the one that differs most from word to word")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="cuts an answer that does not end")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    of_records = args.show_mask is not None or args.eval or args.sheet or args.sample is not None
    if args.image and of_records:
        raise UserError("--image is a picture of your own, with --question, --attention or --chat; the other "
                        "flags are about held-out records")
    if args.hf and not args.run and (of_records or not (args.image or args.chat)):
        raise UserError("--hf is a model without held-out records: ask it with --image or --chat, or name a "
                        "--run whose records it should be shown")
    for path in filter(None, (args.sheet, args.attention)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise UserError(f"cannot write a picture to {path}: name a file, in a folder that exists")
    if args.run or not args.hf:
        args.run = Path(args.run or f"runs/{args.preset}")
    return args


def main():
    args = parse_arguments()
    device = plumbing.pick_device(args.device)
    dtype, _ = plumbing.pick_precision(args.precision, device)
    if args.run:
        stage = args.stage or (2 if (args.run / "stage2" / "run.json").exists() else 1)
        folder = args.run / f"stage{stage}"
        run = plumbing.read_run(folder, ("stage1_align.py", "stage2_instruct.py")[stage - 1], args)
    if args.hf:
        from export_hf import from_hf  # only here: training and asking need nothing of it

        model, template, image_processor = from_hf(args.hf, device, dtype)
        print(f"{args.hf}: transformers' Llava")
    else:
        model, template, image_processor = load(folder, run, device, dtype)
        print(f"{folder}: {run['steps']:,} steps, {run['projector']} projector"
              + (", LoRA adapter" if stage == 2 else ", no adapter"))

    if args.chat:
        from chat import converse

        converse(model, template, image_processor, device, args.image, args.max_new_tokens)
        return
    if args.image:
        ask(args, model, template, image_processor, device)
        return
    _, held_out = open_datasets(argparse.Namespace(**run["settings"]), template, image_processor,
                                model.num_image_tokens)
    keep_usable(held_out, run["settings"]["allow_bad"])
    if args.eval:
        evaluate_run(args, stage, held_out, model, template, image_processor, device)
        return
    if args.sheet:
        draw_sheet(args, held_out, model, template, device)
        return
    number = (args.sample or 0) if args.show_mask is None else args.show_mask
    if not 0 <= number < len(held_out):
        raise UserError(f"there is no held-out record {number}: they are numbered 0 to {len(held_out) - 1}")
    if args.show_mask is not None:
        plumbing.print_sample(held_out[number], template)
    else:
        show_sample(args, number, held_out, model, template, image_processor, device)


# -- one answer --------------------------------------------------------------------------------------------


def stream(args, model, template, prompt, device):
    """Prints PROMPT, and GENERATED word by word as it comes. Returns the new ids."""
    text = template.tokenizer.decode(prompt["input_ids"])
    image, count = IMAGE_TOKEN, prompt["input_ids"].count(template.image_token_id)
    if count:
        text = text.replace(image * count, f"{image}×{count}")
    print(f"PROMPT\n{text.rstrip()}\nGENERATED")
    batch = collate([prompt], template.tokenizer.pad_token_id, padding_side="left")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    ids = model.generate(**batch, end_token_ids=[template.end_token_id], max_new_tokens=args.max_new_tokens,
                         streamer=TextStreamer(template.tokenizer, skip_special_tokens=True))
    return ids[0].tolist()


def ask(args, model, template, image_processor, device):
    """A picture and a question of one's own."""
    image = read_picture(args.image)
    question = args.question or "Provide a brief description of the given image."
    messages = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{template.plain(question)}"}]
    prompt = {"input_ids": template.encode_prompt(messages, model.num_image_tokens),
              "pixel_values": image_processor(image)}
    said = stream(args, model, template, prompt, device)
    if args.attention:
        draw_attention(args, model, template, image_processor, prompt, question, said)


def draw_attention(args, model, template, image_processor, prompt, question, said):
    if prompt["pixel_values"] is None:
        raise UserError("--attention: this record has no image to look at; choose another --sample")
    words, maps, layer = attention_to_image(model, template, prompt, said, args.layer)
    image = shown_image(prompt["pixel_values"], image_processor)
    attention_sheet(args.attention, question, image, words, maps, layer,
                    model.llm.config.get_text_config().num_hidden_layers)
    print(f"written: {args.attention}, the attention of layer {layer}")


def show_sample(args, number, held_out, model, template, image_processor, device):
    """A held-out record's first question, the answer, and whether the image had anything to do with it."""
    record = held_out.record(number)
    print(f"held-out record {number} of {len(held_out)}: id {record.get('id')}, "
          f"image {held_out.images.name_for(record)}")
    prompt, truth = held_out.question(number)
    said = stream(args, model, template, prompt, device)
    print(f"TRUE\n{truth}\n")
    if args.attention:
        question = held_out.messages(record)[0]["content"]
        return draw_attention(args, model, template, image_processor, prompt, question, said)
    if prompt["pixel_values"] is None:
        return
    batch = collate([held_out[number]], template.tokenizer.pad_token_id)
    tokens = (batch["labels"] != IGNORE_INDEX).sum().item()
    own = prompt["pixel_values"]
    images = {"its own image": own, "a blank one": torch.zeros_like(own)}  # 0 is CLIP's mean colour
    for i in range(len(held_out)):
        if i != number and (pixel_values := held_out.pixel_values(held_out.record(i))) is not None:
            images["another record's"] = pixel_values
            break
    print(f"loss of the record's true answers ({tokens} tokens), nats per token, given")
    losses = {}
    for name, pixel_values in images.items():
        shown = {**batch, "pixel_values": pixel_values[None]}  # (1, 3, H, W)
        losses[name] = record_losses(model, shown, device).item() / tokens
        print(f"  {name:<18}{losses[name]:.3f}")
    if max(losses.values()) - losses["its own image"] < 0.01:
        print("The image makes no difference: the model does not look at it.")


# -- all of them -------------------------------------------------------------------------------------------


def evaluate_run(args, stage, held_out, model, template, image_processor, device):
    """Measures on every held-out record, prints a table, and writes <run>/eval.json and <run>/sheet.png (into
    the folder of --hf, if that is what is measured)."""
    sets = {"captions" if stage == 1 else "answers": held_out}
    if stage == 2 and (args.run / "stage1" / "run.json").exists():  # it should not have forgotten to caption
        settings = plumbing.read_run(args.run / "stage1", "stage1_align.py", args)["settings"]
        _, sets["captions"] = open_datasets(argparse.Namespace(**settings), template, image_processor,
                                            model.num_image_tokens)
        keep_usable(sets["captions"], settings["allow_bad"])
    result, matches = {"stage": stage, "counts": {}}, []

    # What needs no known truth, on any data: is the right image of any use?
    for name, dataset in sets.items():
        batches = held_out_batches(dataset, template.tokenizer.pad_token_id, EVAL_BATCH)
        measured = grounding(model, batches, device, blank=True)
        result.update({f"{name}_{key}": value for key, value in measured.items()})
        matches += [measured["image_match"]] * len(dataset)
    result["image_match"] = mean(matches)

    # Where the truth is known, as in the toy world, answers can be right or wrong.
    shown = []  # [(Question, what the model said)]
    for name, dataset in sets.items():
        asked = questions(dataset)
        known = all(map(has_one_answer, asked))
        if not known:  # a few, to be looked at
            asked = spread(asked, args.count)
        said = answer_all(model, template, asked, device, EVAL_BATCH, args.max_new_tokens)
        shown += zip(asked, said)
        result["counts"][name] = len(asked)
        if known and name == "captions":
            score_captions(result, [question.truth for question in asked], said)
        elif known:
            with_other = answer_all(model, template, asked, device, EVAL_BATCH, args.max_new_tokens,
                                    others_image=True)
            score_answers(result, asked, said, with_other)

    print_table(result)
    if "objects_f1" in result or "qa_exact" in result:
        mistakes = [(question, text) for question, text in shown if text != question.truth]
        print(f"\n{len(mistakes)} of {len(shown)} differ from the truth; the first of them:")
        for question, text in mistakes[:5]:
            print(f"  {question.text}\n    says:  {text}\n    truth: {question.truth}")
    folder = Path(args.hf or args.run)
    plumbing.write_json(folder / "eval.json", result)
    picked = spread([(question, text) for question, text in shown if has_image(question)], args.count)
    write_sheet(folder / "sheet.png", picked)
    print(f"\nwritten: {folder / 'eval.json'}, and {folder / 'sheet.png'} with {len(picked)} of them")
    print(draw_curves(args.run))


def draw_sheet(args, held_out, model, template, device):
    """Answers --count of the held-out questions, and draws them."""
    asked = spread([question for question in questions(held_out) if has_image(question)], args.count)
    if not asked:
        raise UserError("--sheet: there is no held-out record with an image, or --count is less than 1")
    said = answer_all(model, template, asked, device, EVAL_BATCH, args.max_new_tokens)
    write_sheet(args.sheet, list(zip(asked, said)))
    print(f"written: {args.sheet}, with {len(asked)} held-out samples")


def write_sheet(path, answered):
    """A contact sheet of [(Question, what the model said)]."""
    samples = []
    for question, text in answered:
        right = text == question.truth if has_one_answer(question) else None
        image = question.dataset.image(question.dataset.record(question.record))
        samples.append((image, question.text, text, question.truth, right))
    marks = [right for *_, right in samples if right is not None]
    title = f"{len(samples)} held-out samples"
    title += f"; {sum(marks)} of {len(marks)} answers are the truth, word for word" if marks else ""
    contact_sheet(path, title, samples)


def has_one_answer(question):
    """Whether another answer than the truth is wrong: so in the toy world, but not for a photo's caption."""
    return bool(question.kind or objects_in(question.truth))


def has_image(question):
    return question.dataset.images.name_for(question.dataset.record(question.record)) is not None


def score_captions(result, truths, captions):
    """F1 of the objects (colour, shape) and of the whole phrases (colour, shape, place) in captions; and of
    the same captions against the next picture's truth, which is what fluent guessing would get."""
    said, true = [objects_in(caption) for caption in captions], [objects_in(truth) for truth in truths]
    others = true[1:] + true[:1]
    result["caption_f1"], result["caption_f1_shuffled"] = f1(said, true), f1(said, others)
    said, true, others = ([{phrase[:2] for phrase in phrases} for phrases in part]
                          for part in (said, true, others))
    result["objects_f1"], result["objects_f1_shuffled"] = f1(said, true), f1(said, others)


def score_answers(result, asked, said, with_other):
    """Answers exactly right, in all and by kind of question, with the right image and with the next one."""
    kinds = sorted({question.kind for question in asked})
    result["counts"]["answers_by_kind"] = {}
    for suffix, texts in (("", said), ("_shuffled", with_other)):
        right = [(question.kind, text == question.truth) for question, text in zip(asked, texts)]
        result[f"qa_exact{suffix}"] = mean([mark for _, mark in right])
        by_kind = {kind: [mark for k, mark in right if k == kind] for kind in kinds}
        result[f"qa_exact{suffix}_by_kind"] = {kind: mean(marks) for kind, marks in by_kind.items()}
        result["counts"]["answers_by_kind"] = {kind: len(marks) for kind, marks in by_kind.items()}


def mean(values):
    return sum(values) / len(values)


def print_table(result):
    def row(name, *values):
        print(f"{name:<38}" + "".join(f"{value:>16}" for value in values))

    row("\nheld-out records, with", "their image", "another's", "a blank one")
    for name in ("captions", "answers"):
        if f"{name}_loss" in result:
            row(f"loss of the {name}, nats per token",
                *(f"{result[f'{name}_loss{which}']:.3f}" for which in ("", "_shuffled", "_blank")))
    for name, label in (("objects_f1", "objects named in captions, F1"), ("caption_f1", "whole captions, F1"),
                        ("qa_exact", "answers exactly right")):
        if name in result:
            row(label, f"{result[name]:.3f}", f"{result[name + '_shuffled']:.3f}")
    for kind, value in result.get("qa_exact_by_kind", {}).items():
        row(f"  {kind} ({result['counts']['answers_by_kind'][kind]})", f"{value:.3f}",
            f"{result['qa_exact_shuffled_by_kind'][kind]:.3f}")
    row("own image preferred to another's", f"{result['image_match']:.1%}")


if __name__ == "__main__":
    plumbing.launch(main)
