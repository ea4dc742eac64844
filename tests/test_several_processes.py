"""Data-parallel training: what several processes learn and score is what one does."""

import json
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import NO_CHANCE, TINY, read_run
from transformers import AutoModel, WavLMConfig

import evaluate
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


def as_on_gpus() -> None:
    """Played: where there are GPUs, torch's default is a group for their tensors only, which NCCL serves."""
    processes.step_plainly()
    init, available = torch.distributed.init_process_group, torch.cuda.is_available

    def init_on_gpus(backend="cuda:nccl"):
        torch.cuda.is_available = available  # what follows looks for a real one
        init(backend.replace("nccl", "gloo"))

    torch.distributed.init_process_group = init_on_gpus
    torch.cuda.is_available = torch.distributed.is_nccl_available = lambda: True


# Shares of 3 and 2 clips and a last step of fewer batches; and a last batch of one clip, so that one process has none.
@pytest.mark.parametrize(("size", "accumulate", "before"), [(5, 2, processes.step_plainly), (17, 1, as_on_gpus)])
def test_two_processes_learn_and_score_what_one_does(corpus, tmp_path, size, accumulate, before):
    """Without dropout, masks and a limit to gradients, where the order alone is left to chance."""
    one, two, backbone = tmp_path / "one", tmp_path / "two", tmp_path / "backbone"
    AutoModel.from_config(WavLMConfig(**TINY, **NO_CHANCE)).save_pretrained(backbone)
    flags = ["--data", corpus, "--backbone", backbone, "--preset", "paper", "--window", "natural", "--lr", 0.05]
    flags += ["--epochs", 2, "--batch-size", size, "--accumulate", accumulate, "--device", "cpu"]
    alone = processes.start(processes.run, [*flags, "--out", one], tmp_path / "one.txt", processes.step_plainly)
    alone.join(120)
    assert alone.exitcode == 0, (tmp_path / "one.txt").read_text()
    together([*flags, "--out", two], tmp_path / "two.txt", before)
    weights, other_weights = (torch.load(out / "train_state.pt", weights_only=True)["model"] for out in (one, two))
    torch.testing.assert_close(other_weights, weights, atol=2e-5, rtol=1e-4)
    start = sdser.MultiExitSER(["a", "b"], backbone).backbone.state_dict()
    moved = max((weights[f"backbone.{name}"] - value).abs().max() for name, value in start.items())
    assert moved > 1e-2, "far more than the tolerance"
    (results, log), (other_results, other_log) = read_run(one), read_run(two)
    for a, b in zip(log, other_log):
        for name in ("loss", "ce", "kl", "hint"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
    assert results["dev"] == other_results["dev"] and results["test"] == other_results["test"]
    text = (tmp_path / "two.txt").read_text()
    assert text.count("epoch 1/2") == 1, "one process reports"
    assert len(set(re.findall(r"seed (\d+)", text))) == 4, "each process and epoch draws its own dropout and masks"
    together([two, "--json", tmp_path / "two.json"], tmp_path / "evaluated.txt", script="evaluate")
    rows = json.loads((tmp_path / "two.json").read_text())["rows"]
    assert [row["uar"] for row in rows[:3]] == [row["uar"] for row in results["test"]["exits"]]


def test_only_torchruns_variables_make_a_process_one_of_several(monkeypatch, refused):
    """Where RANK stands alone, as some clusters set it, or nothing is in it, the process speaks and saves."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for variables, rank in (("RANK=1", 0), ("RANK= WORLD_SIZE=", 0), ("RANK=1 WORLD_SIZE=2", 1)):
        for variable in variables.split():
            monkeypatch.setenv(*variable.split("="))
        assert runpy.run_path(evaluate.__file__)["RANK"] == rank
    monkeypatch.delenv("RANK"), monkeypatch.setattr(evaluate, "WORLD", 2)
    assert "WORLD_SIZE" in refused(evaluate, "no-checkpoint")


@pytest.mark.slow
def test_torchrun(corpus, tmp_path):
    """The command as documented, and resumed by it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    results = []
    for flags in (f"--data {corpus} --backbone tiny --epochs 2 --batch-size 6 --seconds 0.3", "--resume"):
        command = [*torchrun, "--out", str(tmp_path), *flags.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(read_run(tmp_path)[0]["test"])
    assert results[0] == results[1]
