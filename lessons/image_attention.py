"""Every patch attends to all patches of its image, and not only to those before it. PaliGemma, Gemma 3 and
Molmo 2 do this. In LLaVA, the language model reads patches as it reads words, and each attends only to
earlier positions. Readers of LLaVA's code ask why (haotian-liu/LLaVA issue 1529). An author of BLIP-2
answers such a question with one sentence: they tried it and "found no improvement" (salesforce/LAVIS issue
393)."""

import torch
from transformers import LlamaModel

from lessons.experiment import measure, replaced, train, train_baseline
from model import Llava

MINUTES, DIFFICULTY = 12, "hard"
EXPECTED = """No gain. Each vector of CLIP has already attended to the whole image, and the question comes
after the image, so it can read all patches with either mask. In stage 1 the captions may even become worse,
because the frozen language model was pretrained with the causal mask. For the same reason, the new mask
should cost some answers if it is only used for the questions and not in the training."""
MEANING = """No difference that three seeds can show. Trained with the new mask, the model writes captions
and answers as well as before. A model that was trained with the causal mask loses two hundredths of its
captions if it gets the new mask for the questions only, and no answers. So in the toy, too, there is no
improvement, and the causal mask has the advantage that the image needs no code of its own."""

embed, forward = Llava.embed, LlamaModel.forward


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
