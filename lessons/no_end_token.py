"""The end token after each answer is not labeled."""

from lessons.experiment import answer, labels_changed, list_questions, measure, train, train_baseline
from model import IGNORE_INDEX

EXPECTED = """Stage 2 does not train the model to stop, so it goes on after its answer."""
MEANING = """Nothing happens. The toy's LLM learned to stop in its pretraining, as a chat model does, and
the adapter does not make it forget. An LLM that has never learned to stop would need this label."""


def unlabel_end_token(template, ids, labels):
    return [IGNORE_INDEX if label == template.end_token_id else label for label in labels]


def stops(trained):
    """Returns the fraction of answers that are not longer than twice their reference answer."""
    questions = list_questions(trained.heldout_dataset)
    return sum(len(text) <= 2 * len(question.reference)
               for question, text in zip(questions, answer(trained, questions))) / len(questions)


def run(seed):
    with labels_changed(unlabel_end_token):
        changed = train(2, seed, "no-end-token", after=train_baseline(1, seed))
    return {"baseline": measure(train_baseline(2, seed)) | {"stops in time": stops(train_baseline(2, seed))},
            "end token not labeled": measure(changed) | {"stops in time": stops(changed)}}
