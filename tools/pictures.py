"""Pictures of what a run has learned: a sheet of answers, attention over an image, curves of the losses.

The first two are drawn by Pillow, which is there anyway; the curves by matplotlib, if that is installed. They
are meant to be looked at on a phone too: on a sheet 1080 pixels wide no letter is smaller than 28.
"""

import json
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_TOKEN
from pixels import load_image
from plumbing import UserError, replacing

WIDTH, GAP = 1080, 24  # of a whole sheet, and between its cells
SIZE, LINE = 28, 36  # of letters, and from one line of text to the next
INK, GREY, RIGHT, WRONG = (30, 30, 30), (105, 105, 105), (20, 110, 50), (180, 30, 30)


def read_picture(path):
    """The PIL image in a file that somebody has named."""
    try:
        return load_image(path)
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} as an image: {why}") from error


# -- cells of a picture and some lines below ---------------------------------------------------------------


def draw_sheet(path, title, cells, columns):
    """Draws cells, a list of (PIL image, [(mark, text, colour), …]), into a PNG at `path`, below the
    paragraphs of the title.

    A mark ("right" or "wrong") is drawn before its text, not written: few fonts have a tick, and red and
    green alone would say nothing to one man in twelve.
    """
    font = ImageFont.load_default(SIZE)
    side = (WIDTH - GAP) // columns - GAP  # of an image, and the width of the text below it
    title_lines = [line for text in title for line in wrap(text, font, WIDTH - 2 * GAP)]
    wrapped = []
    for _, texts in cells:
        lines = []
        for mark, text, colour in texts:
            indent = LINE if mark else 0
            for line in wrap(text, font, side - indent):
                lines.append((mark, indent, line, colour))
                mark = None  # once, before the first line; the others are indented like it
        wrapped.append(lines)

    rows = [range(i, min(i + columns, len(cells))) for i in range(0, len(cells), columns)]
    heights = [side + LINE * max(len(wrapped[i]) for i in row) + 2 * GAP for row in rows]
    top = GAP + LINE * len(title_lines) + GAP
    sheet = Image.new("RGB", (WIDTH, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title_lines):
        draw.text((GAP, GAP + i * LINE), line, fill=INK, font=font)
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            left, image = GAP + column * (side + GAP), cells[i][0]
            scale = side / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # In the middle of its square, and framed: a pale picture would run out into the paper.
            x, y = left + (side - size[0]) // 2, top + side - size[1]
            sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (x, y))
            draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=(200, 200, 200))
            for j, (mark, indent, line, colour) in enumerate(wrapped[i]):
                y = top + side + GAP // 2 + j * LINE
                draw_mark(draw, mark, left, y + 4, colour)
                draw.text((left + indent, y), line, fill=colour, font=font)
        top += height
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def draw_mark(draw, mark, x, y, colour):
    """A tick or a cross, as high as a letter."""
    if mark == "right":
        draw.line([(x + 1, y + 13), (x + 8, y + 21), (x + 23, y + 2)], fill=colour, width=5, joint="curve")
    elif mark == "wrong":
        draw.line([(x + 2, y + 2), (x + 21, y + 21)], fill=colour, width=5)
        draw.line([(x + 2, y + 21), (x + 21, y + 2)], fill=colour, width=5)


def wrap(text, font, width, most_lines=8):
    """text → lines that are no wider than `width` pixels; what is beyond `most_lines` is cut off."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for letter in word:  # one by one: a word may be wider than a line
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most_lines:
        lines = lines[:most_lines]
        while lines[-1] and font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " …"
    return lines


def spread(items, count):
    """So many of them at equal distances, so that nobody has picked them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


# -- the contact sheet -------------------------------------------------------------------------------------


def contact_sheet(path, title, samples):
    """Draws samples, a list of (PIL image, question, answer, truth, right), into a PNG at `path`, below a
    title.

    right: True, False, or None where no answer is the only right one (a caption of a photo). The answer is
    then left without a mark.
    """
    cells = []
    for image, question, answer, truth, right in samples:
        mark, colour = {True: ("right", RIGHT), False: ("wrong", WRONG), None: (None, INK)}[right]
        texts = [(None, question.replace(IMAGE_TOKEN, ""), GREY), (mark, answer or "(nothing)", colour),
                 (None, f"truth: {truth}", GREY if right else INK)]
        cells.append((image, texts))
    draw_sheet(path, [title], cells, columns=3)


