"""Stage 2 computes the loss on more than the answers. One run labels all text, including questions, role
markers and newlines, and the other labels the answers and the padding."""

import stage2_instruct
from data import collate
from lessons.experiment import labels_changed, measure, replaced, train, train_baseline
from model import IGNORE_INDEX

MINUTES, DIFFICULTY, CHANGE = 10, "medium", ["label_all_text", "collate_with_labeled_padding"]
EXPECTED = """The answers get somewhat worse, because a part of every gradient comes from tokens outside of
them. The model never has to write a question, and padding is easy to predict after its first token."""
MEANING = """Labels on all text do no harm here and even help a little, perhaps because each step then has
more labeled tokens about places and colors. Labels on the padding cost a little. The paper trains on the
answers only."""


# Makes the labels of a record, in place of ChatTemplate.encode_record.
def label_all_text(template, ids, labels):
    return [IGNORE_INDEX if i == template.image_token_id else i for i in ids]


# Replaces collate in the second run.
def collate_with_labeled_padding(samples, pad_token_id):
    batch = collate(samples, pad_token_id)
    batch["labels"] = batch["labels"].masked_fill(~batch["attention_mask"], pad_token_id)
    return batch


def run(seed):
    after = train_baseline(1, seed)  # before anything is replaced
    with labels_changed(label_all_text):
        questions = train(2, seed, "label-questions", after=after)
    with replaced(stage2_instruct, collate=collate_with_labeled_padding):
        padding = train(2, seed, "label-padding", after=after)
    return {"baseline": measure(train_baseline(2, seed)), "loss on all text": measure(questions),
            "loss on padding too": measure(padding)}
