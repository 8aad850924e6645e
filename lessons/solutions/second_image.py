"""Two images in one prompt.

    python -m lessons.solutions.second_image

Llava.embed() needs no change. It fills the image positions of the whole batch in order, so it does not matter
how many of them a sample has.
"""

import torch

from data import ChatTemplate, collate
from lessons.toy_parts import PRESETS, load_datasets, load_model
from support.errors import run_script


class ManyImagesTemplate(ChatTemplate):
    """Expands every <image> of a text. ChatTemplate expands only the first."""

    def __init__(self, llm, num_image_tokens):
        super().__init__(llm, num_image_tokens=1)  # one position per <image>
        self.positions_per_image = num_image_tokens

    def tokenize(self, text):
        ids, offsets = super().tokenize(text)
        pairs = [pair for pair in zip(ids, offsets)
                 for _ in range(self.positions_per_image if pair[0] == self.image_token_id else 1)]
        return [token for token, _ in pairs], [offset for _, offset in pairs]


def collate_many_images(samples, pad_token_id):
    """Returns a batch. Each sample's pixel_values has the shape (its images, 3, S, S)."""
    batch = collate([{**sample, "pixel_values": None} for sample in samples], pad_token_id)
    batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])  # (I, 3, S, S)
    del batch["skipped"]
    return batch


def main():
    model, one_image_template = load_model()
    template = ManyImagesTemplate(PRESETS[1]["llm"], model.num_image_tokens)
    _, heldout_dataset = load_datasets(template, stage=1)
    images = torch.stack([heldout_dataset[i]["pixel_values"] for i in (0, 1)])  # (2, 3, S, S)
    # to_messages() allows only one image per record, so the messages are written by hand.
    messages = [{"role": "user", "content": "<image>\n<image>\nHow many shapes are there?"},
                {"role": "assistant", "content": "There are four."}]

    def make_batch(template, images):
        ids, labels = template.encode(messages)
        sample = {"input_ids": ids, "labels": labels, "pixel_values": images}
        return collate_many_images([sample], template.pad_token_id)

    batch = make_batch(template, images)
    with torch.no_grad():
        features = model.encode_images(images).flatten(0, 1)  # (2, N, D) -> (2·N, D)
        is_image = batch["input_ids"] == model.image_token_id  # (1, T)
        inputs_embeds = model.embed(batch["input_ids"], batch["pixel_values"])  # (1, T, D)
        assert torch.equal(inputs_embeds[is_image], features), "wrong order of the features"
        loss = model(**batch).mean().item()
        exchanged = model(**make_batch(template, images.flip(0))).mean().item()
    assert abs(loss - exchanged) > 1e-3, "the order of the images makes no difference"
    try:
        model(**make_batch(one_image_template, images))
    except ValueError as error:
        print(f"ChatTemplate: {error}")
    else:
        raise AssertionError("ChatTemplate should expand only the first <image>")
    print(f"this template: {is_image.sum()} image positions; loss {loss:.3f}, with the two images exchanged "
          f"{exchanged:.3f}")


if __name__ == "__main__":
    run_script(main)
