"""Runs that are stopped or killed at any moment go on and end where an unbroken run does."""

import json
import os
import random
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
import torch

import evaluate
import sdser

ROOT = Path(__file__).parents[1]


def flags_of(corpus, out, *more):
    """Crops, masks and dropout are in play, and epochs are short."""
    flags = ["--data", corpus, "--batch-size", 8, "--seconds", 0.3, "--exits", 1, 2, "--seed", 3, *more, "--out", out]
    return list(map(str, flags))


def go_on(flags, out):
    """What a person types: --resume once an epoch is saved, else the command, in an emptied folder."""
    if (out / "train_state.pt").exists():
        return ["--resume", "--out", str(out)]
    shutil.rmtree(out, ignore_errors=True)
    return flags


def finish(flags, out) -> dict:
    process = processes.start(processes.run, go_on(flags, out), out.with_suffix(".txt"))
    process.join()
    text = out.with_suffix(
        ".txt"
    ).read_text()  # says more than an exit status, which busy servers of processes may lose
    assert text.endswith(f"next: python evaluate.py {out}\n"), text
    return ended(out)


def ended(out) -> dict:
    """All that a run leaves, but for times."""
    state = torch.load(out / "train_state.pt", weights_only=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == state["log"]
    results = json.loads((out / "results.json").read_text())
    return {
        "log": [{name: value for name, value in line.items() if name != "seconds"} for line in log],
        "results": (results["dev"], results["test"]),
        "best": (out / "model.safetensors").read_bytes(),
        "last": {name: value.numpy().tobytes() for name, value in state["model"].items()},
        "moments": {
            (i, name): value.numpy().tobytes() for i, row in state["optimizer"]["state"].items()
            for name, value in row.items()
        },
        "schedule": state["scheduler"]["last_epoch"],
        "split": (out / "split.csv").read_text(),
        "files": {path.name for path in out.iterdir()},
    }  # fmt: skip


def lines(path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def kill_at_random(flags, out, start, kills: int, rng) -> set[int]:
    """Runs a command and kills it, time and again; returns after how many epochs the kills came."""
    seen, epoch = set(), 0.0
    for _ in range(kills):
        before, begun = lines(out / "log.jsonl"), time.time()
        process = start(go_on(flags, out))
        wait = rng.choice((0, 1, 1))  # to be killed while starting, or after an epoch more
        while process.poll() is None and lines(out / "log.jsonl") < before + wait and time.time() < begun + 60:
            time.sleep(0.002)
        if wait:
            epoch = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["seconds"]
        time.sleep(rng.uniform(0, 1.5 * epoch if wait else 1.5 * start.seconds))
        process.kill()
        process.wait()
        seen.add(lines(out / "log.jsonl"))
    return seen


class Forked:
    """Starts the script by forking, which takes no time."""

    seconds = 0.5

    def __init__(self, log):
        self.log = log

    def __call__(self, flags):
        process = processes.start(processes.run, flags, self.log)
        process.poll, process.wait = lambda: process.exitcode, process.join
        return process


@pytest.mark.parametrize(("kills", "epochs"), [(8, 6), pytest.param(25, 30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(corpus, tmp_path, kills, epochs):
    """SIGKILLs across a run, in its start, its epochs and its saving."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(flags_of(corpus, whole, "--epochs", epochs), whole)
    flags = flags_of(corpus, killed, "--epochs", epochs)
    seen = kill_at_random(flags, killed, Forked(tmp_path / "killed.txt"), kills, random.Random(0))
    assert len(seen) >= 3, "the kills hit several epochs"
    assert finish(flags, killed) == expected


def test_killed_before_every_change_of_a_file(corpus, tmp_path):
    """At each moment what stands there can be loaded, and the run goes on from there."""
    whole = finish(flags_of(corpus, tmp_path / "whole", "--epochs", 2), tmp_path / "whole")

    def kill_before(call):
        out = tmp_path / f"run{call}"
        flags = flags_of(corpus, out, "--epochs", 2)
        process = processes.start(processes.run_until, flags, tmp_path / f"run{call}.txt", call)
        process.join()
        died = (tmp_path / f"run{call}.txt").read_text().endswith("died\n")
        if (out / "config.json").exists():
            sdser.MultiExitSER.from_pretrained(out)
        assert finish(flags, out) == whole
        return died

    with ThreadPoolExecutor(2) as pool:
        died = list(pool.map(kill_before, range(13)))
    assert died == sorted(died, reverse=True) and died.count(True) > 6 and not died[-1], "all changes were met"


def fit_on_a_full_disk(flags, log, size: int) -> None:
    """`fit` where no file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    processes.run(flags, log)


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_loses_nothing_and_resumes_once_there_is_room(corpus, tmp_path):
    """The first epochs fit, the next one's files do not."""
    out, text = tmp_path / "run", tmp_path / "run.txt"
    whole = finish(flags_of(corpus, tmp_path / "whole", "--epochs", 3), tmp_path / "whole")
    stopped = processes.start(processes.run_until, flags_of(corpus, out, "--epochs", 3), text, 6)
    stopped.join()
    before = contents(out)
    assert text.read_text().endswith("died\n") and len(before["train_state.pt"]) > 5_000_000
    process = processes.start(fit_on_a_full_disk, go_on(None, out), text, 1_000_000)
    process.join()
    error = text.read_text().splitlines()[-1]
    assert process.exitcode == 2 and error.startswith(f"error: {out}/")
    after = contents(out)
    assert not [name for name in after if name.endswith(".tmp")]
    assert all(after[name] == before[name] for name in ("train_state.pt", "split.csv"))
    sdser.MultiExitSER.from_pretrained(out)
    assert finish(None, out) == whole


def test_control_c(corpus, tmp_path):
    """After an epoch that was saved."""
    out, text = tmp_path / "run", tmp_path / "run.txt"
    process = processes.start(processes.run, flags_of(corpus, out, "--epochs", 500), text)
    while not text.exists() or "epoch   2/500" not in text.read_text():
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and "Traceback" not in text.read_text()
    assert f"--resume --out {out}" in text.read_text().splitlines()[-1]
    assert torch.load(out / "train_state.pt", weights_only=True)["log"]


def test_control_c_while_evaluating(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupt)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["out"])
    assert end.value.code == 130 and capsys.readouterr().err.count("\n") == 1
