"""Which device to compute on, in which precision, and with which attention kernel."""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from support.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name):
    """Returns the torch.device called `name`; for "auto" a CUDA GPU, else Apple's mps, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0][:100]}") from error
    return torch.device(name)


def choose_dtype(name, device):
    """Returns the dtype of frozen weights and matrix products. "auto" takes bf16 on a GPU with bf16
    hardware, fp16 on other CUDA GPUs, and fp32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    # torch.cuda.is_bf16_supported() returns True on a T4, which only emulates bf16, slowly.
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


# -- attention ---------------------------------------------------------------------------------------------


def expanded_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention as transformers' "sdpa" computes it, but every query head gets its own copy of its keys and
    values. (In TinyLlama, 8 query heads share them.)

    For shared keys and values, PyTorch before 2.14 has flash attention only in half precision and on an
    A100, an RTX 30xx or a later GPU. Elsewhere it uses the kernel "math", which keeps all T×T attention
    weights in fp32 for the backward pass. With copies, it can use its memory-efficient kernel, which keeps
    none and runs on every CUDA GPU.

    Shapes: query (B, heads, T, head_dim); key, value (B, key-value heads, T, head_dim).
    """
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))  # (B, heads, T, head_dim)
    is_causal = attention_mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal,
                                            scale=scaling)  # (B, heads, T, head_dim)
    return output.transpose(1, 2).contiguous(), None  # (B, T, heads, head_dim), and no attention weights


AttentionInterface.register("expanded", expanded_attention)
AttentionMaskInterface.register("expanded", sdpa_mask)


def choose_attention(device, dtype):
    """Returns the name of the attention that transformers should use: "expanded" on a CUDA GPU without flash
    attention, else None, which leaves the choice to transformers (usually "sdpa")."""
    if device.type != "cuda":
        return None
    has_flash = (dtype != torch.float32 and torch.backends.cuda.is_flash_attention_available()
                 and torch.cuda.get_device_capability(device)[0] >= 8)
    return None if has_flash else "expanded"
