"""The first N of CLIP's 1 + N vectors are kept, so the class token stays and the last patch is lost."""

import torch

from lessons.experiment import answer, list_questions, measure, replaced, train, train_baseline
from model import Llava
from toy.world import objects_in

MINUTES, DIFFICULTY, CHANGE = 6, "easy", ["encode_images"]
EXPECTED = """Every patch comes one position late, and the bottom right patch is gone, so the captions cannot
name the objects there. The other objects are named as often as before if the model reads a patch's place
from its vector and not from its position in the sequence."""
MEASURES = """The captions name these fractions of the objects at the bottom right and of those elsewhere."""
MEANING = """Without a baseline, a score of 0.70 would not look suspicious. The scores by place reveal the
bug, because hardly any object at the bottom right is found. Objects elsewhere are found a little less often,
too. We think the reason is that every patch now comes one position late, while in 60% of the toy LLM's
pretraining examples with vectors, the vectors came in the order of the places."""


# Replaces Llava.encode_images, which keeps the last N vectors.
def encode_images(self, pixel_values):
    with torch.no_grad():
        z_v = self.vision_tower(pixel_values).last_hidden_state  # (I, 1 + N, D_v)
    return self.projector(z_v[:, :self.num_image_tokens])  # (I, N, D)


def recall(trained, bottom_right):
    """Returns the fraction of the objects at the bottom right (or of all others) that the captions name."""
    questions, found = list_questions(trained.heldout_dataset), []
    for question, caption in zip(questions, answer(trained, questions)):
        found += [thing in objects_in(caption) for thing in objects_in(question.reference)
                  if (thing[2] == "bottom right") == bottom_right]
    return sum(found) / len(found)


def run(seed):
    def measure_cells(trained):
        return measure(trained) | {"found at the bottom right": recall(trained, True),
                                   "found elsewhere": recall(trained, False)}

    with replaced(Llava, encode_images=encode_images):
        off_by_one = measure_cells(train(1, seed, "class-token"))
    return {"baseline": measure_cells(train_baseline(1, seed)),
            "class token kept, last patch lost": off_by_one}
