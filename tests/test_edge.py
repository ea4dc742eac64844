"""Exported files stand alone and answer as the model does; the benchmark measures what it says."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import LABELS, build
from transformers import pipeline

import benchmark_edge
import evaluate
import sdser

needs_onnx = pytest.mark.skipif(not benchmark_edge.has_onnx(), reason="no onnx")


def sharp(*args, **kwargs):
    """Random heads answer much the same to everything; larger weights make a mistake before them visible."""
    model = build(*args, **kwargs)
    for head in model.heads.values():
        head.classifier.weight.data *= 3
    return model


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as end:
        benchmark_edge.main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err


# -- files to ship ----------------------------------------------------------------------------------------------------
ALONE = """
import json, sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
answers = [session.run(None, {"waveform": numpy.load(path)})[0].tolist() for path in sys.argv[2:]]
assert not {"torch", "sdser"} & set(sys.modules)
print(json.dumps([answers, json.loads(session.get_modelmeta().custom_metadata_map["labels"])]))
"""


def run_alone(path, clips) -> tuple[list, list]:
    """Returns what a process that imports neither torch nor this project makes of the clips; and the file's labels."""
    for i, clip in enumerate(clips):
        np.save(path.parent / f"{i}.npy", clip[None].numpy())
    files = [path.name, *(f"{i}.npy" for i in range(len(clips)))]
    return json.loads(subprocess.check_output([sys.executable, "-c", ALONE, *files], cwd=path.parent))


@needs_onnx
@pytest.mark.parametrize(("backend", "head", "tolerance"), [
    ("fp32", "gru", 1e-5), ("int8", "attention", 0.05),
    pytest.param("fp32", "lstm", 1e-5, marks=pytest.mark.slow),
])  # fmt: skip
def test_exported_files_stand_alone(tmp_path, backend, head, tolerance):
    model, path = sharp(head=head), tmp_path / "model.onnx"
    model.save_pretrained(tmp_path / "run")
    flags = [str(tmp_path / "run"), "--export", str(path), "--exit", "2", "--backend", backend]
    benchmark_edge.main(flags)
    assert {file.name for file in tmp_path.iterdir()} == {"run", path.name}
    clips = [torch.randn(samples) for samples in (720, 3000, 20_000)]
    answers, labels = run_alone(path, clips)
    assert labels == LABELS
    for [answer], wanted in zip(answers, model.classify(clips, exit=2), strict=True):
        assert answer == pytest.approx(list(wanted.probabilities.values()), rel=0, abs=tolerance)
    if backend == "int8":  # two products of 7-bit weights and 8-bit inputs fit into 16 bits
        import onnx

        weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        weights = [weight for weight in weights if weight.dtype == np.int8 and weight.ndim == 2]
        assert len(weights) >= 12  # of two layers
        assert max(np.abs(weight.astype(int)).max() for weight in weights) in (63, 64)


def test_a_folder_is_a_checkpoint_of_that_exit(tmp_path, capsys):
    model = sharp()
    model.save_pretrained(tmp_path / "run")
    benchmark_edge.main([str(tmp_path / "run"), "--export", str(tmp_path / "small"), "--exit", "1"])
    small, clip = sdser.MultiExitSER.from_pretrained(tmp_path / "small"), torch.randn(9000)
    assert small.exits == [1] and small.classify(clip)[0].probabilities == model.classify(clip, exit=1)[0].probabilities
    assert "small" in refused(capsys, tmp_path / "run", "--export", tmp_path / "small")  # holds files
    assert sdser.MultiExitSER.from_pretrained(tmp_path / "small").exits == [1]


