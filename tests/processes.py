"""Runs the stages in real child processes that can be killed, without importing torch for each.

A server process has torch and the stages loaded, and forks a child for every run. The children have one
thread, so that sums are always added up in the same order and results can be compared bit by bit.
"""

import importlib
import json
import multiprocessing
import os
import resource
import socket
import sys

import torch

from support import metrics_log
from support.errors import run_script

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stage1_align", "stage2_instruct"])

# Runs of the toy models that take a second or two.
SMALL = ["--batch-size", "4", "--grad-accum", "2", "--heldout", "4", "--save-every", "3",
         "--eval-every", "8", "--device", "cpu"]


def _child(script, arguments, output, environment, plain_sgd, limit):
    os.environ.update(environment)
    os.setpgid(0, 0)  # a group of its own, so that a signal can be sent to this process and its workers
    torch.set_num_threads(1)
    metrics_log.LOG_EVERY = 1
    if plain_sgd:  # with lr 1, a step subtracts the gradient from the weight
        torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups, lr=1.0)
    sys.argv = [f"{script}.py", *arguments]
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # a killed process would lose its lines
    if limit:
        resource.setrlimit(limit[0], (limit[1], limit[1]))
    run_script(importlib.import_module(script).main)


def start(script, arguments, output, environment=None, plain_sgd=False, limit=None):
    """Starts a script and returns its process.

    Args: output: file to which stdout and stderr are appended. plain_sgd: use SGD instead of AdamW.
    limit: (resource, number), for example resource.RLIMIT_NOFILE and the number of files that may be open.
    """
    process = CONTEXT.Process(target=_child, args=(
        script, arguments, output, environment or {}, plain_sgd, limit))
    process.start()
    return process


def start_all(script, arguments, output, world_size, plain_sgd=False, own_arguments=((), ())):
    """Starts a script in `world_size` processes, as torchrun would. Returns the processes.
    own_arguments[rank] are passed to one process only."""
    environments = [{}]
    if world_size > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
                        for rank in range(world_size)]
    return [start(script, [*arguments, *own_arguments[rank]], output, environment, plain_sgd)
            for rank, environment in enumerate(environments)]


def finish(script, arguments, output, world_size=1, **more):
    """Runs a script to its end, which must be a success."""
    for child in start_all(script, arguments, output, world_size, **more):
        child.join(240)
        assert child.exitcode == 0, output.read_text()[-3000:]


def metrics(folder):
    """Returns the lines of metrics.jsonl without what depends on the time of day."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "samples_per_s", "tokens_per_s", "waiting", "seconds_left")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]
