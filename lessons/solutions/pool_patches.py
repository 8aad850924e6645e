"""An average over 2×2 neighboring patches, so that an image needs fewer tokens.

    python -m lessons.solutions.pool_patches                25 steps, about 10 s
    python -m lessons.solutions.pool_patches --steps 376    as many steps as stage 1, about 2 minutes
"""

import argparse
import math

import torch
import torch.nn.functional as F

from data import collate
from lessons.toy_parts import load_datasets, load_model
from model import IGNORE_INDEX, Llava
from support.errors import run_script
from support.evaluation import make_heldout_batches, measure_heldout
from toy.world import PLACES


def count_pooled(num_patches):
    """Returns the number of image tokens: 9 patches give 4, 256 patches give 64."""
    return math.ceil(math.isqrt(num_patches) / 2) ** 2


class PooledLlava(Llava):
    """Replaces Llava.encode_images(). `num_image_tokens` stays N, because it also says which of CLIP's
    vectors are patches."""

    def encode_images(self, pixel_values):
        h_v = super().encode_images(pixel_values)  # (I, N, D)
        side = math.isqrt(self.num_image_tokens)
        grid = h_v.transpose(1, 2).unflatten(2, (side, side))  # (I, D, N) -> (I, D, side, side)
        # With ceil_mode, windows at the right and lower edge may contain only one or two patches.
        pooled = F.avg_pool2d(grid, 2, ceil_mode=True)  # (I, D, rows, columns)
        # A linear projector gives the same result before and after an average. An MLP would not.
        return pooled.flatten(2).transpose(1, 2)  # (I, count_pooled(N), D)


@torch.no_grad()
def place_losses(model, template, batches):
    """Returns the mean loss of the tokens that name a place ("top", "left", …), and of all others."""
    words = {word for place in PLACES for word in place.split()}
    place_ids = torch.tensor([template.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in words])
    losses, targets = [], []
    for batch in batches:
        tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        losses.append(model(**tensors))  # (K,)
        targets.append(batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX])  # (K,)
    losses, is_place = torch.cat(losses), torch.isin(torch.cat(targets), place_ids)
    return losses[is_place].mean().item(), losses[~is_place].mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    steps = parser.parse_args().steps
    model, template = load_model(PooledLlava)
    model.projector.requires_grad_(True)
    count, pad_token_id = count_pooled(model.num_image_tokens), template.pad_token_id
    train_dataset, heldout_dataset = load_datasets(template, stage=1)
    long = len(train_dataset[0]["input_ids"])
    template.num_image_tokens = count
    short = len(train_dataset[0]["input_ids"])
    assert (count, long - short) == (4, 5)
    heldout_batches = make_heldout_batches(heldout_dataset, batch_size=32)
    before = measure_heldout(model, heldout_batches)

    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), weight_decay=0.0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        indices = range(32 * step, 32 * step + 32)
        batch = collate([train_dataset[i % len(train_dataset)] for i in indices], pad_token_id)
        del batch["skipped"]
        model(**batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    after = measure_heldout(model, heldout_batches)
    place, other = place_losses(model, template, heldout_batches)
    print(f"{count} image tokens instead of {model.num_image_tokens}; the first sample has {short} tokens "
          f"instead of {long}")
    print(f"held-out loss {before['loss']:.2f} before, {after['loss']:.2f} after {steps} steps (different "
          f"image {after['loss_different']:.2f}); words for places {place:.2f}, other tokens {other:.2f}")
    assert after["loss"] < before["loss"] - 0.2
    assert after["loss_different"] > after["loss"] + 0.02, "the image makes no difference"


if __name__ == "__main__":
    run_script(main)
