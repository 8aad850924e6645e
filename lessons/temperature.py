"""Each next token is sampled instead of taking the most likely one."""

from lessons.experiment import measure, replaced, usual
from model import Llava

EXPECTED = """Worse captions, and the more so the higher the temperature. A caption has one correct answer
here, and one wrong token is enough to miss it."""
MEANING = ""

generate = Llava.generate


def sample_at(temperature):
    return lambda self, *args, **named: generate(self, *args, **{**named, "temperature": temperature})


def run(seed):
    results = {"greedy (usual)": measure(usual(1, seed))}
    for temperature in (0.5, 1.0, 2.0):
        with replaced(Llava, generate=sample_at(temperature)):
            results[f"temperature {temperature}"] = measure(usual(1, seed))
    return {name: {"captions": result["captions"]} for name, result in results.items()}
