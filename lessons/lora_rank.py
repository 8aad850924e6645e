"""Stage 2 trains only the projector, or an adapter of rank 1 or 128 instead of 16."""

from lessons.experiment import measure, train, train_baseline

MINUTES, DIFFICULTY, CHANGE = 12, "easy", ["run"]
EXPECTED = """The projector alone cannot teach the LLM a new kind of question, "Is there a shape at the top
left?". Rank 1 is nearly enough. Rank 128 is at least as good as rank 16, because the toy's LLM has width
128, and an adapter of that rank can change a weight matrix in any way."""
MEANING = """With the projector alone, the loss stays far above that of any adapter, because the LLM cannot
change. Rank 1, with only 9,664 parameters, closes most of the gap. In this short training, each higher rank
is better."""


def run(seed):
    after = train_baseline(1, seed)
    return {"projector only": measure(train(2, seed, "lora-none", after, lr=0)),
            "rank 1": measure(train(2, seed, "lora-1", after, lora_r=1, lora_alpha=2)),
            "rank 16 (baseline)": measure(train_baseline(2, seed)),
            "rank 128": measure(train(2, seed, "lora-128", after, lora_r=128, lora_alpha=256))}
