"""Shows six bugs that real projects had, each as one wrong line in a copy of the code of this project.

    python -m lessons.find_the_bug 1               prints the copy without comments, and what the bug does
    python -m lessons.find_the_bug 1 --solution    also the wrong line, the right one, and who reported it

Guess the wrong line before you look at the original. The numbers need runs/toy, so run `make demo` first.
"""

import argparse
import inspect
import re
from pathlib import Path
from textwrap import dedent

import torch

from data import ChatTemplate, collate, count_labeled
from lessons.experiment import replaced
from lessons.walk import forget_projector
from model import IGNORE_INDEX, Llava
from support.errors import run_script
from support.evaluation import generate_answers
from support.results import load_projector
from support.trained import load_heldout_dataset, load_trained


def load(n):
    """Returns (model, template, dataset with 16 held-out records) of the toy's finished stage n."""
    folder = f"runs/toy/stage{n}"
    model, template, processor, _ = load_trained(folder, torch.device("cpu"), torch.float32)
    return model, template, load_heldout_dataset(folder, template, processor, 16)


def batch_of(dataset, indices, make_batch=collate):
    batch = make_batch([dataset[i] for i in indices], dataset.template.pad_token_id)
    return {name: batch[name] for name in batch if name != "skipped"}


def accumulate(model, micro_batches):
    """Returns the projector's gradient of one optimizer step, computed as in the loop of stage1_align.py."""
    model.zero_grad()
    num_labeled = sum(count_labeled(batch).sum() for batch in micro_batches)
    for batch in micro_batches:
        token_losses = model(**batch)
        loss = token_losses.sum() / num_labeled
        loss.backward()
    return model.projector.weight.grad


def count_padding(function):
    model, _, dataset = load(2)
    batch = batch_of(dataset, range(8), function)
    padding = (batch["labels"] != IGNORE_INDEX) & ~batch["attention_mask"]
    return (f"{count_labeled(batch).sum()} labeled tokens, {padding.sum()} of them are padding; "
            f"loss of the trained model {model(**batch).mean():.3f}")


def split_batch(function):
    (model, *_), (_, _, dataset) = load(1), load(2)
    model.projector.requires_grad_(True)
    whole, split = (function(model, [batch_of(dataset, range(i, i + size)) for i in range(0, 8, size)])
                    for size in (8, 1))  # samples per micro-batch
    change = (split - whole).norm() / whole.norm()
    return f"8 micro-batches of 1 instead of 1 of 8 change the gradient by {change:.1%} of its length"


def count_image_positions(function):
    model, template, dataset = load(2)
    with replaced(ChatTemplate, encode=function):
        batch = batch_of(dataset, [0])
    # transformers' Llava has one more row, for <image>. Without it, labels of <image> raise an IndexError.
    head = model.llm.get_output_embeddings()
    head.weight.data = torch.cat([head.weight, head.weight.mean(0, keepdim=True)])
    images = (batch["labels"] == template.image_token_id).sum()
    return (f"{count_labeled(batch).sum()} labeled tokens, {images} of them are <image>; "
            f"loss of the trained model {model(**batch).mean():.3f}")


def load_into_untrained(function):
    model, template, dataset = load(1)
    forget_projector(model, seed=0)
    function(model, Path("runs/toy/stage1"))
    [answer] = generate_answers(model, template, [dataset.make_prompt(0)[0]], max_new_tokens=40)
    return f"loss {model(**batch_of(dataset, range(16))).mean():.3f}, answer {answer!r}"


def train_to_stop(function):
    model, template, dataset = load(2)
    with replaced(ChatTemplate, encode=function):
        batch = batch_of(dataset, range(16))
    # The toy's LLM already stops after an answer. So its head forgets this here, and is trained again.
    head = model.llm.get_output_embeddings().requires_grad_(True)
    head.weight.data[template.end_token_id] = 0
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch).mean()
        loss.backward()
        optimizer.step()
    [answer] = generate_answers(model, template, [dataset.make_prompt(0)[0]], max_new_tokens=24)
    return f"an LLM that cannot stop, after 30 steps: loss {loss:.3f}, answer (24 tokens at most) {answer!r}"


