"""Answers that a person reads: printed while they are generated, and how sure the model is of each token."""

import torch
from transformers import TextStreamer

from support.errors import UserError, printable
from support.evaluation import prompt_batch, token_text


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


@torch.no_grad()
def token_probabilities(model, template, prompt, answer_ids):
    """Returns how sure the model is of each token of an answer, as a list of tuples: the token's text, its
    probability, and text and probability of the most likely other token.

    One pass over prompt and answer computes them all, because in a causal model the output at position t - 1,
    which predicts token t, does not depend on what follows.
    """
    batch = prompt_batch(template, [prompt], model.llm.device)
    answer = torch.tensor([answer_ids], device=model.llm.device)  # (1, A)
    input_ids = torch.cat([batch["input_ids"], answer], dim=1)  # (1, T + A)
    embeds = model.embed(input_ids, batch["pixel_values"])  # (1, T + A, D)
    hidden = model.llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.llm.get_output_embeddings()(hidden[0, -answer.shape[1] - 1:-1])  # (A, D) -> (A, V)
    probabilities = logits.float().softmax(dim=-1)
    rows = []
    for i, row in zip(answer_ids, probabilities):  # row: (V,)
        p = row[i].item()
        row[i] = -1  # so that max() finds another token
        rows.append((token_text(template, i), p, token_text(template, int(row.argmax())), row.max().item()))
    return rows
