"""Greedy generation without a cache of keys and values.

    python -m lessons.solutions.generate

Each new token costs a pass over the whole sequence. The cached version in Llava.generate() reads the prompt
once and then one position per token. Both must choose the same tokens, because a cache only saves work.
"""

import time

import torch
import torch.nn.functional as F

from data import collate
from lessons.toy_parts import load_datasets, load_model
from support.errors import run_script


@torch.no_grad()
def generate(self, input_ids, attention_mask, pixel_values, end_token_ids, max_new_tokens=128):
    """Returns the same as Llava.generate() with temperature 0. `self` is the Llava."""
    embedding, end_token_ids = self.llm.get_input_embeddings(), torch.tensor(end_token_ids)
    inputs_embeds = self.embed(input_ids, pixel_values)  # (B, T, D), and T grows by one in each pass
    finished = torch.zeros(len(input_ids), dtype=torch.bool)  # (B,)
    answer = []
    for _ in range(max_new_tokens):
        # Each row counts its positions after its padding. Llama would give the same ids without this line,
        # because rotary embeddings depend only on differences of positions. Not every LLM has them.
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
        hidden = self.llm.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                                        position_ids=position_ids,
                                        use_cache=False).last_hidden_state  # (B, T, D)
        logits = self.llm.get_output_embeddings()(hidden[:, -1])  # (B, V)
        new_ids = logits.argmax(dim=-1).masked_fill(finished, end_token_ids[0])  # (B,)
        answer.append(new_ids)
        finished |= torch.isin(new_ids, end_token_ids)
        if finished.all():
            break
        inputs_embeds = torch.cat([inputs_embeds, embedding(new_ids)[:, None]], dim=1)  # (B, T + 1, D)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # (B, T + 1)
    return torch.stack(answer, dim=1)  # (B, number of new tokens)


def main():
    model, template = load_model()
    _, heldout_dataset = load_datasets(template, stage=1)
    # Records 0 to 3 have prompts of different lengths, so some rows have padding.
    batch = collate([heldout_dataset.make_prompt(i)[0] for i in range(4)], template.pad_token_id,
                    padding_side="left")
    assert not batch["attention_mask"].all(), "no row has padding"
    lengths = []  # of the sequences that the decoder reads
    model.llm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True)
    results = {}
    for name, function in (("with the cache", type(model).generate), ("without a cache", generate)):
        lengths.clear()
        started = time.perf_counter()
        ids = function(model, **batch, end_token_ids=[template.end_token_id], max_new_tokens=64)
        results[name] = ids, sum(lengths)
        print(f"{name}: {len(lengths)} passes over {sum(lengths)} positions per row, "
              f"{time.perf_counter() - started:.2f} s")
    (cached_ids, cached_positions), (ids, positions) = results.values()
    assert torch.equal(ids, cached_ids), "the ids differ from those of Llava.generate()"
    assert positions > 10 * cached_positions
    print(f"the {ids.numel()} ids of 4 answers are equal")


if __name__ == "__main__":
    run_script(main)
