"""The projector reads a different layer of the vision tower. The toy's CLIP has four blocks."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY, CHANGE = 10, "easy", ["run"]
EXPECTED = """The output of the last block (-1) is a little worse than that of the block before it (-2), as in
the paper, where the last block loses 0.96 points on ScienceQA. The embeddings (-5) should be worse still,
because they have not passed through any block. Each is a linear function of one patch's pixels plus a
position embedding, followed by a layer norm."""
MEANING = """The last two blocks are equally good, so the toy does not reproduce the paper's finding. The
embeddings are worse on average and vary widely between seeds. Still, they are far from useless, because the
toy's shapes are so simple that a linear layer can tell many of them apart by their pixels."""


def run(seed):
    return {"-2 (baseline)": measure(train_baseline(1, seed)),
            **{str(layer): measure(train(1, seed, f"layer{layer}", vision_layer=layer))
               for layer in (-1, -5)}}
