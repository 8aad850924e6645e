"""Every patch attends to all patches of its image, and not only to those before it, as in PaliGemma, Gemma 3
and Molmo 2. In LLaVA, the language model reads patches as it reads words, so each attends only to earlier
positions. Readers of LLaVA's code ask why (haotian-liu/LLaVA issue 1529). An author of BLIP-2, who was asked
a similar question, answered in one sentence that they had tried it and "found no improvement"
(salesforce/LAVIS issue 393)."""

import torch
from transformers import LlamaModel

from lessons.experiment import measure, replaced, train, train_baseline
from model import Llava

MINUTES, DIFFICULTY, CHANGE = 12, "hard", ["allowed_attention"]
EXPECTED = """There is no gain. CLIP's vectors have already attended to the whole image, and the question
comes after the image, so it can read every patch with either mask. In stage 1, the captions may even get
worse, because the frozen language model was pretrained with the causal mask. For the same reason, a model
that is trained with the causal mask should lose some answers if only the questions get the new one."""
MEANING = """Training with the new mask changes the scores by less than the seeds differ. If the causal model
gets it only for the questions, the captions lose a little with every seed, from 0.85 to 0.83 on average, and
the answers stay at 0.88. So the toy shows no improvement either, and the causal mask is simpler."""

embed, forward = Llava.embed, LlamaModel.forward


# The language model gets this mask instead of its causal one.
def allowed_attention(is_image, attention_mask=None):
    """Returns which position (row) may attend to which (column): (B, T) -> (B, 1, T, T) bool."""
    length = is_image.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=is_image.device).tril()  # (T, T)
    # A record has at most one image, so all image positions of a row belong together.
    allowed = causal | (is_image[:, :, None] & is_image[:, None, :])  # (B, T, T)
    if attention_mask is not None:  # from generate(), which pads on the left
        allowed &= attention_mask[:, None, :]
    return allowed[:, None]  # the same for all heads


def remembering_embed(self, input_ids, pixel_values):
    self.llm.get_decoder().is_image = input_ids == self.image_token_id  # (B, T)
    return embed(self, input_ids, pixel_values)


def forward_with_mask(self, *args, **named):
    inputs_embeds = named.get("inputs_embeds")
    # Only the first pass of generate() reads the image. Each later pass reads one new token, which attends to
    # all positions before it, with either mask.
    if inputs_embeds is not None and inputs_embeds.shape[1] > 1:
        named["attention_mask"] = allowed_attention(self.is_image, named.get("attention_mask"))
    return forward(self, *args, **named)


def run(seed):
    def measure_both(stage1, stage2):
        return {"captions": measure(stage1)["captions"]} | measure(stage2)

    causal = train_baseline(1, seed), train_baseline(2, seed)  # before anything is replaced
    results = {"causal (baseline)": measure_both(*causal)}
    with replaced(Llava, embed=remembering_embed), replaced(LlamaModel, forward=forward_with_mask):
        results["bidirectional for the questions only"] = measure_both(*causal)
        stage1 = train(1, seed, "image-attention")
        results["bidirectional"] = measure_both(stage1, train(2, seed, "image-attention", after=stage1))
    return results
