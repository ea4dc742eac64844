"""Data-parallel training: what several processes learn and score is what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import LAYOUTS
from transformers import AutoModel

import sdser

ROOT = Path(__file__).parents[1]


def together(flags, log, before=None, script="train") -> None:
    """Runs a script in two processes that form a group."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = [processes.start(processes.run_as, rank, port, flags, log, before, script) for rank in (0, 1)]
    for process in group:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in group] == [0, 0], log.read_text()


@pytest.fixture
def flags(corpus, tmp_path):
    """Of a run without dropout and masks, where the order alone is left to chance, and without a limit to gradients."""
    config = {**LAYOUTS["wavlm-base"].to_dict(), "apply_spec_augment": False}
    for name in config:
        config[name] = 0.0 if "dropout" in name else config[name]
    AutoModel.from_config(type(LAYOUTS["wavlm-base"])(**config)).save_pretrained(tmp_path / "backbone")
    some = ["--data", corpus, "--backbone", tmp_path / "backbone", "--epochs", 2]
    return [*some, "--preset", "paper", "--window", "natural", "--lr", 0.05]


def read(out) -> tuple[dict, list, dict]:
    weights = torch.load(out / "train_state.pt", weights_only=True)["model"]
    log = [json.loads(line) for line in (out / "log.jsonl").open()]
    return weights, log, json.loads((out / "results.json").read_text())


# Shares of 3 and 2 clips and a last step of fewer batches; and a last batch of one clip, so that one process has none.
@pytest.mark.parametrize(("size", "accumulate"), [(5, 2), (17, 1)])
def test_two_processes_learn_and_score_what_one_does(tmp_path, flags, size, accumulate):
    one, two = tmp_path / "one", tmp_path / "two"
    flags += ["--batch-size", size, "--accumulate", accumulate]
    alone = processes.start(processes.run, [*flags, "--out", one], tmp_path / "one.txt", processes.step_plainly)
    alone.join(120)
    assert alone.exitcode == 0, (tmp_path / "one.txt").read_text()
    together([*flags, "--out", two], tmp_path / "two.txt", processes.step_plainly)
    (weights, log, results), (other_weights, other_log, other_results) = read(one), read(two)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, atol=2e-5, rtol=1e-4)
    start = sdser.MultiExitSER(["a", "b"], tmp_path / "backbone").backbone.state_dict()
    moved = max((weights[f"backbone.{name}"] - value).abs().max() for name, value in start.items())
    assert moved > 1e-2, "far more than the tolerance"
    for a, b in zip(log, other_log):
        for name in ("loss", "ce", "kl", "hint"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
    assert results["dev"] == other_results["dev"] and results["test"] == other_results["test"]
    assert (tmp_path / "two.txt").read_text().count("epoch 1/2") == 1, "one process reports"
    together([two, "--json", tmp_path / "two.json"], tmp_path / "evaluated.txt", script="evaluate")
    rows = json.loads((tmp_path / "two.json").read_text())["rows"]
    assert [row["uar"] for row in rows[:3]] == [row["uar"] for row in results["test"]["exits"]]


def test_processes_draw_their_own_dropout_and_masks(tmp_path, flags):
    """With one seed for all, the clips of the processes would share them."""
    together([*flags, "--out", tmp_path / "run"], tmp_path / "run.txt", processes.tell_seeds)
    seeds = [line for line in (tmp_path / "run.txt").read_text().splitlines() if line.startswith("seed ")]
    assert len(seeds) == len(set(seeds)) == 4  # two epochs of two processes


@pytest.mark.slow
def test_torchrun(corpus, tmp_path):
    """The command as documented, and resumed by it."""
    flags = ["--data", str(corpus), "--epochs", "2", "--batch-size", "6", "--seconds", "0.3", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    run = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    done = subprocess.run([*torchrun, *flags, str(tmp_path / "run")], **run)
    assert done.returncode == 0 and done.stdout.count("epoch 1/2") == 1, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    done = subprocess.run([*torchrun, "--resume", "--out", str(tmp_path / "run")], **run)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"] == results
