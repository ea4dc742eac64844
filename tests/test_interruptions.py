"""Runs that are stopped or killed at any moment go on and end where an unbroken run does."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
import torch

import evaluate
import sdser
import train

ROOT = Path(__file__).parents[1]


def flags_of(corpus, out, *more):
    """Crops, masks and dropout are in play, and epochs are short."""
    flags = ["--data", corpus, "--batch-size", 8, "--seconds", 0.3, "--exits", 1, 2, "--seed", 3, *more, "--out", out]
    return list(map(str, flags))


def go_on(flags, out):
    """What a person types: the command, or once an epoch is saved, --resume."""
    return ["--resume", "--out", str(out)] if (out / "train_state.pt").exists() else flags


def finish(flags, out) -> dict:
    process = processes.start(processes.fit, go_on(flags, out), out.with_suffix(".txt"))
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
        process = processes.start(processes.fit, flags, self.log)
        process.poll, process.wait = lambda: process.exitcode, process.join
        return process


class Command(Forked):
    """Starts the script as a person does."""

    seconds = 8

    def __call__(self, flags):
        with open(self.log, "a") as log:
            command = [sys.executable, str(ROOT / "train.py"), *flags]
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    ("start", "kills", "epochs"), [(Forked, 20, 12), pytest.param(Command, 25, 30, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments(corpus, tmp_path, start, kills, epochs):
    """At least twenty SIGKILLs across a run, in its start, its epochs and its saving."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(flags_of(corpus, whole, "--epochs", epochs), whole)
    flags = flags_of(corpus, killed, "--epochs", epochs)
    seen = kill_at_random(flags, killed, start(tmp_path / "killed.txt"), kills, random.Random(0))
    assert len(seen) >= 5, "the kills hit many epochs"
    assert finish(flags, killed) == expected


def test_killed_before_every_change_of_a_file(corpus, tmp_path):
    """Of a run that takes an earlier one's place; at each moment what stands there can be loaded."""
    finish(flags_of(corpus, tmp_path / "earlier", "--epochs", 1, "--seed", 4), tmp_path / "earlier")
    whole = finish(flags_of(corpus, tmp_path / "whole", "--epochs", 2), tmp_path / "whole")

    def kill_before(call):
        out = tmp_path / f"run{call}"
        shutil.copytree(tmp_path / "earlier", out)
        flags = flags_of(corpus, out, "--epochs", 2)
        process = processes.start(processes.fit_until, flags, tmp_path / f"run{call}.txt", call)
        process.join()
        died = (tmp_path / f"run{call}.txt").read_text().endswith("died\n")
        if (out / "config.json").exists() and (out / "model.safetensors").exists():
            sdser.MultiExitSER.from_pretrained(out)
        if (out / "results.json").exists():
            json.loads((out / "results.json").read_text())
        state = out / "train_state.pt"
        if state.exists() and torch.load(state, weights_only=True)["args"]["seed"] == 4:
            state.unlink()  # killed before anything of the new run was saved: --resume would finish the earlier one
        assert finish(flags, out) == whole
        return died

    with ThreadPoolExecutor(2) as pool:
        died = list(pool.map(kill_before, range(24)))
    assert died == sorted(died, reverse=True) and died.count(True) > 10 and not died[-1], "all changes were met"


def fit_on_a_full_disk(flags, log, size: int) -> None:
    """`fit` where no file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    processes.fit(flags, log)


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("size", "file"), [(5_000_000, "train_state.pt"), (1_000_000, "model.safetensors")])
def test_a_full_disk_loses_nothing_and_resumes_once_there_is_room(corpus, tmp_path, size, file):
    """The first epochs fit, the next one's files do not."""
    out, text = tmp_path / "run", tmp_path / "run.txt"
    whole = finish(flags_of(corpus, tmp_path / "whole", "--epochs", 3), tmp_path / "whole")
    stopped = processes.start(processes.fit_until, flags_of(corpus, out, "--epochs", 3), text, 12)
    stopped.join()
    before = contents(out)
    assert text.read_text().endswith("died\n") and len(before["train_state.pt"]) > 5_000_000
    process = processes.start(fit_on_a_full_disk, go_on(None, out), text, size)
    process.join()
    error = text.read_text().splitlines()[-1]
    assert process.exitcode == 2 and error.startswith(
        f"error: {out}/{file}: cannot be written (File too large); make room"
    )
    after = contents(out)
    assert not [name for name in after if name.endswith(".tmp")]
    assert all(after[name] == before[name] for name in ("train_state.pt", "split.csv"))
    sdser.MultiExitSER.from_pretrained(out)
    assert finish(None, out) == whole


def test_control_c(corpus, tmp_path, capsys):
    """Once before the first epoch is saved, and once after."""
    out, text = tmp_path / "run", tmp_path / "run.txt"
    process = processes.start(processes.fit, flags_of(corpus, out, "--epochs", 500), text)
    while not text.exists() or "exits [1, 2]" not in text.read_text():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    if not (out / "train_state.pt").exists():
        assert text.read_text().endswith("interrupted: no epoch was finished, so there is nothing to resume yet\n")
    text.unlink()
    process = processes.start(processes.fit, flags_of(corpus, out, "--epochs", 500), text)
    while not text.exists() or "epoch   2/500" not in text.read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    epochs = len(torch.load(out / "train_state.pt", weights_only=True)["log"])
    assert process.exitcode == 130 and epochs >= 1
    [message] = [line for line in text.read_text().splitlines() if line.startswith("interrupted")]
    assert message == f"interrupted: python train.py --resume --out {out} goes on after epoch {epochs}"
    assert "Traceback" not in text.read_text()


def test_control_c_within_a_destructor(corpus, tmp_path, monkeypatch, capsys):
    """Python prints an exception that a destructor raises, and goes on."""

    class Bar:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    loss, bars = sdser.self_distillation_loss, [Bar()]
    monkeypatch.setattr(sdser, "self_distillation_loss", lambda *args, **kwargs: bars.clear() or loss(*args, **kwargs))
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(SystemExit) as end:
        train.main(flags_of(corpus, tmp_path / "run", "--epochs", 500))
    assert end.value.code == 130 and "interrupted: " in capsys.readouterr().err


def test_control_c_while_evaluating(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupt)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["out"])
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
