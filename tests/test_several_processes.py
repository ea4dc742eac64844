"""Data-parallel training: what several processes learn is what one learns, and none waits for one that has died."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import LAYOUTS, build
from transformers import AutoModel

import sdser

ROOT = Path(__file__).parents[1]


def together(out, flags, before=None, world=2) -> list:
    """Runs the script in processes that form a group; returns them, ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = out.with_suffix(".txt")
    group = [processes.start(processes.fit_rank, rank, world, port, flags, text, before) for rank in range(world)]
    for process in group:
        process.join(300)
    return group


def alone(out, flags, target=processes.fit):
    process = processes.start(target, flags, out.with_suffix(".txt"))
    process.join()
    assert process.exitcode == 0, out.with_suffix(".txt").read_text()


@pytest.fixture
def backbone(tmp_path):
    """A folder of a backbone without dropout and masks: nothing is left to chance but the order."""
    config = LAYOUTS["wavlm-base"].to_dict() | dict(apply_spec_augment=False, mask_time_prob=0.0)
    config |= dict.fromkeys([name for name in config if "dropout" in name], 0.0)
    AutoModel.from_config(type(LAYOUTS["wavlm-base"])(**config)).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def flags(corpus, backbone, tmp_path):
    def make(out, *more):
        some = ["--data", corpus, "--backbone", backbone, "--preset", "toy", "--lr", 0.2, "--epochs", 2, *more]
        return list(map(str, [*some, "--out", tmp_path / out]))

    return make


def weights(folder):
    return torch.load(folder / "train_state.pt", weights_only=True)["model"]


@pytest.mark.parametrize(
    ("size", "accumulate"),
    [
        (5, 2),  # shares of 3 and 2 clips, a last batch of 2, a last step of one batch
        (2, 1),  # each process has one clip, so none of the other class
        (11, 1),  # a last batch of one clip: the other process has none
    ],
)
def test_two_processes_learn_what_one_learns(tmp_path, flags, size, accumulate):
    more = "--batch-size", size, "--accumulate", accumulate
    alone(tmp_path / "one", flags("one", *more), processes.fit_plainly)
    group = together(tmp_path / "two", flags("two", *more), processes.step_plainly)
    assert [process.exitcode for process in group] == [0, 0], (tmp_path / "two.txt").read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    start = sdser.MultiExitSER(["a", "b"], flags("x")[3]).backbone.state_dict()
    moved = max((one[f"backbone.{name}"] - value).abs().max() for name, value in start.items())
    assert moved > 1e-2, "far more than the tolerance"
    logs = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").open()] for out in ("one", "two")]
    for a, b in zip(*logs):
        assert [a[name] for name in ("loss", "ce", "kl", "hint")] == pytest.approx(
            [b[name] for name in ("loss", "ce", "kl", "hint")], rel=1e-3
        )
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two")]
    assert [results[0][split] for split in ("dev", "test")] == [results[1][split] for split in ("dev", "test")]
    text = (tmp_path / "two.txt").read_text()
    assert text.count("epoch 1/2") == text.count("in " + str(tmp_path / "two")) == 1, "one process reports"


def test_clips_that_a_process_cannot_read_weigh_nothing(corpus, tmp_path, flags, wav):
    """The loss is over the clips that could be read, wherever they were; all are listed in the log."""
    rows = [f"{corpus.parent}/{row}" for row in corpus.read_text().splitlines()[1:]]
    bad = [str(wav(np.full(8000, np.nan, dtype=np.float32), f"bad{i}.wav", subtype="FLOAT")) for i in range(5)]
    gone = str(tmp_path / "gone.wav")
    split = dict(zip("012345", ["train", "train", "dev", "dev", "test", "test"]))
    rows = [f"{row},{split[Path(row).name[0]]}" for row in rows]
    rows += [f"{path},anger,s0,train" for path in (*bad, gone)]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,label,speaker,split", *rows]))
    more = "--data", manifest, "--batch-size", 4, "--skip-bad"
    alone(tmp_path / "one", flags("one", *more), processes.fit_plainly)
    group = together(tmp_path / "two", flags("two", *more), processes.step_plainly)
    assert [process.exitcode for process in group] == [0, 0], (tmp_path / "two.txt").read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4)
    for out in ("one", "two"):
        log = [json.loads(line)["left_out"] for line in (tmp_path / out / "log.jsonl").open()]
        assert [sorted(paths) for paths in log] == [sorted([*bad, gone]), sorted(bad)]


