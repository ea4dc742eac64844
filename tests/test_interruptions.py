"""Runs that are stopped or killed at any moment go on and end where an unbroken run does."""

import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest
import torch
from conftest import read_run

import sdser

resource = pytest.importorskip("resource", reason="signals and limits of Unix")


def command(corpus, out, epochs: int) -> list:
    """What a person types: --resume once an epoch is saved, else the whole command, in an emptied folder."""
    if (out / "train_state.pt").exists():
        return ["--resume", "--out", out]
    shutil.rmtree(out, ignore_errors=True)
    flags = f"--backbone tiny --exits 1 2 --epochs {epochs} --batch-size 8"
    return [*flags.split(), "--seconds", 0.3, "--data", corpus, "--out", out]  # with crops, masks and dropout


def finish(corpus, out, epochs) -> tuple:
    """Goes on to the end; returns all that the run leaves, but for times."""
    text = out.with_suffix(".txt")
    processes.start(processes.run, command(corpus, out, epochs), text).join()
    assert (out / "results.json").exists(), text.read_text()
    results, log = read_run(out)
    state = torch.load(out / "train_state.pt", weights_only=True)
    assert state["log"] == log
    state |= {"args": None, "log": [{**line, "seconds": None} for line in log]}
    kept = [(out / name).read_bytes() for name in ("model.safetensors", "config.json", "split.csv")]
    return comparable(state), results["dev"], results["test"], kept, sorted(os.listdir(out))


def comparable(value):
    """Tensors as bytes, at any depth."""
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def epochs_in(out) -> int:
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize(("kills", "epochs"), [(6, 6), pytest.param(25, 30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(corpus, tmp_path, kills, epochs):
    """SIGKILLs across a run, in its start, its epochs and its saving."""
    expected, out = finish(corpus, tmp_path / "whole", epochs), tmp_path / "killed"
    rng, seen = random.Random(0), set()
    for _ in range(kills):
        wanted = epochs_in(out) + rng.choice((0, 1, 1))  # to be killed while starting, or after an epoch more
        process = processes.start(processes.run, command(corpus, out, epochs), tmp_path / "killed.txt")
        while process.is_alive() and epochs_in(out) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        seen.add(epochs_in(out))
    assert len(seen) >= 3, "the kills hit several epochs"
    assert finish(corpus, out, epochs) == expected


def test_killed_before_every_change_of_a_file(corpus, tmp_path):
    """At each moment what stands there can be loaded, and the run goes on from there."""
    expected = finish(corpus, tmp_path / "whole", 2)

    def kill_before(call):
        out, text = tmp_path / f"run{call}", tmp_path / f"run{call}.txt"
        processes.start(processes.run_until, call, command(corpus, out, 2), text).join()
        died = text.read_text().endswith("died\n")
        assert text.read_text().count("  loss ") <= epochs_in(out), "an epoch that is told of is saved"
        if (out / "config.json").exists():
            sdser.MultiExitSER.from_pretrained(out)
        assert finish(corpus, out, 2) == expected
        return died

    with ThreadPoolExecutor(2) as pool:
        died = list(pool.map(kill_before, range(12)))
    assert died == sorted(died, reverse=True) and died.count(True) > 6 and not died[-1], "all changes were met"


def fill_disk() -> None:
    """No file may grow beyond a megabyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))


def test_a_full_disk_loses_nothing_and_resumes_once_there_is_room(corpus, tmp_path):
    """The first epoch's files fit, the next one's do not."""
    out, text, expected = tmp_path / "run", tmp_path / "run.txt", finish(corpus, tmp_path / "whole", 3)
    processes.start(processes.run_until, 6, command(corpus, out, 3), text).join()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before["train_state.pt"]) > 5_000_000
    stopped = processes.start(processes.run, command(corpus, out, 3), text, fill_disk)
    stopped.join()
    assert stopped.exitcode == 2 and str(out) in text.read_text().splitlines()[-1]
    assert not list(out.glob(".*")), "no temporary file is left"
    assert all((out / name).read_bytes() == before[name] for name in ("train_state.pt", "split.csv"))
    sdser.MultiExitSER.from_pretrained(out)
    assert finish(corpus, out, 3) == expected


def test_control_c_after_an_epoch(corpus, tmp_path):
    out, text = tmp_path / "run", tmp_path / "run.txt"
    process = processes.start(processes.run, command(corpus, out, 500), text)
    while epochs_in(out) < 2:
        time.sleep(0.01)
        assert process.is_alive(), text.read_text()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and "Traceback" not in text.read_text()
    assert f"--resume --out {out}" in text.read_text().splitlines()[-1]
    assert torch.load(out / "train_state.pt", weights_only=True)["log"]
