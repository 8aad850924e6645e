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
import textwrap
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

WIDTH, GAP = 1080, 24  # pixels: the width of a picture and the space between its cells
FONT_SIZE, LINE = 28, 36  # pixels: large enough for a phone
BLACK, GRAY, GREEN, RED = (30, 30, 30), (105, 105, 105), (20, 110, 50), (180, 30, 30)
MARKS = {"tick": [[(1, 17), (8, 25), (23, 6)]], "cross": [[(2, 6), (21, 25)], [(2, 25), (21, 6)]]}  # pixels
BRIGHT = 0.3  # a word that pays at least this fraction of its attention to the image gets a bright panel


def draw_cells(path, title, cells, columns):
    """Writes a PNG with a title and, in `columns` columns, images with text below.

    Args:
        title: list of paragraphs. cells: list of (PIL image, [(mark, text, color), …]). A mark is "tick",
            "cross" or None, because color alone would not be enough for color-blind readers.
    """
    font = ImageFont.load_default(FONT_SIZE)
    side = (WIDTH - GAP) // columns - GAP  # pixels: of an image, and the width of the text below it
    title = [line for paragraph in title for line in wrap(paragraph, font, WIDTH - 2 * GAP)]
    texts = [[(mark, wrap(text, font, side - (LINE if mark else 0)), color) for mark, text, color in cell]
             for _, cell in cells]
    heights = [side + 2 * GAP + LINE * max(sum(len(lines) for _, lines, _ in text)
                                           for text in texts[i:i + columns])
               for i in range(0, len(cells), columns)]  # of the rows
    tops = np.cumsum([2 * GAP + LINE * len(title), *heights]).tolist()
    sheet = Image.new("RGB", (WIDTH, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title):
        draw.text((GAP, GAP + i * LINE), line, fill=BLACK, font=font)
    for i, (image, _) in enumerate(cells):
        left, bottom = GAP + i % columns * (side + GAP), tops[i // columns] + side
        image = image.resize([max(1, round(length * side / max(image.size))) for length in image.size])
        x, y = left + (side - image.width) // 2, bottom - image.height
        sheet.paste(image, (x, y))
        draw.rectangle((x, y, x + image.width - 1, y + image.height - 1), outline=(200, 200, 200))
        y = bottom + GAP // 2
        for mark, lines, color in texts[i]:
            for line in MARKS.get(mark, []):
                draw.line([(left + dx, y + dy) for dx, dy in line], fill=color, width=5, joint="curve")
            for line in lines:
                draw.text((left + (LINE if mark else 0), y), line, fill=color, font=font)
                y += LINE
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def wrap(text, font, width):
    """Returns the text as at most eight lines that are at most `width` pixels wide."""
    for letters in range(width // 4, 2, -1):
        lines = textwrap.wrap(text.strip(), letters, max_lines=8, placeholder=" …")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


def draw_examples(path, model, template, dataset, device, count, max_new_tokens):
    """Writes a PNG with `count` held-out images, each with its first question, the generated answer and the
    reference answer.

    A tick or a cross says whether the two answers are equal. It is drawn only if the record names the kinds
    of its questions, because other questions can have several correct answers.
    """
    numbers = [i for i in range(len(dataset)) if dataset.records.image_name(dataset.records[i]) is not None]
    if not numbers:
        raise UserError("no usable held-out record has an image, so there is nothing to draw")
    count, cells = min(count, len(numbers)), []
    for i in [numbers[k * len(numbers) // count] for k in range(count)]:
        record = dataset.records[i]
        prompt, reference = dataset.make_prompt(i)
        answer = generate_answers(model, template, [prompt], device, max_new_tokens)[0]
        mark, color = ("tick", GREEN) if answer == reference else ("cross", RED)
        if not record.get("kinds"):
            mark, color = None, BLACK
        question = dataset.to_messages(record)[0]["content"].replace(IMAGE_TOKEN, "")
        texts = [(None, question, GRAY), (mark, answer or "(empty)", color),
                 (None, f"reference: {reference}", GRAY)]
        cells.append((dataset.records.open_image(record), texts))
    draw_cells(path, [f"{count} of {len(numbers)} held-out records, at equal distances"], cells, columns=3)


@torch.no_grad()
def attention_to_image(model, template, prompt, answer, layer=None):
    """Returns how strongly each word of an answer attends to each image patch: (words, maps, layer).

    In every layer and head, position i attends to the positions j <= i with weights that sum to 1:
    a_i = softmax(q_i · K^T / sqrt(d)). N of the positions j are image patches, so row i at these columns is a
    small map of the image. `maps` is (W, side, side), where side² = N: for each of the W words, the mean over
    the heads of the layer and the tokens of the word. A map sums to the fraction of its attention that the
    word pays to the image.

    Args:
        prompt: {"input_ids", "pixel_values"}. answer: list of the generated ids. layer: 1 is the LLM's first;
            None takes the layer in which the maps differ most from word to word.
    """
    answer = answer[:answer.index(template.end_token_id)] if template.end_token_id in answer else answer
    input_ids = torch.tensor([prompt["input_ids"] + answer], device=model.llm.device)  # (1, T)
    inputs_embeds = model.embed(input_ids, prompt["pixel_values"][None].to(input_ids.device))  # (1, T, D)
    usual = model.llm.config._attn_implementation  # "sdpa", which never stores the attention weights
    model.llm.set_attn_implementation("eager")
    weights = model.llm.get_decoder()(inputs_embeds=inputs_embeds, output_attentions=True,
                                      use_cache=False).attentions  # L × (1, heads, T, T)
    model.llm.set_attn_implementation(usual)
    if layer is not None and not 1 <= layer <= len(weights):
        raise UserError(f"--layer {layer} does not exist: this LLM has the layers 1 to {len(weights)}")

    is_image = input_ids[0] == model.image_token_id  # (T,)
    rows = torch.stack([w[0].float().mean(dim=0)[:, is_image] for w in weights])  # (L, T, N)
    if layer is None:
        after = rows[:, is_image.nonzero().max() + 1:]  # (L, T', N), the positions after the image
        spread = (after - after.mean(dim=1, keepdim=True)).abs().sum(dim=2).mean(dim=1)  # (L,)
        layer = 1 + spread.argmax().item()
    words = split_into_words(template, answer)
    if not words:
        raise UserError("the answer has no words, so there is no attention to draw")
    # The position *before* a token predicts it, so that position's attention decides on the token.
    before = len(prompt["input_ids"]) - 1
    maps = torch.stack([rows[layer - 1, [before + t for t in tokens]].mean(dim=0) for _, tokens in words])
    side = math.isqrt(maps.shape[1])
    return [word for word, _ in words], maps.view(-1, side, side).cpu(), layer  # (W, N) -> (W, side, side)


def split_into_words(template, answer):
    """Returns [(word, numbers of its tokens)] for an answer. A word begins where the decoded text grows by a
    space. Punctuation has no tokens."""
    words, text = [], ""
    for t in range(len(answer)):
        longer = template.tokenizer.decode(answer[:t + 1], skip_special_tokens=True)
        piece, text = longer[len(text):], longer
        if not words or piece[:1].isspace():
            words.append(("", []))
        word, tokens = words[-1]
        words[-1] = (word + piece.strip(), tokens + [t] * any(letter.isalnum() for letter in piece))
    return [(word, tokens) for word, tokens in words if tokens]


def draw_attention(path, question, image, words, maps, layer, num_layers):
    """Writes a PNG: the image as the model sees it, then one panel for each of the first 47 words.

    Attention does not explain an answer (arXiv:1902.10186), because models also attend to positions that they
    do not use (arXiv:2309.17453). To find out whether the image matters, change it, as sanity_check.py does.
    """
    cells = [(image, [(None, "the image", GRAY)])]
    for word, weights in zip(words[:47], maps):
        texts = [(None, word, BLACK), (None, f"to image: {weights.sum():.0%}", GRAY)]
        cells.append((brighten(image, weights), texts))
    title = (f"Attention from each word to the patches; layer {layer} of {num_layers}, mean over its heads. "
             "A panel is dark if the word pays little attention to the image.")
    draw_cells(path, [question.replace(IMAGE_TOKEN, ""), " ".join(words), title], cells, columns=4)


def brighten(image, weights):
    """Returns the image with each patch as bright as its attention, (side, side), relative to the largest.
    If the image gets less than BRIGHT of the attention, it is dimmed as a whole."""
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


def draw_curves(path, run):
    """Writes a PNG with the losses of both stages and "correct image more likely", from metrics.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--curves needs matplotlib: pip install matplotlib") from error
    stages = {}
    for file in sorted(run.glob("stage[12]/metrics.jsonl")):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            stages[file.parent.name] = [dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
    if not stages:
        raise UserError(f"{run} has no stage with a metrics.jsonl: train a stage first")
    figure = Figure(figsize=(5.4 * len(stages), 6.4), layout="constrained")
    axes = figure.subplots(2, len(stages), sharex="col", sharey="row", squeeze=False)
    for (loss_axis, match_axis), (stage, lines) in zip(axes.T, stages.items()):
        for axis, key, label, style, color in (
                (loss_axis, "loss", "training", "-", "0.7"),
                (loss_axis, "heldout_loss", "held-out, correct image", "o-", "green"),
                (loss_axis, "heldout_loss_shuffled", "held-out, different image", "s--", "red"),
                (match_axis, "heldout_image_match", "correct image more likely", "o-", "blue")):
            points = [line for line in lines if "step" in line and key in line]
            axis.plot([point["step"] for point in points], [point[key] for point in points], style,
                      color=color, label=label, markersize=4)
        match_axis.axhline(0.5, color="0.5", linestyle=":", label="chance")
        loss_axis.set(title=stage, ylim=(0, None))
        match_axis.set(ylim=(0, 1.05), xlabel="optimizer step")
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
    if os.path.isdir(path) or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"cannot write a picture to {path}: name a file in a writable folder")
    if args.curves:
        draw_curves(path, args.run)
        return print(f"wrote {path}")
    device = choose_device(args.device)
    stage = args.stage or (2 if (args.run / "stage2" / "run.json").exists() else 1)
    model, template, image_processor, run_json = load_trained(args.run / f"stage{stage}", device,
                                                              choose_dtype(args.precision, device))
    dataset = load_heldout_dataset(run_json, template, image_processor, model.num_image_tokens)
    if args.sheet:
        draw_examples(path, model, template, dataset, device, args.count, args.max_new_tokens)
        return print(f"wrote {path}")
    if args.sample >= len(dataset):
        raise UserError(f"there is no held-out record {args.sample}: they are numbered 0 to "
                        f"{len(dataset) - 1}")
    prompt, _ = dataset.make_prompt(args.sample)
    if prompt["pixel_values"] is None:
        raise UserError(f"held-out record {args.sample} has no image; choose another --sample")
    batch = collate([prompt], template.tokenizer.pad_token_id, padding_side="left")
    answer = model.generate(**{name: tensor.to(device) for name, tensor in batch.items()},
                            end_token_ids=[template.end_token_id], max_new_tokens=args.max_new_tokens)
    words, maps, layer = attention_to_image(model, template, prompt, answer[0].tolist(), args.layer)
    draw_attention(path, dataset.to_messages(dataset.records[args.sample])[0]["content"],
                   visible_image(prompt["pixel_values"], image_processor), words, maps, layer,
                   model.llm.config.get_text_config().num_hidden_layers)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
