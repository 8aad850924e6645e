"""Draws pictures of a run: held-out examples, attention to the image, and the curves of the training.

    python -m tools.pictures --run runs/toy --sheet sheet.png         held-out images with answers
    python -m tools.pictures --run runs/toy --attention attention.png --sample 58
    python -m tools.pictures --run runs/toy --curves curves.png       both stages; needs matplotlib

--sheet and --attention load stage 2 of the run if it is finished, else stage 1, and take about 10 seconds for
the toy on 2 CPU cores. --curves reads metrics.jsonl, also while a stage is running.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_TOKEN, collate
from sanity_check import generate_answers, load_heldout_dataset
from support.devices import DTYPES, choose_device, choose_dtype
from support.errors import UserError, run_script
from support.files import atomic_write
from support.settings import COUNT, POSITIVE
from support.weights import load_trained
from toy.world import objects_in

WIDTH, GAP = 1080, 24  # pixels: the width of a picture and the space between its cells
FONT_SIZE, LINE = 28, 36  # pixels: large enough for a phone
BLACK, GRAY, GREEN, RED = (30, 30, 30), (105, 105, 105), (20, 110, 50), (180, 30, 30)
BRIGHT = 0.3  # fraction of the attention from which a panel gets its full brightness

# -- cells: an image with lines of text below --------------------------------------------------------------


def draw_cells(path, title, cells, columns):
    """Writes a PNG.

    Args:
        title: list of paragraphs. cells: list of (PIL image, [(mark, text, color), …]). The mark before a
            text is "tick", "cross" or None. Color alone would not be enough for color-blind readers.
    """
    font = ImageFont.load_default(FONT_SIZE)
    side = (WIDTH - GAP) // columns - GAP  # of an image
    title = [line for text in title for line in wrap(text, font, WIDTH - 2 * GAP)]
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    text_lines = [[[(mark if i == 0 else None, LINE if mark else 0, line, color)
                    for mark, text, color in texts
                    for i, line in enumerate(wrap(text, font, side - (LINE if mark else 0)))]
                   for _, texts in row] for row in rows]
    heights = [side + LINE * max(map(len, lines)) + 2 * GAP for lines in text_lines]
    sheet = Image.new("RGB", (WIDTH, 2 * GAP + LINE * len(title) + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title):
        draw.text((GAP, GAP + i * LINE), line, fill=BLACK, font=font)
    top = 2 * GAP + LINE * len(title)
    for row, lines_of_row, height in zip(rows, text_lines, heights):
        for column, ((image, _), lines) in enumerate(zip(row, lines_of_row)):
            left = GAP + column * (side + GAP)
            width, height_ = (max(1, round(length * side / max(image.size))) for length in image.size)
            x, y = left + (side - width) // 2, top + side - height_
            sheet.paste(image.resize((width, height_), Image.Resampling.BICUBIC), (x, y))
            draw.rectangle((x, y, x + width - 1, y + height_ - 1), outline=(200, 200, 200))
            for i, (mark, indent, line, color) in enumerate(lines):
                y = top + side + GAP // 2 + i * LINE
                draw_mark(draw, mark, left, y + 4, color)
                draw.text((left + indent, y), line, fill=color, font=font)
        top += height
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def draw_mark(draw, mark, x, y, color):
    """Draws a tick or a cross as high as a letter, because the font has none."""
    lines = {"tick": [[(1, 13), (8, 21), (23, 2)]], "cross": [[(2, 2), (21, 21)], [(2, 21), (21, 2)]],
             None: []}
    for line in lines[mark]:
        draw.line([(x + dx, y + dy) for dx, dy in line], fill=color, width=5, joint="curve")


def wrap(text, font, width, max_lines=8):
    """Returns the text as lines that are at most `width` pixels wide. The text is cut after `max_lines`."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for letter in word:  # one by one, because a word can be wider than a line
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(f"{lines[-1]} …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " …"
    return lines


# -- held-out examples -------------------------------------------------------------------------------------


def draw_examples(path, model, template, dataset, device, count, max_new_tokens):
    """Writes a PNG with `count` held-out images, each with its question, answer and reference answer.

    A tick or cross says whether the answer equals the reference answer. It is drawn only for the toy's
    records, because a photo has more than one correct description.
    """
    records = [i for i in range(len(dataset)) if dataset.records.image_name(dataset.records[i]) is not None]
    count = min(count, len(records))
    cells = []
    for i in [records[k * len(records) // count] for k in range(count)]:
        record = dataset.records[i]
        prompt, reference = dataset.make_prompt(i)
        answer = generate_answers(model, template, [prompt], device, max_new_tokens)[0]
        question = dataset.to_messages(record)[0]["content"].replace(IMAGE_TOKEN, "")
        mark, color = ("tick", GREEN) if answer == reference else ("cross", RED)
        if not (record.get("kinds") or objects_in(reference)):
            mark, color = None, BLACK
        cells.append((dataset.records.open_image(record),
                      [(None, question, GRAY), (mark, answer or "(empty)", color),
                       (None, f"reference: {reference}", GRAY)]))
    draw_cells(path, [f"{count} held-out records, at equal distances"], cells, columns=3)


# -- attention ---------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_to_image(model, template, prompt, answer, layer=None):
    """Returns how strongly each word of an answer attends to each image patch: (words, maps, layer).

    In every layer and head, position i attends to the positions j <= i with weights a_ij, which sum to 1:

        a_i = softmax(q_i · K^T / sqrt(d))            (T,)

    N of the positions j are image patches, so row i at these columns is a small map of the image.

    Args:
        prompt: {"input_ids", "pixel_values"}. answer: list of the generated ids.
        layer: 1 is the LLM's first. None takes the layer in which the maps differ most from word to word.
    Returns:
        words: W texts. maps: (W, side, side), with side² = N, the mean over the heads of the layer and the
        tokens of the word. The sum of a map is the fraction of its attention that the word pays to the image.
    """
    answer = answer[:answer.index(template.end_token_id)] if template.end_token_id in answer else answer
    input_ids = torch.tensor([prompt["input_ids"] + answer], device=model.llm.device)  # (1, T)
    inputs_embeds = model.embed(input_ids, prompt["pixel_values"][None].to(input_ids.device))
    # The usual implementation, "sdpa", never stores the attention weights. "eager" does.
    usual = model.llm.config._attn_implementation
    model.llm.set_attn_implementation("eager")
    try:
        weights = model.llm.get_decoder()(inputs_embeds=inputs_embeds, output_attentions=True,
                                          use_cache=False).attentions  # L × (1, heads, T, T)
    finally:
        model.llm.set_attn_implementation(usual)
    if layer is not None and not 1 <= layer <= len(weights):
        raise UserError(f"--layer {layer} does not exist: this LLM has the layers 1 to {len(weights)}")

    is_image = input_ids[0] == model.image_token_id  # (T,)
    rows = torch.stack([w[0].float().mean(dim=0)[:, is_image] for w in weights])  # (L, T, N)
    if layer is None:
        after = rows[:, is_image.nonzero().max() + 1:]  # (L, T', N), the positions after the image
        spread = (after - after.mean(dim=1, keepdim=True)).abs().sum(dim=2).mean(dim=1)  # (L,)
        layer = 1 + spread.argmax().item()
    words, tokens_of_words = split_into_words(template, answer)
    if not words:
        raise UserError("the answer has no words, so there is no attention to draw")
    # The position *before* a token predicts it, so its attention is the one that matters for this token.
    before = len(prompt["input_ids"]) - 1
    maps = torch.stack([rows[layer - 1, [before + t for t in tokens]].mean(dim=0)
                        for tokens in tokens_of_words])  # (W, N)
    side = math.isqrt(maps.shape[1])
    return words, maps.view(-1, side, side).cpu(), layer


def split_into_words(template, answer):
    """Returns (words, tokens): the words of an answer, and for each the numbers of its tokens. A word begins
    where the decoded text grows by a space. Punctuation has no tokens."""
    words, tokens, text = [], [], ""
    for t in range(len(answer)):
        longer = template.tokenizer.decode(answer[:t + 1], skip_special_tokens=True)
        piece, text = longer[len(text):], longer
        if not words or piece[:1].isspace():
            words.append("")
            tokens.append([])
        words[-1] += piece.strip()
        if any(letter.isalnum() for letter in piece):
            tokens[-1].append(t)
    return [word for word, t in zip(words, tokens) if t], [t for t in tokens if t]


def draw_attention(path, question, image, words, maps, layer, num_layers):
    """Writes a PNG: the image as the model sees it, then one panel for each word of the answer.

    The patch with the most attention is the brightest of its panel. The whole panel is dark if the word pays
    little attention to the image. Models attend to some positions without using them ("attention sinks",
    arXiv:2309.17453), and attention is not an explanation (arXiv:1902.10186). To find out whether the image
    matters, change the image, as sanity_check.py does.
    """
    cells = [(image, [(None, "the image", GRAY)])]
    for word, weights in list(zip(words, maps))[:47]:
        share = f"to image: {weights.sum():.0%}"
        cells.append((brighten(image, weights), [(None, word, BLACK), (None, share, GRAY)]))
    title = [question.replace(IMAGE_TOKEN, ""), " ".join(words),
             f"Attention from each word to the patches; layer {layer} of {num_layers}, mean over its heads."]
    draw_cells(path, title, cells, columns=4)


def brighten(image, weights):
    """Returns the image with each patch as bright as its attention, (side, side).

    If the image gets less than BRIGHT of the attention, it is dimmed as a whole.
    """
    weights = weights / weights.max().clamp(min=1e-9) * (weights.sum() / BRIGHT).clamp(max=1)  # 0 … 1
    mask = Image.fromarray((weights * 255).round().to(torch.uint8).numpy()).resize(image.size, Image.NEAREST)
    dark = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, (25, 20, 70)), 0.75)
    return Image.composite(image, dark, mask)


def visible_image(pixel_values, image_processor):
    """Returns what the model sees as a PIL image: pixel_values (3, S, S), with the normalization undone."""
    pixels = pixel_values.float().cpu().numpy().transpose(1, 2, 0)  # (S, S, 3)
    pixels = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    image = Image.fromarray((pixels * 255).round().clip(0, 255).astype("uint8"))
    return image.resize((480, 480), Image.BICUBIC)


# -- curves ------------------------------------------------------------------------------------------------


def draw_curves(path, run):
    """Writes a PNG with the losses of both stages and "correct image more likely", from metrics.jsonl."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--curves needs matplotlib: pip install matplotlib") from error
    stages = {}
    for stage in ("stage1", "stage2"):
        metrics = run / stage / "metrics.jsonl"
        if metrics.exists():
            try:
                lines = metrics.read_text(encoding="utf-8").splitlines()
                stages[stage] = [json.loads(line) for line in lines]
            except ValueError as error:
                raise UserError(f"cannot read {metrics}: {error}") from error
    if not stages:
        raise UserError(f"{run} has no metrics.jsonl: train a stage first")
    figure = Figure(figsize=(5.4 * len(stages), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(stages), sharex="col", sharey="row", squeeze=False)
    for (loss_axis, match_axis), (stage, lines) in zip(axes.T, stages.items()):
        for axis, key, label, style in (
                (loss_axis, "loss", "training", "0.7"),
                (loss_axis, "heldout_loss", "held-out, correct image", "o-g"),
                (loss_axis, "heldout_loss_shuffled", "held-out, different image", "s--r"),
                (match_axis, "heldout_image_match", "correct image more likely", "o-b")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            format_ = {"color": style} if style[0].isdigit() else {}
            axis.plot(*zip(*points), *([] if format_ else [style]), label=label, markersize=4, **format_)
        match_axis.axhline(0.5, color="0.5", linestyle=":", label="chance")
        loss_axis.set_title(stage)
        loss_axis.set_ylim(bottom=0)
        match_axis.set_ylim(0, 1.05)
        match_axis.set_xlabel("optimizer step")
        for axis in (loss_axis, match_axis):
            axis.grid(alpha=0.3)
            axis.legend()
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[1, 0].set_ylabel("fraction of held-out records")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: 2 if it is finished, else 1")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sheet", type=Path, metavar="PNG", help="draw held-out examples")
    what.add_argument("--attention", type=Path, metavar="PNG", help="draw the attention of one answer")
    what.add_argument("--curves", type=Path, metavar="PNG", help="draw the losses of both stages")
    parser.add_argument("--count", type=POSITIVE, default=9, help="examples on the sheet (default: 9)")
    parser.add_argument("--sample", type=COUNT, default=0, metavar="N", help="record for --attention")
    parser.add_argument("--layer", type=POSITIVE, help="layer for --attention; default: the most varied one")
    parser.add_argument("--max-new-tokens", type=POSITIVE, default=128, help="longest answer in tokens")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    path = args.sheet or args.attention or args.curves
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"cannot write a picture to {path}: name a file in a writable folder")
    if args.curves:
        draw_curves(path, args.run)
        print(f"wrote {path}")
        return

    device = choose_device(args.device)
    stage = args.stage or (2 if (args.run / "stage2" / "run.json").exists() else 1)
    model, template, image_processor, run_json = load_trained(args.run / f"stage{stage}", device,
                                                              choose_dtype(args.precision, device))
    dataset = load_heldout_dataset(run_json, template, image_processor, model.num_image_tokens)
    if args.sheet:
        draw_examples(path, model, template, dataset, device, args.count, args.max_new_tokens)
    else:
        if args.sample >= len(dataset):
            raise UserError(f"there is no held-out record {args.sample}: they are numbered 0 to "
                            f"{len(dataset) - 1}")
        prompt, _ = dataset.make_prompt(args.sample)
        if prompt["pixel_values"] is None:
            raise UserError(f"held-out record {args.sample} has no image; choose another --sample")
        batch = collate([prompt], template.tokenizer.pad_token_id, padding_side="left")
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        answer = model.generate(**batch, end_token_ids=[template.end_token_id],
                                max_new_tokens=args.max_new_tokens)[0].tolist()
        words, maps, layer = attention_to_image(model, template, prompt, answer, args.layer)
        question = dataset.to_messages(dataset.records[args.sample])[0]["content"]
        image = visible_image(prompt["pixel_values"], image_processor)
        draw_attention(path, question, image, words, maps, layer,
                       model.llm.config.get_text_config().num_hidden_layers)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
