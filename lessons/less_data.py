"""Stage 1 still takes 250 steps, but on fewer different records."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY, CHANGE = 10, "easy", ["run"]
EXPECTED = """A few records are enough, because the projector is one linear layer with 16,512 parameters, and
there are only 324 combinations of color, shape and place to learn. In 100 records, however, about 120 of
these combinations never occur."""
MEANING = """1,000 records do as well as 6,000, although the model sees each of them eight times, whereas with
100 records the captions are much worse and the loss is three times as high. This does not tell you how many
records LLaVA needs, because real images are not made of 324 combinations."""


def run(seed):
    return {**{f"{limit} records": measure(train(1, seed, f"limit{limit}", limit=limit))
               for limit in (100, 1000)},
            "6,000 records (baseline)": measure(train_baseline(1, seed))}
