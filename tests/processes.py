"""Processes that a test may kill: forked from a server that has imported train.py, so that each starts at once."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
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


def fit(flags, log) -> None:
    torch.set_num_threads(1)  # the same sums in the same order in every process
    with output_to(log):
        train.main(list(map(str, flags)))


def fit_until(flags, log, calls: int) -> None:
    """`fit` that dies before its n-th change of a file or folder; only the log says so."""
    count = 0

    def deadly(change):
        def changed(*args, **kwargs):
            nonlocal count
            count += 1
            if count > calls:
                os.write(1, b"died\n")
                os._exit(9)
            return change(*args, **kwargs)

        return changed

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    fit(flags, log)


def fit_rank(rank: int, world: int, port: int, flags, log, before=None) -> None:
    """`fit` as one of several processes, as torchrun would start it; `before(rank)` runs first."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))  # fmt: skip
    train.RANK, train.LOCAL_RANK, train.WORLD = rank, rank, world
    if before:
        before(rank)
    fit(flags, log)


def evaluate_rank(rank: int, world: int, port: int, flags, log) -> None:
    """evaluate.py as one of several processes; the first one's standard output goes to a file of its own."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train.RANK, train.LOCAL_RANK, train.WORLD = rank, rank, world
    torch.set_num_threads(1)
    with output_to(log):
        evaluate.main(list(map(str, flags)))


def fit_plainly(flags, log) -> None:
    step_plainly(0)
    fit(flags, log)


def step_plainly(rank) -> None:
    """AdamW would turn the rounding of a gradient that should be zero into steps of full size."""
    torch.optim.AdamW = lambda groups, weight_decay: torch.optim.SGD(groups)


def tell_seeds(rank) -> None:
    train_epoch = train.train_epoch

    def telling(*args):
        print(f"seed {torch.initial_seed()}", file=sys.stderr)
        return train_epoch(*args)

    train.train_epoch = telling


def die_in_the_second_step(rank) -> None:
    in_the_second_step(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang_in_the_second_step(rank) -> None:
    train.TIMEOUT = timedelta(seconds=4)
    in_the_second_step(rank, lambda: time.sleep(600))


def in_the_second_step(rank, happens) -> None:
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def clip_grad_norm_(*args):
        steps.append(rank)
        if steps == [1, 1]:
            happens()
        return clip(*args)

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
