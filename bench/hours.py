"""How long will the real training take? Computed, not measured.

    python bench/hours.py                        the table: seconds, nothing is trained
    python bench/hours.py --utilisation 0.5      with another guess

Operations of a step that cannot be avoided (cost.py, full geometry, texts as long as the data sets'), over
what a card can do at most, by its data sheet: dense products in half precision, summed up in fp32. No step
reaches that. What share it does reach, the utilisation, is measured by `python bench/bench.py --geometry full
--device cuda`; without such a figure, 0.35 is assumed, less than large trainings report (0.4 to 0.5), for
small micro-batches and cards that slow down when warm.
"""

import argparse

import numpy as np

from cost import unavoidable_flops
from sides import IGNORE_INDEX, draw_samples, geometry

TFLOPS = {"T4": 65, "RTX 3060": 25.5, "A100": 312}
RECORDS = {1: 595_375, 2: 157_712}
PART = 20_000


UTILISATION = 0.35


def flops_per_sample(stage):
    """What the mean sample of a stage's data costs at full geometry."""
    shape = geometry("full")
    samples = draw_samples(shape, stage, 500, np.random.default_rng(0))
    lengths = [(len(s["input_ids"]), sum(l != IGNORE_INDEX for l in s["labels"])) for s in samples]
    return unavoidable_flops(shape, lengths, stage) / len(samples)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    utilisation = parser.parse_args().utilisation
    print(f"| hours, if {utilisation:.0%} of the card's peak is reached | " + " | ".join(TFLOPS) + " |")
    print("|--|" + "--|" * len(TFLOPS))
    for stage in (1, 2):
        flops = flops_per_sample(stage)
        for records in (RECORDS[stage], PART):
            hours = [records * flops / (1e12 * peak * utilisation) / 3600 for peak in TFLOPS.values()]
            cells = " | ".join(f"{value:.1f}" for value in hours)
            print(f"| stage {stage}, {records:,} records, {flops / 1e12:.1f} TFLOP each | {cells} |")


if __name__ == "__main__":
    main()
