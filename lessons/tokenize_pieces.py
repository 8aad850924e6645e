"""Each question and each answer is tokenized alone, and the pieces are joined."""

from data import ChatTemplate
from lessons.experiment import measure, replaced, train, train_baseline
from model import IGNORE_INDEX

MINUTES, DIFFICULTY, CHANGE = 8, "medium", ["encode_in_pieces"]
EXPECTED = """The tokenizer puts an extra space token in front of each answer that is tokenized alone, and the
model learns to write it. The held-out answers do not have this token, so they become less likely. Between two
turns, the newline is lost and the next question begins with an extra space token. The model reads this change
but does not learn to write it, because only answers are labeled."""
MEANING = """The answers are only a little worse, because the extra space token is invisible in the text. The
loss of correctly tokenized answers reveals the damage: their first token has become almost impossible. So
when you check a sample, look at its token ids and not only at its text."""


# Replaces ChatTemplate.encode_record.
def encode_in_pieces(template, record, max_length):
    messages, ids, labels = template.to_messages(record), [], []
    for question, reply in zip(messages[::2], messages[1::2]):
        prompt = template.encode_prompt([question])
        prompt = prompt[1:] if ids else prompt  # <s> only at the start
        pieces = template.tokenizer(reply["content"], add_special_tokens=False)["input_ids"]
        pieces.append(template.end_token_id)
        ids += prompt + pieces
        labels += [IGNORE_INDEX] * len(prompt) + pieces
    return ids, labels


def run(seed):
    after = train_baseline(1, seed)  # before anything is replaced
    with replaced(ChatTemplate, encode_record=encode_in_pieces):
        pieces = train(2, seed, "pieces", after=after)
    return {"baseline": measure(train_baseline(2, seed)), "tokenized in pieces": measure(pieces)}
