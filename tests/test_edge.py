"""Copies made for the CPU answer as the model does; the benchmark measures what it says; exported files stand alone."""

import builtins
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

# Of embeddings, relative: float32 rounding, 8 bits of mantissa, 8 and 7 bits of weights and activations.
TOLERANCE = {"fp32": 1e-5, "onednn": 1e-5, "bf16": 0.05, "int8": 0.2}


def backends():
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [pytest.param(name, marks=pytest.mark.skipif(name == "bf16" and not bf16, reason="no bfloat16 here"))
            for name in TOLERANCE]  # fmt: skip


@torch.no_grad()
def probabilities(model, *args, **kwargs):
    return torch.stack([output.logits.softmax(-1) for output in model(*args, **kwargs)])


@torch.no_grad()
def embeddings(model, *args, **kwargs):
    return torch.stack([output.embedding for output in model(*args, **kwargs)])  # (exits, B, D)


def relative(found, wanted):
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


def sharpen(model):
    """Random heads answer much the same to everything; larger weights make a mistake before them visible."""
    with torch.no_grad():
        for head in model.heads.values():
            head.classifier.weight *= 3
    return model


# -- copies for the CPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends())
def test_a_copy_answers_as_the_model_does(layout, backend):
    model = build(layout)
    clip, batch, lengths = torch.randn(1, 9000), torch.randn(3, 8000), torch.tensor([8000, 500, 6000])
    inputs = [(clip,), (batch, lengths), (batch,)]
    before = [embeddings(model, *args) for args in inputs]
    fast = benchmark_edge.optimize_for_cpu(model, backend)
    after = [embeddings(fast, *args) for args in inputs]
    for found, wanted in zip(after, before):
        assert relative(found, wanted) < TOLERANCE[backend]
    assert fast.backend == backend and not isinstance(model, benchmark_edge.CPUCopy)
    # the model is what it was: it answers the same and learns, and the copy does not learn with it
    assert torch.equal(embeddings(model, clip), before[0])
    model.train()(clip)[-1].logits.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(embeddings(fast, clip), after[0])


@pytest.mark.parametrize("head", sdser.HEADS)
@pytest.mark.parametrize("backend", backends())
def test_every_head(head, backend):
    model = build(head=[head] * 3)
    fast = benchmark_edge.optimize_for_cpu(model, backend)
    batch, lengths = torch.randn(2, 9000), torch.tensor([9000, 5000])
    assert relative(embeddings(fast, batch, lengths), embeddings(model, batch, lengths)) < TOLERANCE[backend]
    [one], [same] = fast.classify([batch[0]], exit=1), model.classify([batch[0]], exit=1)
    assert one.confidence == pytest.approx(same.confidence, abs=0.02)
    logits, exits = fast.early_exit(batch, lengths, threshold=0.5)
    assert logits.shape == (2, 3) and set(exits.tolist()) <= {1, 2, 4}


