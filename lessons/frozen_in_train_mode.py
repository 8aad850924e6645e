"""CLIP and the LLM are put in train mode, as a plain model.train() would do."""

from torch import nn

import stage1_align
from lessons.experiment import measure, replaced, train, train_baseline
from model import Llava

EXPECTED = """The result is exactly the same, because neither CLIP nor Llama uses dropout. It becomes worse
if 10% of the LLM's attention weights are dropped."""
MEANING = """With the models as they are, every number is the same. With dropout the captions are a little
worse, less than the seeds differ. So this bug is easy to miss, and it hurts only with models that have
dropout."""

load_language_model = stage1_align.load_language_model


def load_with_dropout(*args):
    llm = load_language_model(*args)
    for block in llm.get_decoder().layers:
        block.self_attn.attention_dropout = 0.1  # used in train mode only
    return llm


def run(seed):
    results = {"eval mode (baseline)": measure(train_baseline(1, seed))}
    with replaced(Llava, train=nn.Module.train):
        results["train mode"] = measure(train(1, seed, "train-mode"))
        with replaced(stage1_align, load_language_model=load_with_dropout):
            results["train mode, LLM with dropout"] = measure(train(1, seed, "train-mode-dropout"))
    return results
