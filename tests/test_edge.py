"""Exported files stand alone and answer as the model does; the benchmark measures what it says."""

import importlib.util
import json
import re
import subprocess
import sys
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import LABELS, build, macs_by_hand, refuses
from transformers import pipeline

import benchmark_edge
import evaluate
import sdser

needs_onnx = pytest.mark.skipif(not benchmark_edge.has_onnx(), reason="no onnx")


def saved(folder, *args, **kwargs) -> sdser.MultiExitSER:
    """Random heads answer much the same to everything; larger weights make a mistake before them visible."""
    model = build(*args, **kwargs)
    for head in model.heads.values():
        head.classifier.weight.data *= 3
    model.save_pretrained(folder)
    return model


def export(run, path, exit, precision="fp32") -> None:
    benchmark_edge.main(f"{run} --export {path} --exit {exit} --precision {precision} --threads 1".split())


def run_alone(folder, clip) -> tuple[str, list, list]:
    """What the lines of docs/edge.md print, without torch and this project; the probabilities; the .onnx's labels."""
    [code] = re.findall(r"```python\n(.*?)```", (evaluate.HERE / "docs/edge.md").read_text("utf-8"), re.DOTALL)
    code += "import sys\nassert not {'torch', 'sdser'} & set(sys.modules)\n"
    code += "print(json.dumps([probabilities.tolist(), labels]))"
    soundfile.write(folder / "clip.wav", clip.numpy(), 16_000, subtype="FLOAT")
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).splitlines()
    return printed[0], *json.loads(printed[1])


@needs_onnx
@pytest.mark.parametrize(("precision", "head", "tolerance", "tile_seconds"), [
    ("fp32", "gru", 1e-5, None), ("fp16", "stats", 0.005, 0.5), ("int8", "attention", 0.05, None),
    pytest.param("fp32", "lstm", 1e-5, None, marks=pytest.mark.slow),
])  # fmt: skip
def test_exported_files_stand_alone(tmp_path, precision, head, tolerance, tile_seconds):
    """Also those of a model trained on tiles; they hold nothing of this machine, and nothing that runtimes refuse."""
    onnx = pytest.importorskip("onnx")
    model, path = saved(tmp_path / "run", head=head, tile_seconds=tile_seconds), tmp_path / "model.onnx"
    export(tmp_path / "run", path, 2, precision)
    assert {file.name for file in tmp_path.iterdir()} == {"run", path.name}
    for samples in (720, 3000, 20_000):
        clip = torch.randn(samples)
        line, probabilities, labels = run_alone(tmp_path, clip)
        [wanted] = model.classify(clip, exit=2)
        assert dict(zip(labels, probabilities)) == pytest.approx(wanted.probabilities, rel=0, abs=tolerance)
        assert labels == LABELS and (precision != "fp32" or line == f"{wanted.label} ({wanted.confidence:.2f})")
    graph = onnx.load(path).graph
    assert not re.search(f"site-packages|{tmp_path}".encode(), path.read_bytes())
    assert "IsNaN" not in {node.op_type for node in graph.node}
    halves = sum(np.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16)
    assert (halves > 10_000) == (precision == "fp16")
    if precision == "int8":  # two products of 7-bit weights and 8-bit inputs fit into 16 bits
        scales = [tensor for tensor in graph.initializer if tensor.name.endswith("_scale") and tensor.dims]
        assert max(np.prod(tensor.dims) for tensor in scales) == 256, "a scale for each channel"
        weights = map(onnx.numpy_helper.to_array, graph.initializer)
        largest = [np.abs(x.astype(int)).max() for x in weights if x.dtype == np.int8 and x.ndim == 2]
        assert len(largest) >= 12 and max(largest) in (63, 64)  # of two layers


