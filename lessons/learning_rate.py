"""Stage 1 has ten times the learning rate, or it has neither warm-up nor clipping."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY = 10, "easy"
EXPECTED = """Ten times the learning rate is too high. Warm-up and clipping matter little here, because only
one linear layer is trained."""
MEANING = """Ten times the learning rate costs more than half of the score. Without warm-up and clipping the
captions are clearly worse, too, against our expectation. We did not measure which of the two matters. No
error is raised in either case, so only the scores show it."""


def run(seed):
    return {"lr 1e-2 (baseline)": measure(train_baseline(1, seed)),
            "lr 1e-1": measure(train(1, seed, "lr-high", lr=1e-1)),
            "lr 1e-2, no warm-up, no clipping":
                measure(train(1, seed, "no-warmup", warmup=0, max_grad_norm=1e9))}
