"""Each next token is sampled from the model's probabilities instead of being the most likely one."""

import torch

from lessons.experiment import measure, replaced, train_baseline
from model import Llava

MINUTES, DIFFICULTY, CHANGE = 4, "easy", ["sample_at"]
EXPECTED = """The higher the temperature, the worse the captions. Each picture of the toy has one correct
caption, so a single wrong token gets an object or its place wrong."""
MEANING = """A temperature of 0.5 costs almost nothing, but at 2 the captions get most objects wrong. That is
why scores are measured with greedy decoding."""

generate = Llava.generate


# The function that it returns replaces Llava.generate.
def sample_at(temperature):
    return lambda self, *args, **named: generate(self, *args, **{**named, "temperature": temperature})


def run(seed):
    results = {"greedy (baseline)": measure(train_baseline(1, seed))}
    for temperature in (0.5, 1.0, 2.0):
        torch.manual_seed(seed)
        with replaced(Llava, generate=sample_at(temperature)):
            results[f"temperature {temperature}"] = measure(train_baseline(1, seed))
    return {name: {"captions": result["captions"]} for name, result in results.items()}
