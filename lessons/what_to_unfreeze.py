"""Stage 2 trains other components of the model. The paper trains the projector and the whole language model,
whereas this project trains the projector and an adapter. Papers disagree about the vision tower: Prismatic
VLMs (arXiv:2402.07865) find that training it "significantly degrades performance", and TinyLLaVA
(arXiv:2402.14289, section 4.2.2) finds that training a part of it helps small language models, "contrary to"
Prismatic's result."""

from contextlib import contextmanager

import torch

from lessons.experiment import measure, replaced, train, train_baseline
from model import Llava

MINUTES, DIFFICULTY, CHANGE = 20, "medium", ["train_outer_blocks", "train_all_of_the_llm"]
EXPECTED = """The more of the language model is trained, the more answers are correct after the same number of
steps, and the more of the captions are forgotten, because stage 2 only asks questions. With the projector
alone, the language model cannot learn the new kind of question, "Is there a shape at the top left?". Training
CLIP gains nothing in the toy, because its features already show color, shape and place, and a high learning
rate can spoil them."""
MEASURES = """The captions are measured after stage 2, except in the first row. All trained parameters are
counted, and each takes 12 bytes in fp32 for its gradient and AdamW's two numbers."""
MEANING = """The projector alone gains little, because the language model itself has to learn the new kind of
question. If two of its four blocks are trained, or all of it, it learns more in 50 steps than with LoRA. We
did not measure why, but LoRA starts at zero and has less than half as many weights, with the same learning
rate. Training the whole language model also makes it forget a little more of the captions.

Training half of CLIP gains nothing here. With the adapter's learning rate, it changes the features that the
projector has learned to read, and the captions fall from 0.85 to 0.33, which agrees with Prismatic. The toy
cannot show the gain that TinyLLaVA found, because its CLIP already shows color, shape and place."""

add_lora, AdamW = Llava.add_lora, torch.optim.AdamW


# Each of these functions replaces Llava.add_lora. The stage trains the projector in any case. It does not
# save the other weights that they unfreeze, so these exist only in memory.
def train_outer_blocks(self, config):
    blocks = self.llm.get_decoder().layers
    blocks[0].requires_grad_(True)
    blocks[-1].requires_grad_(True)


def train_all_of_the_llm(self, config):
    self.llm.requires_grad_(True)


def train_nothing_else(self, config):
    pass


@contextmanager
def clip_is_trained(lr):
    """In this context, stage 2 trains LoRA, the projector and, with its own learning rate, half of CLIP."""
    upper_half = []

    def add_lora_with_clip(self, config):
        add_lora(self, config)
        blocks = self.vision_tower.encoder.layers
        upper_half.extend(blocks[len(blocks) // 2:].requires_grad_(True))  # two of the toy's three

    def encode_images(self, pixel_values):  # as in model.py, but with a gradient for CLIP
        z_v = self.vision_tower(pixel_values).last_hidden_state[:, -self.num_image_tokens:]  # (I, N, D_v)
        return self.projector(z_v)  # (I, N, D)

    def make_optimizer(groups, **settings):
        clip = {"params": [p for block in upper_half for p in block.parameters()], "peak_lr": lr}
        return AdamW([*groups, clip], **settings)

    with replaced(Llava, add_lora=add_lora_with_clip, encode_images=encode_images), \
            replaced(torch.optim, AdamW=make_optimizer):
        yield


def run(seed):
    before, lora = train_baseline(1, seed), train_baseline(2, seed)
    trained = {"before stage 2": before._replace(stage=2, heldout_dataset=lora.heldout_dataset)}
    for name, function in (("projector alone", train_nothing_else),
                           ("first and last block of the LLM", train_outer_blocks)):
        with replaced(Llava, add_lora=function):
            trained[name] = train(2, seed, name.replace(" ", "-"), before)
    trained["LoRA (baseline)"] = lora
    with replaced(Llava, add_lora=train_all_of_the_llm):
        trained["all of the LLM"] = train(2, seed, "all-of-the-llm", before)
    for lr in ("1e-4", "1.5e-3"):  # the second is that of the adapter
        with clip_is_trained(float(lr)):
            trained[f"LoRA, and half of CLIP with lr {lr}"] = train(2, seed, f"clip-{lr}", before)

    results = {}
    for name, each in trained.items():
        # Both stages have the same held-out pictures: stage 1 asks for captions, stage 2 asks questions.
        captions = measure(each._replace(stage=1, heldout_dataset=before.heldout_dataset))["captions"]
        count = sum(parameter.numel() for parameter in each.model.trainable_parameters().values())
        results[name] = measure(each) | {"captions": captions, "thousand trained parameters": count / 1000}
    return results
