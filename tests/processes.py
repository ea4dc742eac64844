"""Processes that a test may kill: forked from a server that has imported train.py, so that each starts at once."""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it when they first step
import transformers.models.wav2vec2.modeling_wav2vec2  # noqa: F401

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


def fit(flags, log) -> None:
    torch.set_num_threads(1)  # the same sums in the same order in every process
    with output_to(log):
        train.main(list(map(str, flags)))


def fit_until(flags, log, calls: int) -> None:
    """`fit` that dies without a word before its n-th change of a file or folder."""
    count = 0

    def deadly(change):
        def changed(*args, **kwargs):
            nonlocal count
            count += 1
            if count > calls:
                os._exit(9)
            return change(*args, **kwargs)

        return changed

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    fit(flags, log)
