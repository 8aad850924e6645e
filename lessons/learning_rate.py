"""Stage 1 uses ten times the learning rate, or it uses neither warm-up nor clipping."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY, CHANGE = 10, "easy", ["run"]
EXPECTED = """Ten times the learning rate is too much. Warm-up and clipping hardly matter, because only one
linear layer is trained."""
MEANING = """Ten times the learning rate costs more than half of the score. Contrary to our guess, the
captions also get clearly worse without warm-up and clipping, though we did not measure which of the two
matters."""


def run(seed):
    return {"lr 1e-2 (baseline)": measure(train_baseline(1, seed)),
            "lr 1e-1": measure(train(1, seed, "lr-high", lr=1e-1)),
            "lr 1e-2, no warm-up, no clipping":
                measure(train(1, seed, "no-warmup", warmup=0, max_grad_norm=1e9))}
