"""Exported files stand alone and answer as the model does; the benchmark measures what it says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import LABELS, build

import benchmark_edge
import evaluate
import sdser


@pytest.fixture
def model():
    return sharpen(build())


def sharpen(model):
    """Random heads answer much the same to everything; larger weights make a mistake before them visible."""
    with torch.no_grad():
        for head in model.heads.values():
            head.classifier.weight *= 3
    return model


@torch.no_grad()
def probabilities(model, waveform, exit):
    return model(waveform, exit=exit)[0].logits.softmax(-1)


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as end:
        benchmark_edge.main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err


# -- files to ship ----------------------------------------------------------------------------------------------------

# Programs of their own: file, then clips -> answers and labels.
LOAD = {
    ".pt2": """
import json, sys, numpy, torch
extra = {"labels.json": ""}
run = torch.export.load(sys.argv[1], extra_files=extra).module()
answers = [run(torch.from_numpy(numpy.load(path))).tolist() for path in sys.argv[2:]]
labels = json.loads(extra["labels.json"])
""",
    ".onnx": """
import json, sys, numpy, onnxruntime
run = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
answers = [run.run(None, {"waveform": numpy.load(path)})[0].tolist() for path in sys.argv[2:]]
labels = json.loads(run.get_modelmeta().custom_metadata_map["labels"])
assert "torch" not in sys.modules
""",
}
REPORT = 'assert "sdser" not in sys.modules\nprint(json.dumps([answers, labels]))'


@pytest.mark.parametrize(
    ("ending", "backend", "head", "tolerance"),
    [
        (".pt2", "fp32", "gru", 1e-5),
        (".pt2", "bf16", "attention", 0.05),
        pytest.param(".pt2", "fp32", "lstm", 1e-5, marks=pytest.mark.slow),
        (".onnx", "fp32", "gru", 1e-5),
        (".onnx", "int8", "attention", 0.05),
        pytest.param(".onnx", "fp32", "lstm", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_exported_files_stand_alone(tmp_path, ending, backend, head, tolerance):
    model, path = sharpen(build(head=head)), tmp_path / f"model{ending}"
    if ending == ".onnx":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model.save_pretrained(tmp_path / "run")
    benchmark_edge.main([str(tmp_path / "run"), "--export", str(path), "--exit", "2", "--backend", backend])
    assert {file.name for file in tmp_path.iterdir()} == {"run", path.name}

    clips = [torch.randn(1, samples) for samples in (720, 3000, 20_000)]
    for i, clip in enumerate(clips):
        np.save(tmp_path / f"{i}.npy", clip.numpy())
    command = [sys.executable, "-c", LOAD[ending] + REPORT, path.name, "0.npy", "1.npy", "2.npy"]
    answers, labels = json.loads(subprocess.check_output(command, cwd=tmp_path))
    assert labels == LABELS
    for clip, answer in zip(clips, answers, strict=True):
        assert (torch.tensor(answer) - probabilities(model, clip, 2)).abs().max() < tolerance
    if backend == "int8":  # two products of 7-bit weights and 8-bit inputs fit into 16 bits
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        weights = [weight for weight in weights if weight.dtype == np.int8 and weight.ndim == 2]
        assert len(weights) >= 12  # of two layers
        assert max(np.abs(weight.astype(int)).max() for weight in weights) in (63, 64)


def test_a_folder_is_a_checkpoint_of_that_exit(tmp_path, capsys, model):
    model.save_pretrained(tmp_path / "run")
    benchmark_edge.main([str(tmp_path / "run"), "--export", str(tmp_path / "small"), "--exit", "1"])
    small, clip = sdser.MultiExitSER.from_pretrained(tmp_path / "small"), torch.randn(1, 9000)
    assert small.exits == [1] and torch.equal(probabilities(small, clip, 1), probabilities(model, clip, 1))
    assert "small" in refused(capsys, tmp_path / "run", "--export", tmp_path / "small")  # holds files
    assert sdser.MultiExitSER.from_pretrained(tmp_path / "small").exits == [1]


def test_export_of_a_tiled_model_tiles(tmp_path, model):
    model.tile_seconds, path = 0.5, str(tmp_path / "model.pt2")
    benchmark_edge.export(model, 1, "fp32", path)
    run = benchmark_edge.runner(path, "fp32", 1)
    for samples in (3000, 8000, 9000):
        waveform = torch.randn(samples)
        [wanted] = model.classify([waveform], exit=1)
        assert run(waveform[None])[0].tolist() == pytest.approx(list(wanted.probabilities.values()), abs=1e-5)


def test_exports_are_checked_on_the_checkpoints_test_clips(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=5000), 16_000)
    (tmp_path / "split.csv").write_text("path,label,speaker,split\na.wav,joy,x,test\nb.wav,joy,y,train\n")
    [clip] = benchmark_edge.load_clips(benchmark_edge.parse_args([str(tmp_path)]))
    assert len(clip) == 5000


@pytest.mark.parametrize(("name", "backend"), [("x.pt2", "int8"), ("x.onnx", "bf16"), ("x", "bf16"), ("x.pt", "fp32")])
def test_pairs_that_cannot_be_written_are_refused(tmp_path, capsys, name, backend):
    path = tmp_path / name
    assert str(path) in refused(capsys, "--backbone", "tiny", "--export", path, "--backend", backend)
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime" in refused(capsys, "--backbone", "tiny", "--export", tmp_path / "x.onnx")
    assert not [name for name in benchmark_edge.available_backends() if name.startswith("onnx")]


# -- the benchmark ----------------------------------------------------------------------------------------------------


def test_benchmark_of_a_checkpoint(tmp_path, capsys, model):
    pytest.importorskip("matplotlib")
    pytest.importorskip("onnxscript")
    backends = ["fp32", "onnxruntime"]
    model.save_pretrained(tmp_path / "run")
    flags = ["--exits", "2", "--seconds", "0.2", "0.3", "--threads", "1", "--rounds", "3", "--budget-ms", "60000"]
    flags += ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"), "--backends", *backends]
    benchmark_edge.main([str(tmp_path / "run"), *flags])
    machine, rows = json.loads((tmp_path / "a.json").read_text()).values()
    assert machine["cores"] >= 1 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    wanted = [(backend, seconds) for backend in backends for seconds in (0.2, 0.3)]
    assert [(row["backend"], row["seconds"]) for row in rows] == wanted
    parameters = sum(p.numel() for p in model.truncate(2).parameters())
    for row in rows:
        assert (row["exit"], row["threads"], row["parameters"]) == (2, 1, parameters)
        assert row["macs"] == evaluate.count_macs(model, round(16_000 * row["seconds"]), 2)
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["max_probability_change"] < 1e-5
        assert 4 * parameters <= 1e6 * row["size_mb"] <= 4 * parameters + 300_000  # and a header, or a graph
        assert 20 < row["peak_rss_mb"] < 5000
    assert rows[2]["peak_rss_mb"] < rows[0]["peak_rss_mb"]  # without torch
    assert "exit 2" in capsys.readouterr().out


def test_budget():
    rows = []
    for exit, backend, ms, change in (3, "a", 55, 0.0), (3, "b", 25, 0.1), (12, "a", 75, 1e-7), (12, "b", 45, 0.2):
        rows.append({"exit": exit, "backend": backend, "p95_ms": ms, "max_probability_change": change})
    assert "exit 12 by b" in benchmark_edge.fit_budget(rows, 60)
    assert "exit 12 by a" in benchmark_edge.fit_budget(rows, 76)  # changes least
    assert "exit 3 by b" in benchmark_edge.fit_budget(rows, 30)
    assert "exit 3 by b" in benchmark_edge.fit_budget(rows, 10)  # nothing fits, this is nearest


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--backbone"),
        (["no-checkpoint"], "no-checkpoint"),
        (["--backbone", "tiny", "--exits", "9"], "9"),
        (["--backbone", "tiny", "--threads", "0"], "--threads"),
        (["no-checkpoint", "--json", "/nonexistent/a.json"], "/nonexistent/a.json"),
        (["no-checkpoint", "--plot", "/nonexistent/a.png"], "/nonexistent/a.png"),
        (["no-checkpoint", "--export", "/nonexistent/a.pt2"], "/nonexistent/a.pt2"),
        (["no-checkpoint", "--export", f"{__file__}/a"], f"{__file__}/a"),
    ],
)
def test_what_is_refused_before_any_work(capsys, flags, named):
    assert named in refused(capsys, *flags)


# -- copies for the CPU: all below is about `optimize_for_cpu` and what it packs --------------------------------------

# Of embeddings, relative: float32 rounding, 8 bits of mantissa, 8 and 7 bits of weights and activations.
TOLERANCE = {"fp32": 1e-5, "onednn": 1e-5, "bf16": 0.05, "int8": 0.2}


@pytest.fixture(params=TOLERANCE)
def backend(request):
    if request.param == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 here")
    return request.param


@torch.no_grad()
def embeddings(model, *args):
    return torch.stack([output.embedding for output in model(*args)])  # (exits, B, D)


def relative(found, wanted):
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


def test_a_copy_answers_as_the_model_does(layout, backend):
    model = build(layout, exits=(1, 2, 3, 4), head=list(sdser.HEADS))
    clip, batch, lengths = torch.randn(1, 9000), torch.randn(3, 8000), torch.tensor([8000, 500, 6000])
    inputs = [(clip,), (batch, lengths), (batch,)]
    before = [embeddings(model, *args) for args in inputs]
    fast = benchmark_edge.optimize_for_cpu(model, backend)
    after = [embeddings(fast, *args) for args in inputs]
    for found, wanted in zip(after, before):
        assert relative(found, wanted) < TOLERANCE[backend]
    # the model is what it was: it answers the same and learns, and the copy does not learn with it
    assert torch.equal(embeddings(model, clip), before[0]) and fast.backend == backend
    model.train()(clip)[-1].logits.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(embeddings(fast, clip), after[0])


def test_the_first_layer_in_one_pass_holds_for_any_signal():
    layer = build().backbone.feature_extractor.conv_layers[0].requires_grad_(False)
    layer.layer_norm.weight.normal_()
    layer.layer_norm.bias.normal_()
    packed = benchmark_edge.NormalizedConv(layer, torch.float32)
    for signal in (torch.randn(8000), torch.sin(torch.arange(8000) / 27) + 3, torch.zeros(8000)):
        assert torch.allclose(packed(signal[None, None]), layer(signal[None, None]), atol=1e-4)


def test_what_a_copy_cannot_do_is_refused(tmp_path, monkeypatch):
    fast = benchmark_edge.optimize_for_cpu(build(), "auto")
    assert fast.backend in ("fp32", "onednn")  # the exact ones
    for forbidden in (
        lambda: fast.save_pretrained(tmp_path / "x"),
        lambda: fast.truncate(1),
        lambda: benchmark_edge.optimize_for_cpu(fast),
        lambda: benchmark_edge.optimize_for_cpu(build(), "fastest"),
    ):
        with pytest.raises(ValueError):
            forbidden()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="oneDNN"):
        benchmark_edge.optimize_for_cpu(build(), "onednn")
    assert not list(tmp_path.iterdir())
