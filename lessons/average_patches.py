"""Neighboring patches are averaged, so that each becomes the mean of its row or of the whole image."""

from lessons.experiment import measure, replaced, train, train_baseline
from model import Llava

MINUTES, DIFFICULTY, CHANGE = 10, "medium", ["mean_of_rows", "mean_of_image"]
EXPECTED = """The captions get worse. If a row shows one object, its mean still contains that object and its
place, but if it shows two, the model has to take apart the sum of two vectors."""
MEANING = """The captions get much worse. With row means they still name some objects and their places, while
with the mean of the whole image they get almost none right. One reason is peculiar to the toy: in its
pretraining, the LLM read vectors with at most one object each, and never their mean."""

encode_images = Llava.encode_images


# This or mean_of_image() replaces Llava.encode_images.
def mean_of_rows(self, pixel_values):
    features = encode_images(self, pixel_values).unflatten(1, (3, 3))  # (I, 9, D) -> (I, 3, 3, D)
    means = features.mean(dim=2, keepdim=True)  # (I, 3, 1, D)
    return means.expand_as(features).flatten(1, 2)  # (I, 3, 3, D) -> (I, 9, D)


def mean_of_image(self, pixel_values):
    features = encode_images(self, pixel_values)  # (I, 9, D)
    return features.mean(dim=1, keepdim=True).expand_as(features)  # (I, 1, D) -> (I, 9, D)


def run(seed):
    results = {"9 patches (baseline)": measure(train_baseline(1, seed))}
    for name, function in (("3 row means", mean_of_rows), ("1 mean", mean_of_image)):
        with replaced(Llava, encode_images=function):
            results[name] = measure(train(1, seed, name.replace(" ", "-")))
    return results
