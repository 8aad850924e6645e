"""Which device to compute on, in which precision, and with which attention kernel."""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from support.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name, local_rank=None):
    """Returns the torch.device called `name`; for "auto" a CUDA GPU, else Apple's mps, else the CPU. Process
    `local_rank` of several on one machine gets the GPU of this number. Raises UserError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda:"):
        raise UserError(f"torchrun gives every process its own GPU: pass --device cuda instead of {name}")
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # else CUDA would also take memory on GPU 0
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"the device {name} cannot be used here; pass auto, cpu, cuda, cuda:1 or mps "
                        f"({reason})") from error
    return device


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

    For shared keys and values, PyTorch 2.13 has flash attention only in half precision and on an A100, an RTX
    30xx or a later GPU. Elsewhere it uses the kernel "math", which keeps all T×T attention weights in fp32
    for the backward pass. With copies, it can use its memory-efficient kernel, which keeps none and runs on
    older CUDA GPUs too, in fp16 and fp32. (Source: sdp_utils.cpp of PyTorch.)

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
