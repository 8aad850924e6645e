"""The forward pass of CLIP's vision tower in plain tensor code, compared with transformers.

    python -m lessons.solutions.vision_tower

Sizes in the comments, besides those of model.py: P pixels is the side of a patch, 32 in the toy. D_v is split
into h heads of d numbers each, 4 × 32 in the toy.
"""

import math

import torch

from data import collate
from lessons.toy_parts import PRESETS, load_datasets, load_model
from support.errors import run_script
from support.pretrained import load_vision_tower


def linear(x, weights, name):
    # W·x + b, for the last dimension of x
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weights, name, eps):
    # (x - mean) / sqrt(variance + eps) · weight + bias; mean and variance of one vector, over its D_v numbers
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    return centered / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def quick_gelu(x):
    # x · sigmoid(1.702 x), OpenAI's approximation of GELU
    return x * torch.sigmoid(1.702 * x)


def embed_patches(pixel_values, weights):
    """Returns the vectors before the first block: (I, 3, S, S) -> (I, 1 + N, D_v)."""
    matrix = weights["embeddings.patch_embedding.weight"]  # (D_v, 3, P, P), a convolution with stride P
    size = matrix.shape[-1]  # P
    patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (I, 3, rows, columns, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (I, rows, columns, 3·P·P)
    patches = patches.flatten(1, 2)  # (I, N, 3·P·P), in reading order
    # Neighboring patches do not overlap, so the convolution is one matrix for the pixels of each patch: W·x
    x = patches @ matrix.flatten(1).T  # (I, N, D_v)
    class_token = weights["embeddings.class_embedding"].expand(len(x), 1, -1)  # (I, 1, D_v)
    x = torch.cat([class_token, x], dim=1)  # (I, 1 + N, D_v)
    return x + weights["embeddings.position_embedding.weight"]  # one vector for each of the 1 + N positions


def attention(x, weights, name, num_heads):
    """Mixes the 1 + N vectors: (I, 1 + N, D_v) -> (I, 1 + N, D_v). CLIP has no mask, so all see all."""
    q, k, v = (linear(x, weights, f"{name}.{part}_proj").unflatten(2, (num_heads, -1)).transpose(1, 2)
               for part in "qkv")  # (I, 1 + N, D_v) -> (I, 1 + N, h, d) -> (I, h, 1 + N, d)
    # A = softmax(q·k / sqrt(d)): row i contains the weights with which vector i reads the others
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (I, h, 1 + N, 1 + N)
    heads = torch.softmax(scores, dim=-1) @ v  # A·v: (I, h, 1 + N, d)
    return linear(heads.transpose(1, 2).flatten(2), weights, f"{name}.out_proj")  # (I, 1 + N, D_v)


def vision_tower(pixel_values, weights, config):
    """Returns all hidden states, (I, 1 + N, D_v) each: the embedding, then the output of each block."""
    eps = config.layer_norm_eps
    x = embed_patches(pixel_values, weights)  # (I, 1 + N, D_v)
    states = [layer_norm(x, weights, "pre_layrnorm", eps)]  # the name is misspelled in the weights
    for i in range(config.num_hidden_layers):
        x, block = states[-1], f"encoder.layers.{i}"
        # x + attention(norm(x)), then x + MLP(norm(x))
        normed = layer_norm(x, weights, f"{block}.layer_norm1", eps)
        x = x + attention(normed, weights, f"{block}.self_attn", config.num_attention_heads)
        normed = layer_norm(x, weights, f"{block}.layer_norm2", eps)
        wide = quick_gelu(linear(normed, weights, f"{block}.mlp.fc1"))  # (I, 1 + N, 4·D_v)
        states.append(x + linear(wide, weights, f"{block}.mlp.fc2"))  # (I, 1 + N, D_v)
    return states


@torch.no_grad()
def main():
    model, template = load_model()
    _, heldout_dataset = load_datasets(template, stage=1)
    pixel_values = collate([heldout_dataset[i] for i in range(4)], 0)["pixel_values"]  # (4, 3, S, S)
    # Loaded again, because Llava has deleted the last block. In fp64, rounding does not hide an error.
    clip = load_vision_tower(PRESETS[1]["vision_tower"], torch.float64)
    expected = clip(pixel_values.double(), output_hidden_states=True).hidden_states
    states = vision_tower(pixel_values.double(), clip.state_dict(), clip.config)
    assert len(states) == len(expected)
    for own, theirs in zip(states, expected):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-10)
    z_v = states[PRESETS[1]["vision_layer"]][:, 1:]  # the one LLaVA uses, without class token: (4, N, D_v)
    h_v = model.projector(z_v.float())  # (4, N, D)
    torch.testing.assert_close(h_v, model.encode_images(pixel_values), rtol=1e-4, atol=1e-4)
    largest = max((own - theirs).abs().max().item() for own, theirs in zip(states, expected))
    print(f"{len(states)} hidden states of {states[0].shape[1]} vectors; largest difference from "
          f"transformers {largest:.0e}")


if __name__ == "__main__":
    run_script(main)