@needs_onnx
def test_the_lines_for_a_device_run_the_onnx(tmp_path):
    """Those of docs/edge.md, in a process that imports neither torch nor this project."""
    model, doc = sharp(), (Path(__file__).parents[1] / "docs" / "edge.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    benchmark_edge.export(model, 2, "fp32", str(tmp_path / "model.onnx"))
    soundfile.write(tmp_path / "clip.wav", 0.1 * np.random.default_rng(0).normal(size=9000), 16_000)
    code = block + "import sys\nassert not {'torch', 'sdser'} & set(sys.modules)\n"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    [wanted] = model.classify(tmp_path / "clip.wav", exit=2)
    assert printed == f"{wanted.label} ({wanted.confidence:.2f})\n"


def test_the_pipeline_of_transformers_runs_an_exit_with_a_mean_head(tmp_path, layout):
    model, clip, folder = sharp(layout, head="mean"), 0.1 * torch.randn(9000) + 0.1, str(tmp_path / "exit")
    model.save_pretrained(tmp_path / "run")
    with pytest.warns(UserWarning, match="padding"):
        benchmark_edge.main([str(tmp_path / "run"), "--export", folder, "--exit", "2", "--backend", "transformers"])
    answers = pipeline("audio-classification", model=folder, top_k=None)(clip.numpy())
    [wanted] = model.classify(clip, exit=2)
    assert {row["label"]: row["score"] for row in answers} == pytest.approx(wanted.probabilities, abs=2e-6)
    with pytest.raises(ValueError, match="gru"):  # transformers has mean heads alone
        benchmark_edge.export(build(), 2, "transformers", folder)


def test_exports_are_checked_on_the_checkpoints_test_clips(wav, tmp_path):
    wav(np.random.default_rng(0).normal(size=5000), "a.wav")
    (tmp_path / "split.csv").write_text("path,label,speaker,split\na.wav,joy,x,test\nb.wav,joy,y,train\n")
    assert [clip.shape for clip in benchmark_edge.load_clips(str(tmp_path))] == [(1, 5000)]


@pytest.mark.parametrize("flags", [
    ["--backend", "int8", "--export", "model"], ["--backend", "transformers", "--export", "model.onnx"],
    ["--backend", "bf16", "--export", "small"], ["--export", "model.pt2"], ["--export", "model.onnx"],
    ["--export", f"{__file__}/a.onnx"], ["--json", "/nonexistent/a.json"], ["--plot", "/nonexistent/a.png"],
])  # fmt: skip
def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch, flags):
    """Even before the checkpoint, which is not there; nor is the package onnx."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert flags[-1] in refused(capsys, "no-checkpoint", *flags)
    assert not any(tmp_path.iterdir())


# -- the benchmark ----------------------------------------------------------------------------------------------------
@needs_onnx
def test_benchmark_of_a_checkpoint(tmp_path):
    pytest.importorskip("matplotlib")
    model, backends = sharp(), ["torch", "onnxruntime", "onnxruntime-int8"]
    model.save_pretrained(tmp_path / "run")
    flags = ["--exits", "2", "--seconds", "0.2", "0.3", "--threads", "1", "--rounds", "3", "--budget-ms", "60000"]
    flags += ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"), "--backends", *backends]
    benchmark_edge.main([str(tmp_path / "run"), *flags])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    wanted = [(backend, seconds) for backend in backends for seconds in (0.2, 0.3)]
    assert [(row["backend"], row["seconds"]) for row in rows] == wanted
    parameters = sum(p.numel() for p in model.truncate(2).parameters())
    for row in rows:
        assert (row["exit"], row["threads"], row["parameters"]) == (2, 1, parameters)
        assert row["macs"] == evaluate.count_macs(model, round(16_000 * row["seconds"]), 2)
        int8 = row["backend"].endswith("int8")
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["max_probability_change"] < (0.1 if int8 else 1e-5)
        assert int8 or 4 * parameters <= 1e6 * row["size_mb"] <= 4 * parameters + 300_000  # and a header, or a graph
        assert 20 < row["peak_rss_mb"] < 5000
    assert rows[2]["peak_rss_mb"] < rows[0]["peak_rss_mb"]  # without torch


def test_budget():
    cells = (3, "torch", 55, 0.0), (3, "onnxruntime", 25, 0.1), (12, "torch", 75, 1e-7), (12, "onnxruntime", 45, 0.2)
    rows = [dict(zip(("exit", "backend", "p95_ms", "max_probability_change"), cell)) for cell in cells]
    assert "--exit 12 --export model.onnx" in benchmark_edge.fit_budget(rows, 60)
    assert "--exit 12 --export model " in benchmark_edge.fit_budget(rows, 76)  # changes least
    assert "--exit 3 --export model.onnx" in benchmark_edge.fit_budget(rows, 30)
    assert "exit 3 by onnxruntime" in benchmark_edge.fit_budget(rows, 10)  # nothing fits, this is nearest
