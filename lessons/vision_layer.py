"""The projector reads another layer of the vision tower. The toy's CLIP has four blocks."""

from lessons.experiment import measure, train, usual

EXPECTED = """The last block (-1) is a little worse than the one before (-2): 0.96 points on ScienceQA in
the paper. The embeddings (-5) have not passed any block, so each vector is a linear function of its patch's
pixels."""
MEANING = ""


def run(seed):
    return {"-2 (usual)": measure(usual(1, seed)),
            **{str(layer): measure(train(1, seed, f"layer{layer}", vision_layer=layer))
               for layer in (-1, -5)}}
