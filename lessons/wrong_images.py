"""Every training record gets the image of another record."""

from data import ChatDataset
from lessons.experiment import measure, replaced, train, training_loss, train_baseline

MINUTES, DIFFICULTY = 6, "easy"
EXPECTED = """The training loss still falls, because the style of the captions can be learned without the
image. The held-out loss with a different image is about as high as with the correct one, because the model
ignores the image."""
MEANING = """A falling training loss does not show that the model uses the image. The model learned the
style of the captions and nothing else. Only the comparison with a different image shows this, so both
stages print it at every evaluation."""

load_pixel_values = ChatDataset.load_pixel_values


def load_another_image(self, record):
    number = int(record["id"].removeprefix("GCC_train_"))
    return load_pixel_values(self, self.records[number % len(self.records)])  # always the same other record


def run(seed):
    with replaced(ChatDataset, load_pixel_values=load_another_image):
        blind = train(1, seed, "wrong-images")
    return {name: {"training loss": training_loss(trained)} | measure(trained, different_image=True)
            for name, trained in (("baseline", train_baseline(1, seed)), ("wrong images", blind))}
