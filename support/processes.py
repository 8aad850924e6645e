"""The processes that train together: one, or as many as torchrun started."""

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from support.devices import choose_device, choose_dtype


class Processes:
    """This process and the others that train with it. Rank 0 is the one that prints and saves. With a single
    process, no method communicates. `device` and `dtype` are what this process computes with.

    Creating it joins torchrun's processes, and silences stdout in all but rank 0. run_script() leaves them.
    """

    def __init__(self, device_name, precision):
        self.rank, self.world_size, local_rank = 0, 1, None
        if dist.is_torchelastic_launched():  # other launchers and notebooks set RANK, too
            self.rank, self.world_size, local_rank = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        self.device = choose_device(device_name, local_rank)
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank > 0:  # only rank 0 prints; errors go to stderr and are shown for all
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        self.dtype = choose_dtype(precision, self.device)
        # If one GPU computes in fp16, all do, because only then all processes scale their gradients alike.
        if self.max(int(self.dtype == torch.float16)):
            self.dtype = torch.float16
        print(f"device {self.device}, {self.dtype}")

    def sum(self, value):
        """Returns a number, summed over the processes, as a float. (On a GPU, this waits for it.)"""
        return self._reduce(float(value), torch.float64, dist.ReduceOp.SUM)

    def max(self, number):
        """Returns the maximum of an int over the processes."""
        return int(self._reduce(number, torch.int64, dist.ReduceOp.MAX))

    def _reduce(self, value, dtype, operation):
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=dtype, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.item()

    def sum_gradients(self, parameters):
        """Sums the gradients over the processes, in one message. A process that had no sample adds zeros."""
        if self.world_size == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        for parameter, part in zip(parameters, message.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)

    def gather(self, value):
        """Returns the values of all processes as a list, in the order of their ranks."""
        gathered = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self):
        """Waits until all processes have come this far."""
        if self.world_size > 1:
            dist.barrier()


def hide_bar():
    """Returns tqdm's `disable`: True except in rank 0. There, None hides the bar only if stderr is not a
    terminal, because it would fill a log file."""
    return True if dist.is_initialized() and dist.get_rank() > 0 else None


def share_from_worker(batch):
    """Returns the batch. In a DataLoader worker, its tensors are in shared memory, by which workers pass them
    on. If there is too little, share_memory_() raises an error here. Otherwise the batch would be lost, and
    the training would wait for it forever."""
    if get_worker_info():
        for value in filter(torch.is_tensor, batch.values()):
            value.share_memory_()
    return batch


def ignore_signals_in_worker(worker):
    """Keeps stop signals away from a DataLoader worker, because the main process needs its workers to finish
    its step. A terminal and torchrun signal a whole group of processes, so the worker leaves this group. (A
    signal to the worker itself still ends it.)"""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)
