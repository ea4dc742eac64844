"""Processes that a test may kill: forked from a server that has imported train.py, so that each starts at once."""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it when they first step
import transformers.models.wav2vec2.modeling_wav2vec2  # noqa: F401

import evaluate
import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes"])


def start(target, *args) -> multiprocessing.Process:
    """Runs `target(*args)`, a function of this or another module, in a process of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))  # the server imports by it
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


@contextlib.contextmanager
def output_to(file):
    """Standard output and error, of C libraries too, go to the file's end."""
    with open(file, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        yield


def run(flags, log, script=train) -> None:
    torch.set_num_threads(1)  # the same sums in the same order in every process
    with output_to(log):
        script.main(list(map(str, flags)))


def run_until(flags, log, calls: int) -> None:
    """`run` that dies before its n-th replacement of a file; only the log says so."""
    count, replace = 0, os.replace

    def deadly(*args):
        nonlocal count
        count += 1
        if count > calls:
            os.write(1, b"died\n")
            os._exit(9)
        replace(*args)

    os.replace = deadly
    run(flags, log)


def run_as(rank: int, port: int, flags, log, script: str = "train", plainly: bool = False) -> None:
    """`run` as one of two processes, as torchrun would start it.

    plainly: steps are those of SGD; AdamW would turn the rounding of a gradient that should be zero into full steps.
    """
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))  # fmt: skip
    train.RANK, train.LOCAL_RANK, train.WORLD = rank, rank, 2
    if plainly:
        step_plainly()
    run(flags, log, {"train": train, "evaluate": evaluate}[script])


def run_plainly(flags, log) -> None:
    step_plainly()
    run(flags, log)


def step_plainly() -> None:
    def sgd(groups, weight_decay):
        return torch.optim.SGD(groups)

    torch.optim.AdamW = sgd
