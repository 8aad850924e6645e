"""Draws the losses of a run as an SVG file, also while the run goes on.

    python -m tools.loss_picture --run runs/toy       writes runs/toy/losses.svg

It reads only metrics.jsonl, which both stages write while they train. If the held-out loss is lower with the
correct image than with a different image, the model uses the image. After a stage, tools.page shows more.
"""

import argparse
import json
from pathlib import Path

from support.errors import UserError, explain_errors, run_script
from support.files import atomic_write

WIDTH, HEIGHT, ROW = 340, 180, 18  # of a stage's plot, and the height of a row of text, in pixels
LEFT, TOP, COLUMN = 44, 30, 400  # the margins of a plot, and its width with its margins
CURVES = {"loss": ("training", "#8c959f"), "heldout_loss": ("held-out, correct image", "#1a7f37"),
          "heldout_loss_different": ("held-out, different image", "#cf222e")}


def read_lines(folder):
    """Returns the lines of a stage's metrics.jsonl as dicts, none if there is no such file."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with explain_errors(f"read {path}"):  # a last line without its line break is still being written
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def points_of(lines, key):
    """Returns [(step, value)] of the lines with a value, which is null if a loss was not finite."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def draw_stage(lines, title, top_loss):
    """Returns the SVG elements of one stage's plot. (0, 0) is its upper left corner, inside the margins."""
    last = max(1, lines[-1]["step"])
    parts = [f'<text y="{ROW - TOP}" font-weight="bold">{title}</text>', f'<text y="{HEIGHT + ROW}">0</text>',
             f'<text x="{WIDTH}" y="{HEIGHT + ROW}" text-anchor="end">step {last:,}</text>']
    for value in range(0, int(top_loss) + 1, 1 + int(top_loss) // 10):
        y = HEIGHT * (1 - value / top_loss)
        parts += [f'<path d="M0 {y:.1f}h{WIDTH}" stroke="#d0d7de"/>',
                  f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{value}</text>']
    for row, (key, (name, color)) in enumerate(CURVES.items(), start=2):
        if points := points_of(lines, key):
            path = [f"{WIDTH * step / last:.1f},{HEIGHT * (1 - value / top_loss):.1f}"
                    for step, value in points]
            x, y = path[-1].split(",")
            parts += [
                f'<polyline points="{" ".join(path)}" fill="none" stroke="{color}" stroke-width="2"/>',
                f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>',  # visible if it is the only point, too
                f'<text y="{HEIGHT + row * ROW}" fill="{color}">{name}: {points[-1][1]:.3f}</text>']
    return parts


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.loss_picture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--out", type=Path, metavar="SVG", help="file to write (default: <run>/losses.svg)")
    args = parser.parse_args()
    path = args.out or args.run / "losses.svg"
    stages = {stage: lines for stage in (1, 2) if (lines := read_lines(args.run / f"stage{stage}"))}
    if not stages:
        raise UserError(f"{args.run} holds no losses yet: a stage writes the first ones before it trains")
    top_loss = 1.1 * max((value for lines in stages.values() for key in CURVES
                          for _, value in points_of(lines, key)), default=1)
    parts = []
    for i, (stage, lines) in enumerate(stages.items()):
        parts += [f'<g transform="translate({LEFT + i * COLUMN} {TOP})">',
                  *draw_stage(lines, f"stage {stage}: loss, nats per token", top_loss), "</g>"]
    width, height = len(stages) * COLUMN, TOP + HEIGHT + 5 * ROW
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
           f'font-family="sans-serif" font-size="12" fill="#24292f">\n'
           f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")
    with atomic_write(path) as temporary:
        temporary.write_text(svg, encoding="utf-8")
    print(f"wrote {path}: open it in a browser")


if __name__ == "__main__":
    run_script(main)