# -- attention ---------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_to_image(model, template, prompt, answer, layer=None):
    """Where in the image does each word of an answer look?

    In every layer and head, position i takes in the positions j <= i with weights a_ij, which add up to 1:

        a_i = softmax(q_i · K^T / sqrt(d))            one row for each position: (T,)

    Among the j are the image's N positions, each of which stands for one patch. So row i, at these columns,
    is a small picture of where in the image position i looks.

    Args:
        prompt: {"input_ids", "pixel_values"}, with an image. answer: ids that generate() gave for it.
        layer: 1 (the LLM's first) …; None: the one whose attention differs most from word to word.
    Returns:
        (words, maps, layer): W texts, and (W, side, side), the mean over the layer's heads and the word's
        tokens. A map adds up to the share of its attention that the word gives to the image.
    """
    end = [i for i, token in enumerate(answer) if token == template.end_token_id][:1]
    answer = answer[:end[0]] if end else answer
    input_ids = torch.tensor([prompt["input_ids"] + answer], device=model.llm.device)  # (1, T)
    inputs_embeds = model.embed(input_ids, prompt["pixel_values"][None].to(input_ids.device))
    # The usual attention ("sdpa") is one fused kernel that never writes the T×T weights anywhere: that is why
    # it is fast, and why there is nothing to look at. "eager" is the same sum spelled out.
    usual = model.llm.config._attn_implementation
    model.llm.set_attn_implementation("eager")
    try:
        # One pass over prompt and answer gives all rows: no need to generate once more, word by word.
        weights = model.llm.get_decoder()(inputs_embeds=inputs_embeds, output_attentions=True,
                                          use_cache=False).attentions  # L × (1, heads, T, T)
    finally:
        model.llm.set_attn_implementation(usual)
    if layer is not None and not 1 <= layer <= len(weights):
        raise UserError(f"--layer {layer}: this language model's layers are 1 to {len(weights)}")

    is_image = input_ids[0] == model.image_token_id  # (T,)
    rows = torch.stack([w[0].float().mean(dim=0)[:, is_image] for w in weights])  # (L, T, N)
    if layer is None:
        # A layer in which every word looks at the same patches says nothing about any of them. So: the layer
        # with the largest distance of a row from the mean row, over all that stands behind the image.
        behind = rows[:, is_image.nonzero().max() + 1:]  # (L, T', N)
        layer = 1 + (behind - behind.mean(dim=1, keepdim=True)).abs().sum(dim=2).mean(dim=1).argmax().item()

    words, members = words_of(template, answer)
    if not words:
        raise UserError("the answer has no words whose attention could be drawn")
    # Position t - 1 predicts the token at t (the same shift as in forward()). What decides on a word is thus
    # what the position *before* it looks at; taking the word's own row is the common mistake: there the word
    # has been said, and the model is on its way to the next.
    before = len(prompt["input_ids"]) - 1
    maps = torch.stack([rows[layer - 1, [before + t for t in tokens]].mean(dim=0) for tokens in members])
    side = math.isqrt(maps.shape[1])  # N = side²: rows of patches, from the top left, as CLIP cuts them
    return words, maps.view(-1, side, side).cpu(), layer


def words_of(template, answer):
    """ids → (words, for each the places of its tokens in `answer`); of a full stop or comma, no places.

    A tokenizer's pieces are no words ("ol|ive"); a new one begins where the text so far grows by a space.
    """
    words, members, text = [], [], ""
    for t in range(len(answer)):
        longer = template.tokenizer.decode(answer[:t + 1], skip_special_tokens=True)
        piece, text = longer[len(text):], longer
        if not words or piece[:1].isspace():
            words.append("")
            members.append([])
        words[-1] += piece.strip()
        if any(letter.isalnum() for letter in piece):
            members[-1].append(t)
    kept = [i for i, tokens in enumerate(members) if tokens]
    return [words[i] for i in kept], [members[i] for i in kept]


