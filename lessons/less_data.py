"""Stage 1 takes its 250 steps on fewer different records."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY = 10, "easy"
EXPECTED = """Few records are enough, because the projector is one linear layer with 16,512 parameters, and
there are only 324 combinations of color, shape and place to learn. About 120 of these combinations never
occur in 100 records."""
MEANING = """1,000 records are as good as 6,000, though each of them is then seen eight times. With 100
records the captions are much worse, and the loss is three times as high. Real images do not consist of 324
combinations, so this says nothing about how many records LLaVA needs."""


def run(seed):
    return {**{f"{limit} records": measure(train(1, seed, f"limit{limit}", limit=limit))
               for limit in (100, 1000)},
            "6,000 records (baseline)": measure(train_baseline(1, seed))}
