"""No tensor is left on the CPU when the scripts run on a GPU.

The GPU is simulated, so that the tests need none. A GpuTensor says that it is on cuda:0, and its numbers are
in a tensor on the CPU. As with CUDA, an operation on a GpuTensor and a tensor on the CPU raises an error. The
kernels, the memory and the speed of a GPU are not simulated.
"""

import pytest
import torch
from conftest import batch_of, draw, preprocess
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from data import collate
from model import LORA_TARGETS

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
GPU = torch.device("cuda:0")
# What these functions of torch.cuda return. Capability 7.5 is that of a T4: fp16, no flash attention.
CUDA = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
        "get_device_capability": (7, 5), "get_device_name": "simulated", "mem_get_info": (2**33, 2**33),
        "max_memory_allocated": 2**30}
# Functions that would look for the numbers in the GpuTensor itself.
READ_MEMORY = (torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.untyped_storage)


class GpuTensor(torch.Tensor):
    """A tensor on the simulated GPU. `memory` is a tensor on the CPU with the same numbers."""

    device, is_cuda = GPU, True

    @staticmethod
    def __new__(cls, memory):
        tensor = torch.Tensor._make_wrapper_subclass(cls, memory.shape, memory.stride(),
                                                     memory.storage_offset(), dtype=memory.dtype)
        tensor.memory = memory
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """PyTorch calls this, below autograd, for every operation on a GpuTensor."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function is not torch.ops.aten.copy_.default:
            for tensor in tensors:
                if not isinstance(tensor, cls) and tensor.dim() > 0:
                    raise RuntimeError(f"{function}: one tensor is on the GPU and another one on the CPU")
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.memory, (args, kwargs or {}))
        known = {id(getattr(tensor, "memory", tensor)): tensor for tensor in tensors}
        return tree_map_only(  # an operation that changes its argument returns this argument
            torch.Tensor, lambda result: known[id(result)] if id(result) in known else cls(result),
            function(*args, **kwargs))

    def __reduce_ex__(self, protocol):  # how torch.save() writes it
        return self.memory.__reduce_ex__(protocol)


def move(tensor, device):
    """Returns a copy of the tensor on another device, or the tensor itself if it is already there."""
    on_gpu = torch.device(device).type == "cuda"
    if isinstance(tensor, GpuTensor) == on_gpu:
        return tensor
    assert tensor.grad_fn is None, "gradients through a copy between devices are not simulated"
    return GpuTensor(tensor.detach().clone()) if on_gpu else tensor.memory.clone()


class SimulatedGpu(TorchFunctionMode):
    """Replaces the functions of PyTorch that create, move and read tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            kwargs.pop("copy", None)
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            device = {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: GPU}.get(function, device)
            tensor = args[0] if dtype is None else torch.Tensor.type(args[0], dtype)
            return tensor if device is None else move(tensor, device)
        if function in READ_MEMORY:
            return function(getattr(args[0], "memory", args[0]))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return move(function(*args, **{**kwargs, "device": "cpu"}), GPU)
        return function(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """While this fixture is used, PyTorch has a GPU."""
    for name, value in CUDA.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "autocast", lambda device_type, **kwargs: autocast("cpu", **kwargs))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device_type: is_enabled("cpu"))
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # so that module.to() takes GpuTensors
    with SimulatedGpu():
        yield GPU
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def test_the_simulation_finds_a_tensor_that_was_left_on_the_cpu(gpu):
    layer = torch.nn.Linear(3, 3).to(gpu)
    assert layer(torch.ones(2, 3, device=gpu) * torch.tensor(2.0)).device == gpu  # a scalar may be on the CPU
    with pytest.raises(RuntimeError, match="on the CPU"):
        layer(torch.ones(2, 3))


def test_a_step_and_an_answer_on_a_gpu_equal_those_on_a_cpu(gpu, tiny):
    def run(device):
        model, template, image_processor = tiny()
        model.to(device).projector.requires_grad_(True)
        torch.manual_seed(0)
        model.add_lora(LoraConfig(r=4, target_modules=LORA_TARGETS))
        trained = list(model.train().trainable_parameters().values())
        question = {"role": "user", "content": "<image>\nWhat object is shown?"}
        ids, labels = template.encode([question, {"role": "assistant", "content": "olive oil"}])
        pixel_values = preprocess(image_processor, draw("red"))
        batch = batch_of([{"input_ids": ids, "labels": labels, "pixel_values": pixel_values}], template)
        losses = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        losses.sum().backward()
        torch.optim.AdamW(trained, fused=True).step()
        prompt = {"input_ids": template.encode_prompt([question]), "pixel_values": pixel_values}
        prompt = {name: tensor.to(device) for name, tensor in collate([prompt], 2, "left").items()}
        answer = model.eval().generate(**prompt, end_token_ids=[2], max_new_tokens=5)
        return [tensor.detach().cpu() for tensor in (losses, answer, *trained)]

    torch.testing.assert_close(run(gpu), run(torch.device("cpu")))


def test_both_stages_and_the_sanity_check_run_on_a_gpu_in_fp16(gpu, script, flags, capsys):
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, batch_size=2, grad_accum=2, max_steps=2), "--activation-checkpointing",
               "--device", "auto", "--precision", "auto")
        assert "device cuda, torch.float16" in capsys.readouterr().out
    script("sanity_check", "--sample", 0)
    script("sanity_check", "--nearest-tokens", 0, "--device", "cuda:0")
