"""The projector is LLaVA-1.5's: two linear layers with a GELU between them."""

from lessons.experiment import measure, train, train_baseline

EXPECTED = """At least as good. LLaVA-1.5 reports that two layers improve on one."""
MEANING = """In a run this short, the two layers are as good in one seed and far behind in the other two.
With a tenth of the learning rate they are behind in all three. LLaVA-1.5 trains much longer, on photos."""


def run(seed):
    return {"linear (baseline)": measure(train_baseline(1, seed)),
            "mlp": measure(train(1, seed, "mlp", projector="mlp")),
            "mlp, a tenth of the learning rate":
                measure(train(1, seed, "mlp-slow", projector="mlp", lr=1e-3))}
