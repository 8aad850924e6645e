"""Each next token is sampled from the model's probabilities, instead of always taking the most likely."""

import torch

from lessons.experiment import measure, replaced, train_baseline
from model import Llava

MINUTES, DIFFICULTY = 4, "easy"
EXPECTED = """The higher the temperature, the worse the captions. Each picture of the toy has one correct
caption, and one wrong token makes an object or its place wrong."""
MEANING = """A temperature of 0.5 costs almost nothing. At 2, the captions name most objects wrongly. So
scores are measured with greedy decoding."""

generate = Llava.generate


def sample_at(temperature):
    return lambda self, *args, **named: generate(self, *args, **{**named, "temperature": temperature})


def run(seed):
    results = {"greedy (baseline)": measure(train_baseline(1, seed))}
    for temperature in (0.5, 1.0, 2.0):
        torch.manual_seed(seed)
        with replaced(Llava, generate=sample_at(temperature)):
            results[f"temperature {temperature}"] = measure(train_baseline(1, seed))
    return {name: {"captions": result["captions"]} for name, result in results.items()}
