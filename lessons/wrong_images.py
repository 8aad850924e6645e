"""Every training record gets the image of another record."""

from data import ChatDataset
from lessons.experiment import measure, replaced, train, training_loss, train_baseline

MINUTES, DIFFICULTY, CHANGE = 6, "easy", ["load_another_image"]
EXPECTED = """The training loss still falls, because the style of the captions can be learned without the
image. Since the model then ignores the image, its held-out loss is about as high with a different image as
with the correct one."""
MEASURES = """The "training loss" is the mean of the last five logged steps, and every fifth step is logged.
In the last column, each held-out caption is scored with a different image."""
MEANING = """The model learned the style of the captions and nothing else. A falling training loss cannot tell
you this, but the comparison with a different image can, so both stages print it at every evaluation."""

load_pixel_values = ChatDataset.load_pixel_values


# Replaces ChatDataset.load_pixel_values.
def load_another_image(self, record):
    number = int(record["id"].removeprefix("GCC_train_"))
    return load_pixel_values(self, self.records[number % len(self.records)])  # always the same other record


def run(seed):
    with replaced(ChatDataset, load_pixel_values=load_another_image):
        blind = train(1, seed, "wrong-images")
    return {name: {"training loss": training_loss(trained)} | measure(trained, different_image=True)
            for name, trained in (("baseline", train_baseline(1, seed)), ("wrong images", blind))}
