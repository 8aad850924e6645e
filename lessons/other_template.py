"""The trained model is prompted with Vicuna's chat template instead of its own."""

from data import ChatTemplate
from lessons.experiment import measure, replaced, train_baseline

MINUTES, DIFFICULTY, CHANGE = 6, "easy", ["encode_vicuna_prompt"]
EXPECTED = """The answers get worse, although the picture and the question are the same, because the model was
trained with other role markers."""
MEANING = """Almost no answer is right. If a model trained well but answers badly, check this first: print the
prompt, and compare it with a training sample, which `--check-data` prints."""


# Replaces ChatTemplate.encode_prompt.
def encode_vicuna_prompt(self, messages):
    return self.tokenize(f"USER: {messages[0]['content']} ASSISTANT:")[0]


def run(seed):
    results = {"own template (baseline)": measure(train_baseline(2, seed))}
    with replaced(ChatTemplate, encode_prompt=encode_vicuna_prompt):
        results["Vicuna's template"] = measure(train_baseline(2, seed))
    # The held-out loss does not use encode_prompt(), so it cannot change.
    return {name: {"answers": result["answers"]} for name, result in results.items()}
