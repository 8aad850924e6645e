"""Holds a conversation about an image in the terminal.

    python -m tools.chat --run runs/toy --image photo.jpg

    a line         is a question; the answer is printed while it is generated
    /image FILE    shows another image and begins a new conversation
    /help          lists these commands, as does every other word that begins with /
    Ctrl-C         stops an answer; what was generated stays in the conversation
    Ctrl-D, /quit  ends the program, as does Ctrl-C while no answer is generated

It loads stage 2 of the run if that is finished, else stage 1. Questions can also come from a pipe, one per
line. A language model remembers nothing from one call to the next. For every answer, the chat template
renders the whole conversation again, exactly like a training record of several turns (see data.py).
"""

import argparse
import os
import re
import sys
from contextlib import suppress

from data import IMAGE_TOKEN
from support.errors import UserError, printable, run_script
from support.answers import AnswerPrinter, stream_answer
from support.pretrained import load_image
from support.settings import FLOAT_FROM_0, INT_FROM_1, add_run_flags
from support.trained import load_run

COMMANDS = "/image FILE shows another image, /quit or Ctrl-D ends the conversation, Ctrl-C stops an answer."


def read_path(text):
    """Returns a file name that was typed, or dropped on the terminal, which then quotes or escapes it."""
    path = text.strip("'\" ")
    return os.path.expanduser(path if os.name == "nt" else re.sub(r"\\(.)", r"\1", path))


def drop_oldest_turns(messages, template, has_image, max_tokens):
    """Returns (messages, ids of the prompt) without the oldest questions and answers, so that the prompt has
    at most `max_tokens` tokens. The last question and the image, which stands before the first question that
    is left, are never dropped."""
    while True:
        first = f"{IMAGE_TOKEN}\n{messages[0]['content']}" if has_image else messages[0]["content"]
        ids = template.encode_prompt([{**messages[0], "content": first}, *messages[1:]])
        if len(ids) <= max_tokens or len(messages) == 1:
            return messages, ids
        messages = messages[2:]


def answer_question(model, template, messages, question, pixel_values, max_new_tokens, temperature):
    """Prints the answer to a question. Returns the conversation with question and answer appended, or
    unchanged if no answer was generated."""
    context = template.context_length
    longer = messages + [{"role": "user", "content": template.escape(question)}]
    kept, ids = drop_oldest_turns(longer, template, pixel_values is not None,
                                  context - min(max_new_tokens, context // 2))
    if len(kept) < len(longer):
        print(f"(The model can read {context} tokens. The oldest questions and answers were dropped: "
              f"{(len(longer) - len(kept)) // 2}.)", flush=True)
    printer = AnswerPrinter(template)
    try:
        stream_answer(model, template, {"input_ids": ids, "pixel_values": pixel_values}, printer,
                     max_new_tokens, temperature)
    except KeyboardInterrupt:
        printer.end()  # prints what it holds back, and a newline
    except UserError as error:
        print(f"({error}.)", flush=True)
        return messages
    answer = template.escape(template.decode(printer.ids))
    return [*kept, {"role": "assistant", "content": answer}] if answer else messages


def converse(model, template, image_processor, pixel_values, max_new_tokens, temperature):
    """Answers the questions on stdin until end of input or Ctrl-C. pixel_values: (3, S, S), or None."""
    messages = []  # the conversation without <image>: [{"role", "content"}, …]
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        print(COMMANDS)
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its arrow keys
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            # A question that is copied from training data may contain <image>. Training removes it, too.
            line = input("> " if at_terminal else "").replace(IMAGE_TOKEN, "").strip()
            command, _, rest = line.partition(" ")
            if command == "/quit":
                break
            if command == "/image" and rest:
                path = read_path(rest)
                try:
                    pixel_values = load_image(path, image_processor)
                except UserError as error:
                    print(f"{error}. The conversation continues as before.", flush=True)
                    continue
                messages = []  # the model was trained on one image per conversation
                print(f"{printable(path)}: a new conversation", flush=True)
            elif command.startswith("/"):
                print(COMMANDS, flush=True)
            elif line:
                messages = answer_question(model, template, messages, line, pixel_values, max_new_tokens,
                                           temperature)
    if at_terminal:
        print()  # so that the shell's prompt gets a line of its own


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.chat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    parser.add_argument("--image", metavar="FILE", help="the first image (default: none)")
    parser.add_argument("--max-new-tokens", type=INT_FROM_1, default=128, help="longest answer in tokens")
    parser.add_argument("--temperature", type=FLOAT_FROM_0, default=0.0,
                        help="0 takes the most likely token; above 0 samples (default: 0)")
    args = parser.parse_args()
    model, template, image_processor, _ = load_run(args)
    pixel_values = load_image(args.image, image_processor) if args.image else None
    converse(model, template, image_processor, pixel_values, args.max_new_tokens, args.temperature)


if __name__ == "__main__":
    run_script(main)
