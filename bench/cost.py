"""What a training step must at least compute, and how fast this machine multiplies matrices.

There is nothing to run in this file; see bench.py. One multiplication with its addition counts as 2.
"""

import statistics
import time

import torch

from sides import LORA_R


def unavoidable_flops(shape, sequences, stage, cached=False):
    """Floating-point operations that a step over `sequences` cannot do without.

    Counted: matrix products. Left out, as is usual: norms, activations, softmax, the optimizer (well below
    1%), and everything that a step may do but need not: padding, CLIP's last block, the gradients of frozen
    weights, logits where there is no label, attention to what comes later, anything computed twice.
    Of the last block, only keys and values are needed everywhere, the rest at positions with a label.

    Args:
        sequences: [(positions, those of them that carry a label)], each with one image.
        cached: image features were kept from an earlier epoch, so CLIP has nothing to do.
    """
    vision, text, n = shape.vision, shape.text, shape.image_tokens
    d_v, d, r = vision.hidden_size, text.hidden_size, LORA_R
    kv = text.num_key_value_heads * (d // text.num_attention_heads)
    # (in, out) of the seven linear layers of a Llama block: q, k, v, o, gate, up, down.
    linear = [(d, d), (d, kv), (d, kv), (d, d)]
    linear += [(d, text.intermediate_size), (d, text.intermediate_size), (text.intermediate_size, d)]

    # CLIP, forward: the patches' embedding, and the blocks up to the layer before the last.
    patches = 2 * n * 3 * vision.patch_size**2 * d_v
    products = 2 * (n + 1) * (4 * d_v**2 + 2 * d_v * vision.intermediate_size)
    scores = 4 * (n + 1) ** 2 * d_v  # Q·Kᵀ and P·V
    clip = 0 if cached else patches + (vision.num_hidden_layers - 1) * (products + scores)
    projector = 2 * (2 * n * d_v * d)  # forward, and the gradient of its weight

    total = 0
    for positions, labelled in sequences:
        # Forward, and backward the gradient of the input; frozen weights need none.
        block = 2 * (2 * positions * sum(i * o for i, o in linear))
        if stage == 2:  # A and B: forward, gradient of the input, gradient of the weight
            block += 3 * (2 * positions * sum(r * (i + o) for i, o in linear))
        # Half of the T×T scores, for attention is causal: two products forward; four backward.
        attention = (2 + 4) * (2 * d * positions * (positions + 1) // 2)
        everywhere = 2 * d * kv / sum(i * o for i, o in linear)  # the last block's share for keys and values
        last = block * (everywhere + (1 - everywhere) * labelled / positions)
        last += attention * labelled / positions
        head = 2 * (2 * labelled * d * text.vocab_size)  # forward and the gradient of its input
        total += clip + projector + (text.num_hidden_layers - 1) * (block + attention) + last + head
    return total


def matmul_rate(device, dtype, repeats=3):
    """Floating-point operations per second of one large matrix product: what this machine can do, now."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[0] for _ in range(repeats + 1)][1:]
    return 2 * size**3 / statistics.median(seconds)


def timed(function, device):
    """(seconds, result); on a GPU, whose calls return at once, up to the end of its work."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
