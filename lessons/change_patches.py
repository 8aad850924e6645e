"""Image features are erased, copied from another picture, or shuffled before the LLM reads them. Only
questions that the model answers correctly with the unchanged features count, about 65 of them per seed."""

import json

import torch

from lessons.experiment import answer, list_questions, replaced, train
from model import Llava
from support.records import image_name
from tools.page import mean_feature
from toy.world import DATA, PLACES, answer_to, objects_in

MINUTES, DIFFICULTY, CHANGE = 8, "medium", ["replace_patches"]
EXPECTED = """Erasing the patch that a question asks about changes the answer, while erasing another one does
not. After copying, the answer names the object in the copied patch. Shuffling changes few answers if the
model reads a patch's place from its vector and not from its position in the sequence."""
MEASURES = """All columns are fractions of the answers after the change. An erased patch has the mean feature
of held-out images. Stage 1 takes 376 steps here instead of 250."""
MEANING = """If the patch in question is erased, no answer is right, whereas every answer stays right if
another object's patch is erased. The model mostly reads an erased patch as an empty cell ("Nothing."), and it
reads a copied patch as if it belonged to the picture. Shuffling changes few answers, so the model reads the
place mostly from the vector and hardly from the order."""

STAGE1_STEPS = 376  # more than in the other lessons, because only correct answers can be made wrong


def replace_patches(features, cells, vectors):
    """Returns the features, (questions, N, D), with patch cells[i] of question i replaced by vectors[i], or
    by the same vector for all questions."""
    changed = features.clone()
    changed[torch.arange(len(features)), cells] = vectors
    return changed


def run(seed):
    trained = train(2, seed, "long", after=train(1, seed, "long", max_steps=STAGE1_STEPS))
    dataset, model = trained.heldout_dataset, trained.model
    # A caption lists all objects of its picture, so it gives the scene: {image: {place: (color, shape)}}
    scenes = {record["image"]: {place: (color, shape) for color, shape, place in
                                objects_in(record["conversations"][1]["value"])}
              for record in json.loads((DATA / "heldout_chat.json").read_text())}
    # Only questions such as "What is at the top left?" that ask about an object and are answered correctly.
    questions = [q for q in list_questions(dataset) if q.kind == "what_at" and q.reference != "Nothing."]
    questions = [q for q, text in zip(questions, answer(trained, questions)) if text == q.reference]
    images = [image_name(dataset.records[q.record]) for q in questions]
    # For each question, the patch that it asks about, and the patch of another object.
    asked = [next(i for i, place in enumerate(PLACES) if q.text.endswith(f"{place}?")) for q in questions]
    other = [next(i for i, place in enumerate(PLACES) if place in scenes[image] and i != cell)
             for image, cell in zip(images, asked)]
    with torch.no_grad():
        mean = mean_feature(model, dataset, model.llm.device)
        pixels = [dataset.load_pixel_values(dataset.records[q.record]) for q in questions]
        features = model.encode_images(torch.stack(pixels).to(model.llm.device))  # (questions, N, D)

    # sources[i] is the next question whose picture has an object in the cell that question i asks about. If
    # there is no other one, it is i itself.
    sources = [next(j % len(images) for j in range(i + 1, i + len(images) + 1)
                    if PLACES[cell] in scenes[images[j % len(images)]]) for i, cell in enumerate(asked)]
    copied = replace_patches(features, asked, features[sources, asked])
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([f[torch.randperm(len(f), generator=generator)] for f in features])

    def answers(changed):
        """Returns the answers to all questions with the changed features."""
        batches = iter(changed.split(60))
        with replaced(Llava, encode_images=lambda self, pixel_values: next(batches)):
            return answer(trained, questions)

    def fraction_equal(texts, references):
        return sum(text == reference for text, reference in zip(texts, references)) / len(questions)

    references = [q.reference for q in questions]
    without = answers(replace_patches(features, asked, mean))
    return {
        "patch asked about erased": {"still right": fraction_equal(without, references),
                                     "“Nothing.”": fraction_equal(without, ["Nothing."] * len(questions))},
        "another object's patch erased": {"still right": fraction_equal(
            answers(replace_patches(features, other, mean)), references)},
        "patch copied from another picture": {"names what was copied": fraction_equal(
            answers(copied), [answer_to(scenes[images[source]], q.text)
                              for source, q in zip(sources, questions)])},
        "all patches shuffled": {"still right": fraction_equal(answers(shuffled), references)}}
