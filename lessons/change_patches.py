"""Image features are erased, copied from another picture, or shuffled, before the LLM reads them."""

import json

import torch

from lessons.experiment import answer, list_questions, replaced, train
from model import Llava
from tools.page import mean_feature
from toy.world import DATA, PLACES, answer_to, objects_in

EXPECTED = """Erasing the patch that a question asks about changes the answer. Erasing another one does not.
A copied patch is named. Shuffling changes little if the place is in the vector."""
MEANING = ""

encode_images = Llava.encode_images


def run(seed):
    # A longer stage 1 than in the other lessons, because only correct answers can be made wrong.
    trained = train(2, seed, "long", after=train(1, seed, "long", max_steps=376))
    dataset, model = trained.heldout_dataset, trained.model
    # The captions list all objects of a picture, so they are the scenes: {image: {place: (color, shape)}}
    scenes = {record["image"]: {place: (color, shape) for color, shape, place in
                                objects_in(record["conversations"][1]["value"])}
              for record in json.loads((DATA / "heldout_chat.json").read_text())}
    # Only questions such as "What is at the top left?", about an object, that the model answers correctly.
    questions = [q for q in list_questions(dataset) if q.kind == "what_at" and q.reference != "Nothing."]
    questions = [q for q, text in zip(questions, answer(trained, questions)) if text == q.reference]
    images = [dataset.records.image_name(dataset.records[q.record]) for q in questions]
    asked = [next(i for i, place in enumerate(PLACES) if q.text.endswith(f"{place}?")) for q in questions]
    other = [next(i for i, place in enumerate(PLACES) if place in scenes[image] and i != cell)
             for image, cell in zip(images, asked)]
    with torch.no_grad():
        mean = mean_feature(model, dataset, model.llm.device)
        pixels = [dataset.load_pixel_values(dataset.records[q.record]) for q in questions]
        features = model.encode_images(torch.stack(pixels).to(model.llm.device))  # (questions, N, D)
    rows = torch.arange(len(questions))

    def erased(cells):
        changed = features.clone()
        changed[rows, cells] = mean
        return changed

    # The same cell of another picture, the next one with an object there.
    sources = [next(j % len(images) for j in range(i + 1, i + len(images))
                    if PLACES[cell] in scenes[images[j % len(images)]]) for i, cell in enumerate(asked)]
    copied = features.clone()
    copied[rows, asked] = features[sources, asked]
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
    without = answers(erased(asked))
    return {
        "patch asked about erased": {"still right": fraction_equal(without, references),
                                     "“Nothing.”": fraction_equal(without, ["Nothing."] * len(questions))},
        "another object's patch erased": {"still right": fraction_equal(answers(erased(other)), references)},
        "patch copied from another picture": {"names what was copied": fraction_equal(
            answers(copied), [answer_to(scenes[images[source]], q.text)
                              for source, q in zip(sources, questions)])},
        "all patches shuffled": {"still right": fraction_equal(answers(shuffled), references)}}
