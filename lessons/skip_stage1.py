"""Stage 2 starts from an untrained projector."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY, CHANGE = 10, "easy", ["run"]
EXPECTED = """The answers get worse, because the adapter has to make sense of vectors that mean nothing to the
LLM. In the paper, skipping stage 1 costs 5.11 points on ScienceQA, while Prismatic VLMs (arXiv:2402.07865)
even improve without it. Both train the whole LLM and no adapter."""
MEANING = """Stage 1 matters here, because without it most answers are wrong after the same number of steps in
stage 2. Giving the projector the learning rate of stage 1 helps clearly with one seed, helps a little with
another, and hurts with the third. We did not measure whether a longer stage 2 would catch up."""


def run(seed):
    untrained = train(1, seed, "untrained-projector", max_steps=0)
    skipped = train(2, seed, "untrained-projector", after=untrained)
    # Here the projector is trained in stage 2 only, so it is also tried with the learning rate of stage 1.
    fast = train(2, seed, "untrained-projector", after=untrained, projector_lr=1e-2)
    return {"baseline": measure(train_baseline(2, seed)), "without stage 1": measure(skipped),
            "without stage 1, projector_lr of stage 1": measure(fast)}
