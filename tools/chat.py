"""A conversation in the terminal: python sanity_check.py --chat [--image photo.jpg]

    a line         is a question; the answer is written word by word
    /image PATH    takes another picture, and begins a new conversation
    Ctrl-C         while an answer is being written: stops it; what was said up to there stays in the
                   conversation, so that "go on" means something. At the prompt: leaves, like Ctrl-D

A language model remembers nothing from one call to the next. What looks like memory is the conversation so
far, rendered by the chat template and read again from its first word for every answer: just what a training
record of several turns looks like (see data.py).
"""

import sys
from contextlib import suppress

from transformers import TextStreamer

from data import IMAGE_TOKEN, collate
from pictures import read_picture
from plumbing import UserError


def converse(model, template, image_processor, device, image=None, max_new_tokens=128):
    """Reads questions from stdin, line by line, and answers until they end. Returns; never raises at Ctrl-C.

    image: path of the first picture; None: text alone, until /image brings one.
    """
    pixel_values = image_processor(read_picture(image)) if image else None
    messages = []  # the conversation: [{"role", "content"}, …], user and assistant in turn, without <image>
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        print("A line is a question. /image PATH: another picture. Ctrl-C: stop the answer. Ctrl-D: leave.")
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a stray byte in a pipe is no reason to end the conversation
    try:
        while True:
            line = input("> " if at_terminal else "").strip()
            if line.split()[:1] == ["/image"]:
                path = line.removeprefix("/image").strip().strip("'\"")  # a dropped file comes in quotes
                try:
                    pixel_values = image_processor(read_picture(path))
                except UserError as error:
                    print(f"{error}; the conversation goes on as it was", flush=True)
                    continue
                # The words so far are about another picture, and the model was trained on one a conversation.
                messages = []
                print(f"{path}: a new conversation", flush=True)
            elif line:
                messages = reply(model, template, device, messages, line, pixel_values, max_new_tokens)
    except (EOFError, KeyboardInterrupt):
        if at_terminal:
            print()  # the shell's prompt should start on a line of its own


def reply(model, template, device, messages, question, pixel_values, max_new_tokens):
    """Answers one question, word by word on stdout → the messages with both, or as they were if nothing was
    said."""
    limit = model.llm.config.get_text_config().max_position_embeddings
    # What somebody types is text: plain() sees to it that "</s>" in it does not end anything.
    asked = messages + [{"role": "user", "content": template.plain(question)}]
    asked, input_ids = fit(asked, template, pixel_values is not None, model.num_image_tokens,
                           limit - min(max_new_tokens, limit // 2))
    if len(asked) < len(messages) + 1:
        print(f"(the model reads {limit} tokens at most: it no longer knows the first "
              f"{(len(messages) + 1 - len(asked)) // 2} questions and answers)", flush=True)
    if len(input_ids) >= limit:
        print(f"(that is {len(input_ids)} tokens, and the model reads {limit} at most: ask in fewer words)",
              flush=True)
        return messages

    batch = collate([{"input_ids": input_ids, "pixel_values": pixel_values}], template.tokenizer.pad_token_id)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    writer = Writer(template.tokenizer, skip_special_tokens=True)
    try:
        model.generate(**batch, end_token_ids=[template.end_token_id], streamer=writer,
                       max_new_tokens=min(max_new_tokens, limit - len(input_ids)))
    except KeyboardInterrupt:
        writer.end()  # writes the word that it was holding back, and ends the line
    said = template.plain(template.decode(writer.ids))
    return asked + [{"role": "assistant", "content": said}] if said else messages


def fit(messages, template, has_image, num_image_tokens, room):
    """(messages, ids of the prompt): the oldest questions and answers are left out until `room` is enough.

    The image belongs to the conversation, not to a turn of it: it stands before the first question that is
    left, which is where training had it. Forgetting the oldest words must not blind the model.
    """
    while True:
        shown = [dict(message) for message in messages]
        if has_image:
            shown[0]["content"] = f"{IMAGE_TOKEN}\n{shown[0]['content']}"
        input_ids = template.encode_prompt(shown, num_image_tokens)
        if len(input_ids) <= room or len(messages) == 1:
            return messages, input_ids
        messages = messages[2:]


class Writer(TextStreamer):
    """Writes words as they come, and keeps their ids: an answer that is stopped returns none."""

    def __init__(self, tokenizer, **decoding):
        super().__init__(tokenizer, **decoding)
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()
        super().put(value)
