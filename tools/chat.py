"""Holds a conversation about an image in the terminal.

    python -m tools.chat --run runs/toy --image photo.jpg

    a line         is a question; the answer is printed while it is generated
    /image FILE    shows another image and begins a new conversation
    Ctrl-C         stops an answer; what was generated stays in the conversation
    Ctrl-D         ends the program, as does Ctrl-C while no answer is generated

It loads stage 2 of the run if that is finished, else stage 1. With the toy, it starts in about 5 seconds on
2 CPU cores. No file is written. Questions can also come from a pipe, one per line.

A language model remembers nothing from one call to the next. For every answer, the chat template renders the
whole conversation again, exactly like a training record of several turns (see data.py).
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from transformers import TextStreamer

from data import IMAGE_TOKEN, collate
from support.devices import DTYPES, choose_device, choose_dtype
from support.errors import UserError, run_script
from support.images import decode_image
from support.results import latest_stage, load_trained
from support.settings import POSITIVE, REAL


class RecordingStreamer(TextStreamer):
    """Prints an answer while it is generated and keeps its ids, because Ctrl-C leaves generate() without a
    result."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.ids = []

    def put(self, ids):
        self.ids += ids.flatten().tolist()
        super().put(ids)


def load_image(path, image_processor):
    """Returns an image file as (3, H, W). Raises UserError if it cannot be decoded."""
    try:
        return image_processor(decode_image(path, path), return_tensors="pt")["pixel_values"][0]
    except ValueError as error:
        raise UserError(str(error)) from error


def drop_oldest_turns(messages, template, has_image, num_image_tokens, max_tokens):
    """Returns (messages, ids of the prompt) without the oldest questions and answers, so that the prompt has
    at most `max_tokens` tokens. The last question is never dropped.

    The image is never dropped either. It stands before the first question that is left, as in training. """
    while True:
        first = f"{IMAGE_TOKEN}\n{messages[0]['content']}" if has_image else messages[0]["content"]
        ids = template.encode_prompt([{**messages[0], "content": first}, *messages[1:]], num_image_tokens)
        if len(ids) <= max_tokens or len(messages) == 1:
            return messages, ids
        messages = messages[2:]


def answer_question(model, template, device, messages, question, pixel_values, max_new_tokens, temperature):
    """Prints the answer to a question. Returns the conversation with question and answer appended, or
    unchanged if no answer was generated."""
    context = model.llm.config.get_text_config().max_position_embeddings  # of prompt and answer, in tokens
    longer = messages + [{"role": "user", "content": template.escape(question)}]
    kept, ids = drop_oldest_turns(longer, template, pixel_values is not None, model.num_image_tokens,
                                  context - min(max_new_tokens, context // 2))
    if len(kept) < len(longer):
        print(f"(The model can read {context} tokens. The oldest questions and answers were dropped: "
              f"{(len(longer) - len(kept)) // 2}.)", flush=True)
    if len(ids) >= context:
        print(f"(The model can read {context} tokens, but this prompt has {len(ids)}. Ask a shorter "
              "question.)", flush=True)
        return messages

    batch = collate([{"input_ids": ids, "pixel_values": pixel_values}], template.tokenizer.pad_token_id)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    streamer = RecordingStreamer(template.tokenizer)
    try:
        model.generate(**batch, end_token_ids=[template.end_token_id], temperature=temperature,
                       max_new_tokens=min(max_new_tokens, context - len(ids)), streamer=streamer)
    except KeyboardInterrupt:
        streamer.end()  # prints the word that it holds back, and a newline
    answer = template.escape(template.decode(streamer.ids))
    return [*kept, {"role": "assistant", "content": answer}] if answer else messages


def converse(model, template, image_processor, device, pixel_values, max_new_tokens, temperature):
    """Answers the questions on stdin until end of input or Ctrl-C.

    Args: pixel_values: the first image, (3, H, W), or None. """
    messages = []  # the conversation without <image>: [{"role", "content"}, …]
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        print("/image FILE shows another image. Ctrl-C stops an answer. Ctrl-D ends the conversation.")
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 must not end the conversation
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if at_terminal else "").strip()
            if line.split()[:1] == ["/image"]:
                path = line.removeprefix("/image").strip().strip("'\"")  # a terminal quotes a dropped file
                try:
                    pixel_values = load_image(path, image_processor)
                except UserError as error:
                    print(f"{error}. The conversation continues as before.", flush=True)
                    continue
                messages = []  # the model was trained on one image per conversation
                print(f"{path}: a new conversation", flush=True)
            elif line:
                messages = answer_question(model, template, device, messages, line, pixel_values,
                                           max_new_tokens, temperature)
    if at_terminal:
        print()  # so that the shell's prompt gets a line of its own


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: 2 if it is finished, else 1")
    parser.add_argument("--image", metavar="FILE", help="the first image (default: none)")
    parser.add_argument("--max-new-tokens", type=POSITIVE, default=128, help="longest answer in tokens")
    parser.add_argument("--temperature", type=REAL, default=0.0,
                        help="0 takes the most likely token; above 0 samples (default: 0)")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device = choose_device(args.device)
    stage = args.stage or latest_stage(args.run)
    model, template, image_processor, _ = load_trained(args.run / f"stage{stage}", device,
                                                       choose_dtype(args.precision, device))
    pixel_values = load_image(args.image, image_processor) if args.image else None
    converse(model, template, image_processor, device, pixel_values, args.max_new_tokens, args.temperature)


if __name__ == "__main__":
    run_script(main)
