"""Processes that a test may kill: forked from a server that has imported train.py, so that each starts at once."""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it when they first step
import transformers.models.wav2vec2.modeling_wav2vec2  # noqa: F401

import evaluate
import train

if "forkserver" in multiprocessing.get_all_start_methods():
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(["processes"])
else:  # on Windows
    CONTEXT = multiprocessing.get_context("spawn")


def start(target, *args) -> multiprocessing.Process:
    """Runs `target(*args)`, a function of this or another module, in a process of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))  # the server imports by it
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def run(flags, log, before=None, script="train") -> None:
    """The script's main, after `before()`; what it and C libraries print goes to the log's end."""
    torch.set_num_threads(1)  # the same sums in the same order in every process
    if before:
        before()
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        importlib.import_module(script).main(list(map(str, flags)))


def run_until(calls: int, flags, log) -> None:
    """`run` that dies before its n-th replacement of a file, from 0; only the log says so."""
    left, replace = list(range(calls)), os.replace

    def deadly(*args):
        if not left:
            os.write(1, b"died\n")
            os._exit(9)
        left.pop()
        replace(*args)

    os.replace = deadly
    run(flags, log)


def run_as(rank: int, port: int, *args) -> None:
    """`run` as one of two processes, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    evaluate.RANK, evaluate.WORLD = train.RANK, train.WORLD = rank, 2
    run(*args)


def step_plainly() -> None:
    """Steps of SGD, as AdamW makes full steps of mere rounding; each epoch tells what dropout would be drawn from."""
    train_epoch = train.train_epoch
    train.train_epoch = lambda *args: print("seed", torch.initial_seed(), file=sys.stderr) or train_epoch(*args)
    torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups)
