"""Which device to compute on, and in which precision."""

import torch

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
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def choose_dtype(name, device):
    """Returns the dtype of frozen weights and matrix products. "auto" takes bf16 on a GPU that computes in
    it, fp16 on other CUDA GPUs, and fp32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    # torch.cuda.is_bf16_supported() returns True on a T4, which only emulates bf16, slowly. Ask for the
    # hardware.
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
