"""The projector reads another layer of the vision tower. The toy's CLIP has four blocks."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY = 10, "easy"
EXPECTED = """The last block (-1) is a little worse than the one before (-2). In the paper, it loses 0.96
points on ScienceQA. The embeddings (-5) have not passed any block. Each of these vectors is a linear
function of the pixels of one patch, plus a position embedding, and then a layer norm. They should be
worse."""
MEANING = """The last two blocks are equally good, so the paper's finding does not show in the toy. The
embeddings are worse, and the seeds differ widely, but they are not useless: the toy's shapes are so simple
that a linear layer can tell many of them apart by their pixels."""


def run(seed):
    return {"-2 (baseline)": measure(train_baseline(1, seed)),
            **{str(layer): measure(train(1, seed, f"layer{layer}", vision_layer=layer))
               for layer in (-1, -5)}}
