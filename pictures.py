"""The contact sheet: held-out images with what was asked, what the model said, and the truth."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

SIDE, WIDTH, GAP, COLUMNS = 240, 272, 16, 4  # of an image, of a cell, between cells; cells in a row
LINE, SIZE = 20, 16  # height of a line of text, and of its letters
INK, GREY, RIGHT, WRONG = (30, 30, 30), (120, 120, 120), (20, 120, 50), (190, 30, 30)


def contact_sheet(path, samples):
    """Draws samples, a list of (PIL image, question, answer, truth), into a PNG at `path`.

    An answer equal to the truth is green; otherwise it is red, and the truth stands below it.
    """
    font = ImageFont.load_default(SIZE)
    cells = []
    for image, question, answer, truth in samples:
        lines = [(line, GREY) for line in wrap(question.replace("<image>\n", ""))]
        lines += [(line, RIGHT if answer == truth else WRONG) for line in wrap(answer or "(nothing)")]
        if answer != truth:
            lines += [(line, INK) for line in wrap(f"truth: {truth}")]
        cells.append((image, lines))

    rows = [cells[i:i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [SIDE + LINE * max(len(lines) for _, lines in row) + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (GAP + COLUMNS * (WIDTH + GAP), GAP + sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights):
        for column, (image, lines) in enumerate(row):
            left = GAP + column * (WIDTH + GAP)
            scale = SIDE / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
            for i, (line, colour) in enumerate(lines):
                draw.text((left, top + SIDE + 6 + i * LINE), line, fill=colour, font=font)
        top += height
    sheet.save(path, "PNG")


def wrap(text, most_lines=8):
    return textwrap.wrap(" ".join(text.split()), 33, max_lines=most_lines, placeholder=" …")
