"""Draws pictures of a run: held-out examples, attention to the image, and the curves of the training.

    python -m tools.pictures --run runs/toy --sheet sheet.png                    held-out images with answers
    python -m tools.pictures --run runs/toy --attention attention.png --sample 58
    python -m tools.pictures --run runs/toy --curves curves.png                  of both stages; needs matplotlib

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

WIDTH, GAP = 1080, 24  # pixels: the width of a picture and the space between its cells
FONT_SIZE, LINE = 28, 36  # pixels: large enough for a phone
BLACK, GRAY, GREEN, RED = (30, 30, 30), (105, 105, 105), (20, 110, 50), (180, 30, 30)
BRIGHT = 0.3  # fraction of the attention from which a panel gets its full brightness

# -- cells: an image with lines of text below --------------------------------------------------------------


def draw_cells(path, title, cells, columns):
    """Writes a PNG.

    Args:
        title: list of paragraphs. cells: list of (PIL image, [(mark, text, color), …]). The mark before a text
            is "tick", "cross" or None. Color alone would not be enough for color-blind readers.
    """
    font = ImageFont.load_default(FONT_SIZE)
    side = (WIDTH - GAP) // columns - GAP  # of an image
    title = [line for text in title for line in wrap(text, font, WIDTH - 2 * GAP)]
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    text_lines = [[[(mark if i == 0 else None, LINE if mark else 0, line, color) for mark, text, color in texts
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
    lines = {"tick": [[(1, 13), (8, 21), (23, 2)]], "cross": [[(2, 2), (21, 21)], [(2, 21), (21, 2)]], None: []}
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