def repeat_in_train_mode(function):
    model, _, dataset = load(2)
    for module in model.modules():  # the toy's models have no dropout
        for name in {"dropout", "attention_dropout"} & set(vars(module)):
            setattr(module, name, 0.1)
    function(model, True)
    torch.manual_seed(0)
    losses = [f"{model(**batch_of(dataset, range(8))).mean():.3f}" for _ in range(3)]
    return f"dropout 0.1, one batch, three times in train mode: loss {', '.join(losses)}"


BUGS = [  # (original, a part of its source, the same with a bug, what shows the bug, reason, who reported it)
    (collate, 'pad(sample["labels"], IGNORE_INDEX)', 'pad(sample["labels"], pad_token_id)', count_padding,
     "Padding is trained, too. The model soon predicts it, and the loss then looks better than the answers.",
     "nanoVLM until https://github.com/huggingface/nanoVLM/commit/e3043f4"),
    (accumulate, "token_losses.sum() / num_labeled", "token_losses.mean() / len(micro_batches)", split_batch,
     "A mean of means: a token counts more if its micro-batch has few of them, so the split matters.",
     "https://github.com/huggingface/transformers/pull/34191; the loops of nanoVLM and minimind-v, too"),
    (ChatTemplate.encode, "labels = [IGNORE_INDEX] * len(ids)", "labels = list(ids)", count_image_positions,
     "Image positions and questions are labeled, too, so most of the loss is not about the answers.",
     "https://github.com/NielsRogge/Transformers-Tutorials/issues/511"),
    (load_projector, "model.projector.load_state_dict(load(path.read_bytes()), strict=True)",
     "model.load_state_dict(load(path.read_bytes()), strict=False)", load_into_untrained,
     "The file's names are not those of the whole model, and strict=False ignores names that do not fit.",
     "https://github.com/jingyaogong/minimind-v/issues/75 (the loss stayed at 7.5)"),
    (ChatTemplate.encode, "labels[first_token:last_token + 1] = ids[first_token:last_token + 1]",
     "labels[first_token:last_token] = ids[first_token:last_token]", train_to_stop,
     "The end token has no label, so the model does not learn to stop, and no loss shows it.",
     "https://github.com/verl-project/verl/issues/3562 (the answers did not end)"),
    (Llava.train, "super().train(False)", "super().train(mode)", repeat_in_train_mode,
     "Frozen layers drop values at random in training, so the projector never gets their true output.",
     "https://github.com/OpenGVLab/InternVL/issues/544 (there on purpose, as data augmentation)")]


def broken_copy(function, right, wrong):
    """Returns (source without docstring and comments, function) of a copy with one wrong line."""
    source = inspect.getsource(function)
    assert source.count(right) == 1, f"{function.__name__} no longer contains {right}"
    source = re.sub(r'(?m)^ *"""[\s\S]*?"""\n', "", source.replace(right, wrong), count=1)
    source, names = dedent(re.sub(r"(?m)^ *#.*\n|  # .*$", "", source)), dict(function.__globals__)
    exec(source.replace("super()", "super(Llava, self)"), names)  # super() works only inside a class
    return source, names[function.__name__]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("number", type=int, choices=range(1, len(BUGS) + 1), help="which bug")
    parser.add_argument("--solution", action="store_true",
                        help="also print the wrong line, the right one and who reported it")
    args = parser.parse_args()
    function, right, wrong, symptom, reason, reported = BUGS[args.number - 1]
    source, broken = broken_copy(function, right, wrong)
    print(f"{function.__qualname__} of {Path(inspect.getfile(function)).name}, with one wrong line:\n\n"
          f"{source}\noriginal:  {symptom(function)}\nthis copy: {symptom(broken)}")
    if args.solution:
        print(f"\nwrong:     {wrong}\nright:     {right}\nreason:    {reason}\nreported:  {reported}")


if __name__ == "__main__":
    run_script(main)