@pytest.mark.parametrize("head", ["gru", "lstm"])
def test_bf16_is_bfloat16_all_through(head):
    """Recurrent heads too: nothing in it is int8, and it is closer to the model than int8 is."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 here")
    model, clip = build(head=head), torch.randn(1, 20_000)
    bf16, int8 = (benchmark_edge.optimize_for_cpu(model, backend) for backend in ("bf16", "int8"))
    quantized = lambda copy: [m for m in copy.modules() if "quantized" in type(m).__module__]  # noqa: E731
    assert quantized(int8) and not quantized(bf16)
    packed = [m for m in bf16.modules() if isinstance(m, benchmark_edge.PackedLinear)]
    assert packed and all(m.precision == torch.bfloat16 for m in packed)
    exact = embeddings(model, clip)
    assert relative(embeddings(bf16, clip), exact) < relative(embeddings(int8, clip), exact)


def test_the_first_layer_in_one_pass_holds_for_any_signal():
    layer = build().backbone.feature_extractor.conv_layers[0]
    with torch.no_grad():
        layer.layer_norm.weight.normal_()
        layer.layer_norm.bias.normal_()
        layer.conv.bias = torch.nn.Parameter(torch.randn(16))
        t = torch.arange(8000) / 16000
        for signal in (torch.randn(8000), torch.sin(600 * t) + 3, torch.zeros(8000)):
            assert torch.allclose(
                benchmark_edge.NormalizedConv(layer, torch.float32)(signal[None, None]),
                layer(signal[None, None]),
                atol=1e-4,
            )


def test_auto_takes_an_exact_backend():
    assert benchmark_edge.optimize_for_cpu(build(), "auto").backend in ("fp32", "onednn")


def test_what_a_copy_cannot_do_is_refused(tmp_path):
    model = build()
    with pytest.raises(ValueError, match=r"fastest.*give one of fp32, onednn"):
        benchmark_edge.optimize_for_cpu(model, "fastest")
    for backend in ("fp32", "onednn"):
        fast = benchmark_edge.optimize_for_cpu(model, backend)
        with pytest.raises(ValueError, match="cannot be saved"):
            fast.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="truncate the model first"):
            fast.truncate(1)
        with pytest.raises(ValueError, match="cannot be copied again"):
            benchmark_edge.optimize_for_cpu(fast)
    assert not list(tmp_path.iterdir())


def test_backends_that_a_machine_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="does not compute in bfloat16; use onednn or int8"):
        benchmark_edge.optimize_for_cpu(build(), "bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="lacks oneDNN; use fp32"):
        benchmark_edge.optimize_for_cpu(build(), "onednn")
    assert benchmark_edge.optimize_for_cpu(build(), "auto").backend == "fp32"


# -- the benchmark ----------------------------------------------------------------------------------------------------


def test_benchmark_of_a_checkpoint(tmp_path, capsys):
    model, folder = sharpen(build()), tmp_path / "run"
    model.save_pretrained(folder)
    tests = {"test": {"exits": [{"exit": k, "uar": k / 10} for k in (1, 2, 4)]}}
    (folder / "results.json").write_text(json.dumps(tests))
    plot, out = tmp_path / "plot.png", tmp_path / "out.json"
    flags = [
        "--exits",
        "2",
        "--seconds",
        "0.2",
        "0.3",
        "--threads",
        "1",
        "--backends",
        "fp32",
        "onednn",
        "--rounds",
        "3",
    ]
    pytest.importorskip("matplotlib")
    benchmark_edge.main([str(folder), *flags, "--json", str(out), "--plot", str(plot), "--budget-ms", "60000"])

    machine, rows = json.loads(out.read_text()).values()
    assert [(row["backend"], row["seconds"]) for row in rows] == [
        (b, s) for s in (0.2, 0.3) for b in ("fp32", "onednn")
    ]
    small = model.truncate(2)
    for row in rows:
        assert row["exit"] == 2 and row["threads"] == 1 and 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["real_time_factor"] == pytest.approx(row["p50_ms"] / 1000 / row["seconds"])
        assert row["macs"] == evaluate.count_macs(model, round(16000 * row["seconds"]), 2)
        assert row["gflops"] == pytest.approx(2 * row["macs"] / (row["p50_ms"] / 1000) / 1e9)
        assert row["parameters"] == sum(p.numel() for p in small.parameters())
        assert 4 * row["parameters"] <= 1e6 * row["size_mb"] <= 4 * row["parameters"] + 10_000  # and a header
        assert machine["import_rss_mb"] - 50 < row["peak_rss_mb"] < 5000 and row["max_probability_change"] < 1e-5
    assert machine["cores"] >= 1 and machine["peak_gflops"]["fp32"] > 0
    assert rows[0]["peak_fraction"] == pytest.approx(rows[0]["gflops"] / machine["peak_gflops"]["fp32"])
    printed = capsys.readouterr().out
    assert "exit 2 is the deepest within 60000 ms, by fp32" in printed and "test UAR 0.200" in printed
    assert plot.stat().st_size > 5000


def test_budget_and_verdict():
    def row(exit, backend, ms, change):
        return {"exit": exit, "backend": backend, "p50_ms": ms, "p95_ms": ms + 5, "max_probability_change": change,
                "threads": 2, "seconds": 1.0}  # fmt: skip

    rows = [row(3, "fp32", 50, 0.0), row(3, "int8", 20, 0.01), row(12, "fp32", 100, 0.0), row(12, "onednn", 70, 1e-7),
            row(12, "int8", 40, 0.02)]  # fmt: skip
    args = benchmark_edge.parse_args(["--backbone", "tiny", "--threads", "2", "--seconds", "1", "--budget-ms", "60"])
    assert "exit 12 is the deepest within 60 ms, by int8" in benchmark_edge.fit_budget(rows, args)
    args.budget_ms = 76
    assert "exit 12 is the deepest within 76 ms, by onednn" in benchmark_edge.fit_budget(rows, args)
    args.budget_ms = 10
    assert "nothing fits 10 ms; nearest is exit 3 by int8, 25.0 ms" in benchmark_edge.fit_budget(rows, args)
    text = benchmark_edge.verdict(rows, args)
    assert "fastest exact backend is onednn (70.0 ms)" in text and "int8 (40.0 ms)" in text and "2.0e-02" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either a checkpoint or --backbone"),
        (["--backbone", "tiny", "--exits", "9"], "from 1 to the backbone's 4 layers"),
        (["nowhere"], "nowhere: no such folder"),
        (["--backbone", "tiny", "--seconds", "0.01"], "from 0.025 to 60"),
        (["--backbone", "tiny", "--threads", "0"], "--threads: 0 is not a whole number above 0"),
        (["--backbone", "tiny", "--rounds", "0"], "--rounds: 0 is not a whole number above 0"),
        (["--backbone", "tiny", "--budget-ms", "nan"], "--budget-ms: nan is not a number above 0"),
        (["--backbone", "tiny", "--json", "/nonexistent/a.json"], "/nonexistent/a.json: cannot be written"),
        (["--backbone", "tiny", "--plot", "/nonexistent/a.png"], "/nonexistent/a.png: cannot be written"),
        (
            ["--backbone", "tiny", "--export", "model.pt"],
            "--export model.pt: give a name ending in .pt2 or .onnx, or a f",
        ),
        (["--backbone", "tiny", "--plot", "a.xyz"], "--plot a.xyz: .xyz is no kind of picture; give one of "),
        (["--backbone", "tiny", "--export", "/nonexistent/a.pt2"], "/nonexistent/a.pt2: cannot be written"),
        (["--backbone", "tiny", "--export", __file__ + "/a"], "cannot be made a folder (Not a directory)"),
        (["--backbone", "tiny", "--exit", "1"], "go with --export"),
        (["run", "--head", "gru"], "--head goes with --backbone"),
    ],
)
def test_wrong_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        benchmark_edge.main(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


# -- files to ship ----------------------------------------------------------------------------------------------------

LOAD = {
    ".pt2": """
