"""Runs the stage scripts in real child processes that can be killed, without importing torch anew for each.

A server process has torch and the scripts loaded, and forks a child for every run. The children have one
thread, so that sums are added up in one order and results can be compared bit by bit."""

import json
import multiprocessing
import os
import socket
import sys

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stage1_align", "stage2_instruct"])

# Runs on the toy stand-ins, of a second or two.
SMALL = [
    "--batch-size",
    "4",
    "--grad-accum",
    "2",
    "--held-out",
    "4",
    "--save-every",
    "3",
    "--eval-every",
    "8",
    "--log-every",
    "1",
    "--device",
    "cpu",
]


def _child(script, arguments, output, environment, plain_sgd):
    import torch

    import plumbing

    os.environ.update(environment)
    torch.set_num_threads(1)
    if plain_sgd:  # with lr 1, what a step subtracts from a weight is its gradient
        torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups, lr=1.0)
    sys.argv = [f"{script}.py", *arguments]
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    plumbing.launch(__import__(script).main)


def start(script, arguments, output, environment=None, plain_sgd=False):
    process = CONTEXT.Process(target=_child, args=(script, arguments, output, environment or {}, plain_sgd))
    process.start()
    return process


def start_all(script, arguments, output, world, plain_sgd=False):
    """A script in `world` processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environments = (
        [{}]
        if world == 1
        else [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in range(world)
        ]
    )
    return [start(script, arguments, output, environment, plain_sgd) for environment in environments]


def finish(script, arguments, output, world=1, plain_sgd=False):
    for child in start_all(script, arguments, output, world, plain_sgd):
        child.join(240)
        assert child.exitcode == 0, output.read_text()[-3000:]


def metrics(folder):
    """The lines of metrics.jsonl, times aside."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
        line.pop("samples_per_s", None)
        line.pop("waiting", None)
    return lines