def attention_sheet(path, question, image, words, maps, layer, layers):
    """Draws attention_to_image()'s result: the image once as it is, then once for each word of the answer.

    image: what the model was shown (see shown_image()): the patches cover that, and not what was cut off.

    Each panel is scaled by its own largest patch. Without that, one patch that every word looks at would
    leave all else dark: models park attention which they have no use for on some position or other
    ("attention sinks", Xiao et al., arXiv:2309.17453; "registers" in CLIP, Darcet et al., arXiv:2309.16588).
    The price: a word that hardly looks at the image seems to look as hard as any. Hence the figure below each
    word, the share of its attention that goes to the image at all; the rest goes to the text.

    What it does not show: why. Attention says what one layer's heads took in; what the other layers made of
    it, it does not (Jain and Wallace, "Attention is not Explanation", arXiv:1902.10186). To learn whether the
    image matters, change the image: that is what --sample and --eval do.
    """
    most = 47
    said = " ".join(words[:most]) + (" …" if len(words) > most else "")
    cells = [(image, [(None, "what it sees", GREY)])]
    for word, weights in list(zip(words, maps))[:most]:
        share = f"to image {weights.sum():.0%}"
        cells.append((heat(image, weights), [(None, word, INK), (None, share, GREY)]))
    title = [question.replace(IMAGE_TOKEN, ""), said,
             f"Attention from each word to the patches, layer {layer} of {layers}, mean over its heads; each "
             "panel is scaled by its largest patch."]
    draw_sheet(path, title, cells, columns=4)


def shown_image(pixel_values, image_processor):
    """pixel_values (3, H, W) → the PIL image again, cut and scaled as the model sees it."""
    pixels = pixel_values.float().cpu().numpy().transpose(1, 2, 0)  # (H, W, 3)
    pixels = pixels * image_processor.std + image_processor.mean
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype("uint8"))


def heat(image, weights):
    """An image under its map, (side, side): what is looked at keeps its light, what is not goes dark."""
    weights = weights / weights.max().clamp(min=1e-9)  # 0 … 1
    mask = Image.fromarray((weights * 255).round().to(torch.uint8).numpy())
    size = (480, 480)
    # Nearest: each patch stays one square. A smooth map would promise more than N numbers can say.
    mask = mask.resize(size, Image.Resampling.NEAREST)
    image = image.resize(size, Image.Resampling.BICUBIC)
    cold = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", size, (25, 20, 70)), 0.75)
    hot = Image.blend(image, Image.new("RGB", size, (255, 190, 60)), 0.15)
    return Image.composite(hot, cold, mask)


# -- curves ------------------------------------------------------------------------------------------------


def draw_curves(run):
    """Draws <run>/curves.png from the metrics.jsonl of its stages, and says so; or what it would take.

    Training is over when this is called, and saved: nothing that goes wrong here may look as if it was not.
    """
    run = Path(run)
    try:
        # Here, and not above: nothing else needs matplotlib. Its Figure without pyplot, which would look for
        # a window to open, and keep every figure in memory.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return (f"no {run / 'curves.png'} without matplotlib: pip install matplotlib, and the next stage or "
                "sanity_check.py --eval draws it")
    stages = {}
    for stage in (1, 2):
        path = run / f"stage{stage}" / "metrics.jsonl"
        if path.exists():
            try:
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            except ValueError as error:
                return f"no {run / 'curves.png'}: cannot read {path}: {error}"
            stages[f"stage {stage}"] = lines
    if not stages:
        return f"no {run / 'curves.png'}: no stage of this run has a metrics.jsonl"
    figure = Figure(figsize=(5.4 * len(stages), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(stages), sharex="col", sharey="row", squeeze=False)
    for column, (name, lines) in enumerate(stages.items()):
        loss, grounding = axes[:, column]
        curves = [(loss, "loss", "training", "0.7", "-"),
                  (loss, "heldout_loss", "held out, its own image", "tab:green", "o-"),
                  (loss, "heldout_loss_shuffled", "held out, another's image", "tab:red", "s--"),
                  (grounding, "heldout_image_match", "own image preferred", "tab:blue", "o-")]
        for axis, key, label, colour, style in curves:
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points), style, color=colour, label=label, markersize=4)
        loss.set_title(name)
        loss.set_ylim(bottom=0)
        grounding.axhline(0.5, color="0.5", linestyle=":", label="chance")
        grounding.set_ylim(0, 1.05)
        grounding.set_xlabel("optimizer step")
        for axis in (loss, grounding):
            axis.grid(alpha=0.3)
            axis.tick_params(labelleft=True)
            axis.legend()
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[1, 0].set_ylabel("share of held-out records")
    try:
        with replacing(run / "curves.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    except UserError as error:
        return f"no curves: {error}"
    return f"curves of loss and grounding: {run / 'curves.png'}"
