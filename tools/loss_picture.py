"""Draws the held-out losses of a run, with the correct and with a different image, as an SVG file.

    python -m tools.loss_picture --run runs/toy --out docs/losses.svg

It reads metrics.jsonl of both stages. The gap between the two curves shows that the model uses the image.
"""

import argparse
import json
from pathlib import Path

from support.errors import UserError, explain_errors, run_script
from support.files import atomic_write

WIDTH, HEIGHT, LEFT, TOP = 340, 180, 44, 30  # of one stage's plot, and the margins around it, in pixels
CURVES = {"heldout_loss": ("correct image", "#1a7f37"),
          "heldout_loss_different": ("different image", "#cf222e")}


def read_losses(path):
    """Returns the evaluations in a metrics.jsonl, as dicts."""
    with explain_errors(f"read {path}"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "heldout_loss" in line]


def draw_stage(evaluations, title, x0, top_loss):
    """Returns the SVG elements of one stage's plot, whose left edge is at x0."""
    last = max(1, evaluations[-1]["step"])
    parts = [f'<text x="{x0}" y="18" font-weight="bold">{title}</text>',
             f'<text x="{x0 + WIDTH}" y="{TOP + HEIGHT + 18}" text-anchor="end">step {last}</text>',
             f'<text x="{x0}" y="{TOP + HEIGHT + 18}">0</text>']
    for value in range(int(top_loss) + 1):
        y = TOP + HEIGHT * (1 - value / top_loss)
        parts += [f'<path d="M{x0} {y:.1f}h{WIDTH}" stroke="#d0d7de"/>',
                  f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>']
    for key, (name, color) in CURVES.items():
        points = [(x0 + WIDTH * line["step"] / last, TOP + HEIGHT * (1 - line[key] / top_loss))
                  for line in evaluations]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        x, y = points[-1]
        parts += [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>',
                  f'<text x="{x:.1f}" y="{max(y - 8, TOP + 12):.1f}" text-anchor="end" fill="{color}">{name} '
                  f'{evaluations[-1][key]:.2f}</text>']
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    stages = {f"stage {stage}": read_losses(path) for stage in (1, 2)
              if (path := args.run / f"stage{stage}" / "metrics.jsonl").exists()}
    if not stages or not all(stages.values()):
        raise UserError(f"{args.run} holds no run with evaluations: train with stage1_align.py first")
    top_loss = 1.1 * max(line[key] for lines in stages.values() for line in lines for key in CURVES)
    parts = [part for i, (title, lines) in enumerate(stages.items())
             for part in draw_stage(lines, f"{title}: held-out loss, nats per token",
                                    LEFT + i * (WIDTH + LEFT + 16), top_loss)]
    width, height = LEFT + len(stages) * (WIDTH + LEFT + 16) - LEFT, TOP + HEIGHT + 30
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
           f'font-family="sans-serif" font-size="12" fill="#24292f">\n'
           f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")
    with atomic_write(args.out) as temporary:
        temporary.write_text(svg, encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