import json, sys, numpy, torch
extra = {"labels.json": ""}
run = torch.export.load(sys.argv[1], extra_files=extra).module()
answers = [run(torch.from_numpy(numpy.load(path))).tolist() for path in sys.argv[2:]]
try:
    run(torch.zeros(1, 500))
except AssertionError as error:
    assert "720" in str(error)
else:
    raise SystemExit("a clip that is too short was answered")
labels = json.loads(extra["labels.json"])
""",
    ".onnx": """
import json, sys, numpy, onnxruntime
run = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
answers = [run.run(None, {"waveform": numpy.load(path)})[0].tolist() for path in sys.argv[2:]]
labels = json.loads(run.get_modelmeta().custom_metadata_map["labels"])
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
def test_exported_files_stand_alone(tmp_path, capsys, ending, backend, head, tolerance):
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = sharpen(build(head=head))
    model.save_pretrained(tmp_path / "run")
    path = tmp_path / f"model{ending}"
    benchmark_edge.main([str(tmp_path / "run"), "--export", str(path), "--exit", "2", "--backend", backend])
    assert "loaded back and run on 8 clips" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"run", path.name}

    clips = [torch.randn(1, samples) for samples in (3000, 20000)]
    for i, clip in enumerate(clips):
        np.save(tmp_path / f"{i}.npy", clip.numpy())
    command = [sys.executable, "-c", LOAD[ending] + REPORT, path, tmp_path / "0.npy", tmp_path / "1.npy"]
    answers, labels = json.loads(subprocess.check_output(command, cwd=tmp_path))
    assert labels == LABELS
    for clip, answer in zip(clips, answers):
        assert (torch.tensor(answer) - probabilities(model, clip, exit=2)[0]).abs().max() < tolerance


def test_export_of_a_tiled_model_tiles(tmp_path):
    model = sharpen(build())
    model.tile_seconds = 0.5
    run = benchmark_edge.export(model, 1, "fp32", str(tmp_path / "model.pt2"))
    for samples in (3000, 8000, 9000):
        waveform = torch.randn(samples)
        [wanted] = model.classify([waveform], exit=1)
        assert run(waveform[None])[0].tolist() == pytest.approx(list(wanted.probabilities.values()), abs=1e-5)


def test_export_as_a_folder(tmp_path, wav, capsys):
    model = build()
    model.save_pretrained(tmp_path / "run")
    benchmark_edge.main([str(tmp_path / "run"), "--export", str(tmp_path / "small"), "--exit", "1"])
    assert "no probability differs by more than 0.0e+00" in capsys.readouterr().out
    assert sdser.MultiExitSER.from_pretrained(tmp_path / "small").exits == [1]


def test_exports_are_checked_on_the_checkpoints_test_clips(tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.normal(size=5000), 16000)
    (tmp_path / "split.csv").write_text("path,label,speaker,split\na.wav,joy,x,test\nb.wav,joy,y,train\n")
    [clip] = benchmark_edge.load_clips(benchmark_edge.parse_args([str(tmp_path)]))
    assert len(clip) == 5000


@pytest.mark.parametrize(
    ("name", "backend", "message"),
    [
        ("x.pt2", "int8", ".pt2 holds fp32 or bf16"),
        ("x.onnx", "bf16", ".onnx fp32 or int8"),
        ("x", "onednn", "a folder fp32"),
    ],
)
def test_pairs_that_cannot_be_written_are_refused(tmp_path, capsys, name, backend, message):
    build().save_pretrained(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        benchmark_edge.main(
            [str(tmp_path / "run"), "--export", str(tmp_path / name), "--exit", "1", "--backend", backend]
        )
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SystemExit):
        benchmark_edge.main(["--backbone", "tiny", "--export", str(tmp_path / "x.onnx")])
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
