"""Stage 2 trains less, or more, than an adapter of rank 16."""

from lessons.experiment import measure, replaced, train, usual
from model import Llava

EXPECTED = """The projector alone cannot teach the LLM to answer yes or no, which it never did before. Rank
1 is nearly enough. All weights of the LLM, as in the paper, are at least as good as rank 16."""
MEANING = ""


def unfreeze_llm(self, config):
    self.llm.requires_grad_(True)


def run(seed):
    after = usual(1, seed)
    results = {"projector only": measure(train(2, seed, "lora-none", after, lr=0)),
               "rank 1": measure(train(2, seed, "lora-1", after, lora_r=1, lora_alpha=2)),
               "rank 16 (usual)": measure(usual(2, seed))}
    with replaced(Llava, add_lora=unfreeze_llm):
        results["all weights of the LLM"] = measure(train(2, seed, "all-weights", after))
    return results
