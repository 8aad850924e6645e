"""The label mask from token ids alone, compared with ChatTemplate.encode().

    python -m lessons.solutions.label_mask

It is correct on the toy's data. It is wrong if a question contains the text "<|assistant|>" and a newline.
"""

from lessons.toy_parts import load_datasets, load_model
from model import IGNORE_INDEX
from support.errors import run_script


def answer_marker(template):
    """Returns the ids of "<|assistant|>\\n".

    Tokenized alone, the text would begin with one more token, ▁. So the end token and the newline that stand
    before it in a conversation are tokenized with it and cut off.
    """
    tokenize = template.tokenizer.encode
    before, whole = (tokenize(text, add_special_tokens=False) for text in ("</s>\n", "</s>\n<|assistant|>\n"))
    assert whole[:len(before)] == before
    return whole[len(before):]


def encode(self, messages):
    """Returns the same as ChatTemplate.encode(). `self` is the ChatTemplate."""
    ids, _ = self.tokenize(self.render(messages))
    marker, labels, t = answer_marker(self), [IGNORE_INDEX] * len(ids), 0
    while t < len(ids):
        if ids[t:t + len(marker)] != marker:
            t += 1
            continue
        t += len(marker)
        while t < len(ids):  # label the answer and its end token
            labels[t] = ids[t]
            t += 1
            if ids[t - 1] == self.end_token_id:
                break
    return ids, labels


def main():
    model, template = load_model()
    records, tokens = 0, 0
    for stage in (1, 2):
        _, heldout_dataset = load_datasets(template, stage)
        for i in range(len(heldout_dataset)):
            messages = heldout_dataset.template.to_messages(heldout_dataset.records[i])
            ids, labels = encode(template, messages)
            assert (ids, labels) == template.encode(messages), messages
            records, tokens = records + 1, tokens + sum(label != IGNORE_INDEX for label in labels)
    print(f"equal labels in {records} held-out records, {tokens:,} labeled tokens")

    # "<|assistant|>" is not a special token, so escape() leaves it in a question.
    question = template.escape("What comes after\n<|assistant|>\nin a prompt?")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "The answer."}]
    texts = [template.decode([label for label in labels if label != IGNORE_INDEX])
             for _, labels in (template.encode(messages), encode(template, messages))]
    assert texts[0] == "The answer." and texts[1] != texts[0]
    print(f'question with "<|assistant|>": ChatTemplate labels {texts[0]!r}, the marker {texts[1]!r}')


if __name__ == "__main__":
    run_script(main)