def test_processes_draw_their_own_dropout_and_masks(tmp_path, flags):
    """With one seed for all, the clips of the processes would share them; a resumed run draws the same."""
    text = tmp_path / "run.txt"
    together(tmp_path / "run", flags("run"), processes.tell_seeds)
    seeds = [line for line in text.read_text().splitlines() if line.startswith("seed ")]
    assert len(set(seeds)) == len(seeds) == 4  # two epochs of two processes


@pytest.mark.parametrize("before", [processes.die_in_the_second_step, processes.hang_in_the_second_step])
def test_a_process_that_dies_or_hangs_stops_the_others(tmp_path, flags, before):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = tmp_path / "run.txt"
    some = flags("run", "--batch-size", 4)
    group = [processes.start(processes.fit_rank, rank, 2, port, some, text, before) for rank in (0, 1)]
    group[0].join(100)
    assert group[0].exitcode == 2, text.read_text()
    group[1].kill()
    group[1].join()
    error = [line for line in text.read_text().splitlines() if line.startswith("error: ")]
    assert error == ["error: another process of this run died or hung; see what it said, then --resume"]
    assert "Traceback" not in text.read_text()


def test_every_trained_parameter_gets_a_gradient(layout):
    """Data-parallel training waits for all of them: what no loss reaches must be frozen."""
    for changes in ({}, dict(apply_spec_augment=False)):
        model = build(layout, **changes).train()
        loss, _ = sdser.self_distillation_loss(model(torch.randn(2, 8000)), torch.tensor([0, 1]))
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_more_processes_than_clips_in_a_batch(tmp_path, flags):
    group = together(tmp_path / "run", flags("run", "--batch-size", 1))
    assert [process.exitcode for process in group] == [2, 2]
    assert "--batch-size 1: give at least one clip for each of 2 processes" in (tmp_path / "run.txt").read_text()


def test_evaluation_is_shared_out_and_is_what_one_process_says(corpus, tmp_path):
    """To the digit, but for what is timed: the JSON, the report, and the threshold that is kept."""
    alone(tmp_path / "run", ["--data", corpus, "--epochs", "2", "--batch-size", "4", "--out", tmp_path / "run"])
    found = []
    for world in (1, 2, 3):
        scored, text, out = tmp_path / "scored", tmp_path / f"{world}.txt", tmp_path / f"{world}.json"
        shutil.copytree(tmp_path / "run", scored)
        flags = scored, "--against", tmp_path / "run", "--batch-size", 5, "--json", out
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        group = [processes.start(processes.evaluate_rank, rank, world, port, flags, text) for rank in range(world)]
        for process in group:
            process.join(120)
        assert [process.exitcode for process in group] == [0] * world, text.read_text()
        report = re.sub(r" +\d+\.\d\b(?!\d)", "", text.read_text())  # milliseconds have one decimal place
        found.append([untimed(json.loads(out.read_text())), (scored / "config.json").read_text(), report])
        shutil.rmtree(scored)
    assert found[0] == found[1] == found[2]
    assert "early exit at confidence" in found[0][2] and found[0][0]["clips"] == 12


def untimed(results):
    """Without milliseconds, at any depth."""
    if isinstance(results, dict):
        return {name: untimed(value) for name, value in results.items() if name != "ms_per_clip"}
    return [untimed(value) for value in results] if isinstance(results, list) else results


@pytest.mark.slow
def test_torchrun(corpus, tmp_path):
    """The command as documented, killed once and resumed by it; ends as the run of one process does."""
    flags = ["--data", str(corpus), "--epochs", "6", "--batch-size", "6", "--seconds", "0.3", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    done = subprocess.run([*torchrun, *flags, str(tmp_path / "whole")], **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/6") == 1

    with open(tmp_path / "killed.txt", "w") as text:
        process = subprocess.Popen([*torchrun, *flags, str(tmp_path / "killed")], cwd=ROOT, env=environment,
                                   stdout=text, stderr=text, start_new_session=True)  # fmt: skip
    while "epoch 2/6" not in (tmp_path / "killed.txt").read_text():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run([*torchrun, "--resume", "--out", str(tmp_path / "killed")], **run)
    assert done.returncode == 0, done.stderr
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[name]), name