def test_folders_run_here_and_in_the_pipeline_of_transformers(tmp_path, layout, capsys, refused):
    """Also where the backbone's config asks for a weighted sum of layers, which this model does not have."""
    run, folder, clip = tmp_path / "run", tmp_path / "exit", 0.1 * torch.randn(9000) + 0.1
    [wanted] = saved(run, layout, head="mean", use_weighted_layer_sum=True).classify(clip, exit=2)
    export(run, tmp_path / "small", 2)
    assert "small" in refused(benchmark_edge, run, "--export", tmp_path / "small")  # holds files
    small = sdser.MultiExitSER.from_pretrained(tmp_path / "small")
    assert small.exits == [2] and small.classify(clip)[0].probabilities == pytest.approx(wanted.probabilities, abs=1e-6)
    with pytest.warns(UserWarning, match="padding"):
        export(run, folder, 2, "transformers")
    assert float(capsys.readouterr().out.partition("by more than ")[2].split()[0]) < 2e-6  # loaded back and compared
    answers = pipeline("audio-classification", model=str(folder), top_k=None)(clip.numpy())
    assert {row["label"]: row["score"] for row in answers} == pytest.approx(wanted.probabilities, abs=2e-6)
    refuses("gru", benchmark_edge.export, build(), 2, [("transformers", str(folder))])  # it has mean heads alone


def test_exports_are_checked_on_the_checkpoints_test_clips_or_else_on_real_speech(wav, tmp_path):
    wav(np.random.default_rng(0).normal(size=5000), "a.wav")
    (tmp_path / "split.csv").write_text("path,label,speaker,split\na.wav,joy,x,test\nb.wav,joy,y,train\n")
    clips, source = benchmark_edge.load_clips(str(tmp_path), LABELS)
    assert [clip.shape for clip in clips] == [(1, 5000)] and "test split" in source
    (tmp_path / "a.wav").unlink()
    with pytest.warns(UserWarning, match=r"a\.wav"):  # and it is said why
        clips, source = benchmark_edge.load_clips(str(tmp_path), LABELS)
    first = sdser.load_audio(sorted((evaluate.DATA / "emodb").glob("*.ogg"))[0])
    assert len(clips) == 8 and source == "data/emodb" and np.array_equal(clips[0][0], first)


def test_what_cannot_be_written_or_would_fail_later_is_refused_before_the_work(tmp_path, refused, monkeypatch):
    """Even before the checkpoint, which is at first not there; nor is the package onnx, or openvino."""
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        patch.chdir(tmp_path)
        for flags in (
            "--precision int8 --export model", "--precision transformers --export model.onnx", "--json /nowhere/a.json",
            "--precision bf16 --export small", "--export model.pt2", "--export model.onnx", "--plot /nowhere/a.png",
            f"--export {__file__}/a.onnx", "--backends openvino",
        ):  # fmt: skip
            assert flags.split()[-1] in refused(benchmark_edge, "no-checkpoint", *flags.split())
        assert not any(tmp_path.iterdir())
    model = saved(tmp_path)
    monkeypatch.setattr(benchmark_edge, "has_onnx", lambda: True)
    monkeypatch.setattr(benchmark_edge, "run_apart", Mock(side_effect=sdser.InputError("at work")))
    for spare, said in ((0, "at work"), (-1, "GiB")):
        monkeypatch.setattr(benchmark_edge, "LARGEST_ONNX", 4 * evaluate.count_parameters(model, [4]) + spare)
        assert said in refused(benchmark_edge, tmp_path, "--exits", 2, 4, "--backends", "torch", "onnxruntime")
    for flag in ("--json=a.json", "--plot=a.png", "--budget-ms=80"):  # an export measures nothing
        assert flag.partition("=")[0] in refused(benchmark_edge, tmp_path, "--export", tmp_path / "a.onnx", flag)


@needs_onnx
def test_benchmark_of_a_checkpoint_on_as_many_threads_as_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model, backends = saved(tmp_path / "run"), ["torch", "onnxruntime", "onnxruntime-int8"]
    flags = f"{tmp_path}/run --json {tmp_path}/a.json --plot {tmp_path}/a.png --exits 2 --seconds 0.2 0.3 --threads 1 "
    benchmark_edge.main([*f"{flags} --rounds 3 --budget-ms 60000 --backends".split(), *backends])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["backend"], row["seconds"]) for row in rows] == list(product(backends, (0.2, 0.3)))
    parameters = sum(p.numel() for p in model.truncate(2).parameters())
    for row in rows:
        int8 = row["backend"].endswith("int8")
        assert (row["exit"], row["threads"], row["parameters"]) == (2, 1, parameters)
        assert row["macs"] == pytest.approx(macs_by_hand(round(16_000 * row["seconds"]), 2, "gru")[0], rel=0.005)
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["max_probability_change"] < (0.1 if int8 else 1e-5)
        assert int8 or 4 * parameters <= 1e6 * row["size_mb"] <= 4 * parameters + 300_000  # and a header, or a graph
        assert 20 < row["peak_rss_mb"] < 5000
    assert rows[2]["peak_rss_mb"] < rows[0]["peak_rss_mb"]  # without torch
    monkeypatch.setattr("onnxruntime.InferenceSession", session := Mock())
    for threads in (1, 3):
        benchmark_edge.load_onnxruntime("a.onnx", threads)
        assert session.call_args.args[1].intra_op_num_threads == threads


