"""Answers that a person reads, printed while they are generated."""

from transformers import TextStreamer

from support.errors import UserError, printable
from support.evaluation import prompt_batch


class AnswerPrinter(TextStreamer):
    """Prints the text of an answer word by word while Llava.generate() passes on its ids, and keeps them."""

    def __init__(self, template):
        super().__init__(template.tokenizer, skip_special_tokens=True)
        self.ids = []

    def put(self, value):
        self.ids += value.tolist()
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        print(printable(text, keep="\n"), end="\n" if stream_end else "", flush=True)


def stream_answer(model, template, prompt, printer, max_new_tokens, temperature=0.0):
    """Lets an AnswerPrinter print the answer to one prompt. Raises UserError if the prompt is too long."""
    length, context = len(prompt["input_ids"]), template.context_length
    if length >= context:
        raise UserError(f"the prompt has {length} tokens, but the LLM can read only {context} tokens, answer "
                        "included: ask a shorter question")
    model.generate(**prompt_batch(template, [prompt], model.llm.device), end_token_ids=template.end_token_ids,
                   max_new_tokens=min(max_new_tokens, context - length), temperature=temperature,
                   streamer=printer)