@pytest.mark.parametrize(("flags", "heads"), [("", ["stats", "stats"]), ("--head gru", ["gru", "mean"])])
def test_medians_tails_changes_and_heads(tmp_path, monkeypatch, capsys, flags, heads):
    """Of made-up times and errors; a built-in shape gets the heads of `fast`, or those asked for."""
    clock, peak = Mock(now=0.0), None if flags else 4800  # None: where the system does not tell

    def load(path, threads):
        model, exit, calls = benchmark_edge.load_torch(path, threads), int(re.search(r"(\d)-fp32", path)[1]), []

        def run(waveform):
            calls.append(1)
            slow = (99, 99, 1, 1, 2, 2, 12)[(len(calls) - 1) // 3]  # two rounds that warm up, five that count
            clock.now += slow * threads * exit * waveform.size / 1_600_000
            return np.add(model(waveform), np.eye(7)[:1] * 0.1 * exit * (len(calls) == 2))  # wrong about one clip

        return run

    monkeypatch.setitem(benchmark_edge.BACKENDS, "torch", (load, "", "fp32"))
    monkeypatch.setattr(benchmark_edge, "time", Mock(perf_counter=lambda: clock.now))
    monkeypatch.setattr(benchmark_edge, "exact_probabilities", exact := Mock(wraps=benchmark_edge.exact_probabilities))
    monkeypatch.setattr(benchmark_edge, "run_apart", exec)  # in this process, which is faster
    monkeypatch.setattr(torch, "set_num_threads", Mock())
    monkeypatch.setattr(benchmark_edge, "peak_megabytes", lambda *args: peak and args[3])
    flags += " --backbone tiny --exits 1 2 --seconds 0.1 0.3 --threads 2 1 --rounds 5 --backends torch --json"
    benchmark_edge.main([*flags.split(), str(tmp_path / "a.json")])
    rows, unit = json.loads((tmp_path / "a.json").read_text())["rows"], [2, 6, 1, 3, 4, 12, 2, 6]  # ms
    seen = [[row[name] for row in rows] for name in ("p50_ms", "p95_ms", "max_probability_change")]
    expected = [np.multiply(2, unit), np.multiply(10, unit), [0.1] * 4 + [0.2] * 4]
    assert np.array(seen) == pytest.approx(np.array(expected), abs=1e-5)
    assert all(row["peak_rss_mb"] == peak for row in rows) and exact.call_args.args[0].head_kinds == heads
    row = rf"2 +2 +torch +8\.0 \( 40\.0\) +24\.0 \(120\.0\) +{peak or 'nan'} +[\d.]+  2e-01\n"
    assert re.search(row, capsys.readouterr().out)


def test_a_process_that_fails_says_why_and_the_budget_decides():
    for end, said in (("raise ValueError('no room')", "no room"), ("os._exit(9)", "status 9")):
        refuses(said, benchmark_edge.run_apart, f"import os\n{end}")
    cells = (3, "torch", 55, 0.0), (3, "onnxruntime", 25, 0.1), (12, "torch", 75, 1e-7), (12, "onnxruntime", 45, 0.2)
    rows = [dict(zip(("exit", "backend", "p95_ms", "max_probability_change"), cell)) for cell in cells]
    assert "--exit 12 --export model.onnx" in benchmark_edge.fit_budget(rows, 60)
    assert "--exit 12 --export model " in benchmark_edge.fit_budget(rows, 76)  # changes least
    assert "--exit 3 --export model.onnx" in benchmark_edge.fit_budget(rows, 30)
    assert "exit 3 by onnxruntime" in benchmark_edge.fit_budget(rows, 10)  # nothing fits, this is nearest
