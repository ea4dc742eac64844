"""The evaluation script: costs and intervals against independent counts, and the whole command on small runs."""

import contextlib
import json
import re
import resource
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import benchmark_edge
import evaluate
import sdser
import train


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """Two folds of a run, and another of the first fold with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("fold1", ["--fold", "1/3"]),
        ("fold2", ["--fold", "2/3"]),
        ("other", ["--fold", "1/3", "--seed", "1"]),
    ):
        train.main(["--data", str(corpus), "--epochs", "2", "--batch-size", "4", "--out", str(folder / name), *flags])
    return folder


def report(capsys, *flags):
    capsys.readouterr()
    evaluate.main(list(map(str, flags)))
    return capsys.readouterr()


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as end:
        evaluate.main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# -- cost -------------------------------------------------------------------------------------------------------------


def counted_macs(model, samples, exit) -> float:
    """torch's own count of one forward pass; it sees attention only where it is eager, and no oneDNN kernel."""
    if model.backbone.config.model_type != "wavlm":
        model.backbone.set_attn_implementation("eager")
    large = model.backbone.config.hidden_size > 100  # then the shapes alone, without data, are enough work
    tensors = FakeTensorMode(allow_non_fake_inputs=True) if large else contextlib.nullcontext()
    with (
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False),
        tensors,
        FlopCounterMode(display=False) as counter,
    ):
        model(torch.zeros(1, samples), exit=exit)
    return counter.get_total_flops() / 2


@pytest.mark.filterwarnings("ignore:TF32")
def test_macs_of_base():
    model = sdser.MultiExitSER(["a", "b", "c"], "base", head=["gru", "lstm", "attention", "mean"]).eval()
    for k in (3, 8, 10, 12):
        assert evaluate.count_macs(model, 96_000, k) == pytest.approx(counted_macs(model, 96_000, k), rel=0.01)


@pytest.mark.filterwarnings("ignore:TF32")
def test_macs_of_every_layout_and_head(layout):
    model = build(layout, exits=[1, 2, 3, 4], head=list(sdser.HEADS))
    for k in model.exits:
        assert evaluate.count_macs(model, 96_000, k) == pytest.approx(counted_macs(model, 96_000, k), rel=0.01)


def test_macs_of_arrays_tiles_and_several_heads():
    model = build(head="gru")
    one, two = (int(evaluate.count_macs(model, n, 2)) for n in (8000, 16000))
    assert evaluate.count_macs(model, np.array([8000, 16000]), 2).tolist() == [one, two] and two > 2 * one
    both, second = evaluate.count_macs(model, 8000, 2, [1, 2]), evaluate.count_macs(model, 8000, 2, [2])
    assert both - second == 24 * 7 * 32**2 - 24 * 32**2 + 24 * 32 + 256 * (32 + 3)  # 24 frames, width 32, 3 classes
    model.tile_seconds = 1.0
    assert evaluate.count_macs(model, np.array([8000, 30000]), 2).tolist() == [two, two]


def test_kept_parameters_are_those_of_the_truncated_model(layout):
    model = build(layout)
    for k in model.exits:
        assert evaluate.kept_parameters(model, k) == sum(p.numel() for p in model.truncate(k).parameters())


# -- intervals --------------------------------------------------------------------------------------------------------


def made_up(speakers=12, clips=20, wrong=0.3, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, speakers * clips)
    predictions = np.where(rng.random(len(targets)) < wrong, (targets + 1) % 3, targets)
    return targets, predictions, np.repeat([f"s{i}" for i in range(speakers)], clips)


def test_bootstrap_draws_speakers_with_all_their_clips(monkeypatch):
    targets, predictions, speakers = made_up()
    draws = evaluate.bootstrap(targets, predictions[None], speakers, 3)[0]
    rng, names = np.random.default_rng(1), np.unique(speakers)
    expected = []
    for _ in range(1000):  # the plain way: draw speakers, put their clips together, score them
        clips = np.concatenate([np.flatnonzero(speakers == name) for name in rng.choice(names, len(names))])
        expected.append(sdser.unweighted_average_recall(targets[clips], predictions[clips], 3))
    assert draws.shape == (evaluate.DRAWS,)
    assert draws.mean() == pytest.approx(np.mean(expected), abs=0.005)
    assert evaluate.interval(draws) == pytest.approx(np.percentile(expected, [2.5, 97.5]), abs=0.015)


def test_bootstrap_of_one_speaker_has_no_width_and_of_rare_classes_no_gaps():
    targets, predictions, speakers = made_up(speakers=1)
    low, high = evaluate.interval(evaluate.bootstrap(targets, predictions[None], speakers, 3)[0])
    assert low == high == pytest.approx(sdser.unweighted_average_recall(targets, predictions, 3))
    # class 2 has one speaker, class 3 none: draws without that speaker average over two classes
    draws = evaluate.bootstrap(np.array([0, 1, 0, 1, 2]), np.array([[0, 1, 0, 1, 0]]), np.array(list("aabbc")), 4)
    assert set(draws[0].round(6)) <= {round(2 / 3, 6), 1.0, 0.0} and len(set(draws[0].round(6))) > 1


def scored(wrong, seed=0, name="run"):
    targets, predictions, speakers = made_up(wrong=wrong, seed=seed)
    labels = ["anger", "joy", "sadness"]
    clips = [train.Clip(f"{i}.wav", labels[t], s, "test") for i, (t, s) in enumerate(zip(targets, speakers))]
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 3).float().expand(3, -1, -1)
    return evaluate.Scored(name, build(), clips, np.full(len(clips), 2.0), logits)


def test_comparison_is_paired():
    good, bad = scored(0.1), scored(0.5)
    for row in evaluate.compare([good], [good]):
        assert row["difference"] == 0 and row["ci95"] == [0, 0]
    rows = evaluate.compare([good], [bad])
    assert [row["exit"] for row in rows] == [1, 2, 4, "fusion"]
    for row in rows:
        a, b = (sdser.unweighted_average_recall(run.targets, run.predictions[0], 3) for run in (good, bad))
        assert row["difference"] == pytest.approx(a - b)
        assert 0 < row["ci95"][0] < row["difference"] < row["ci95"][1]
    [pooled, *_] = evaluate.compare([good, bad], [bad, good])
    assert pooled["difference"] == 0 and pooled["ci95"][0] <= 0 <= pooled["ci95"][1]


# -- early exit -------------------------------------------------------------------------------------------------------


def test_sweep_by_hand():
    run = scored(0.3)
    logits = torch.zeros(3, 4, 3)
    logits[0, 0, 0] = logits[1, 1, 1] = logits[2, 2, 2] = 10.0  # certain at exit 1, at exit 2, at exit 4; never
    run = run._replace(logits=logits, clips=run.clips[:4], seconds=np.full(4, 0.5))
    assert evaluate.exit_index(logits, 0.9).tolist() == [0, 1, 2, 2]
    assert evaluate.exit_index(logits, 0.0).tolist() == [0, 0, 0, 0]
    row = next(row for row in evaluate.sweep([run]) if row["threshold"] == 0.9)
    assert row["mean_layers"] == (1 + 2 + 4 + 4) / 4
    assert row["exit_share"] == {"1": 0.25, "2": 0.25, "4": 0.5}
    costs = [evaluate.count_macs(run.model, 8000, k, heads) for k, heads in ((1, [1]), (2, [1, 2]), (4, [1, 2, 4]))]
    assert row["macs_per_second"] == pytest.approx((costs[0] + costs[1] + 2 * costs[2]) / 2.0)


def test_calibration_takes_the_cheapest_threshold_within_tolerance(runs, tmp_path):
    shutil.copytree(runs / "fold1", tmp_path / "run")
    args = evaluate.parse_args([str(tmp_path / "run"), "--tolerance", "0.05"])
    [run], _ = evaluate.load_and_score(args.checkpoints, args)
    threshold, dev = evaluate.calibrate(run, args)
    deepest = sdser.scores(dev.targets, dev.predictions[2], 2)["uar"]
    costs = {row["threshold"]: row["macs_per_second"] for row in evaluate.sweep([dev]) if row["uar"] >= deepest - 0.05}
    assert costs[threshold] == min(costs.values())
    assert all(clip.split == "dev" for clip in dev.clips)
    assert sdser.MultiExitSER.from_pretrained(tmp_path / "run").threshold == threshold


def test_dev_clips_that_were_trained_on_calibrate_nothing(corpus, tmp_path, capsys):
    train.main(["--data", str(corpus), "--epochs", "1", "--final", "--out", str(tmp_path)])
    out = report(capsys, tmp_path, "--json", tmp_path / "a.json")
    assert "early exit is not calibrated" in out.err and "--final trains on them" in out.err
    assert "chosen" not in json.loads((tmp_path / "a.json").read_text()) and "confusions of exit 4" in out.out
    assert sdser.MultiExitSER.from_pretrained(tmp_path).threshold is None
    assert "was trained on 24 of these clips" in refused(capsys, tmp_path, "--data", corpus)


def test_adaptive_run_is_what_the_logits_say(runs):
    args = evaluate.parse_args([str(runs / "fold1"), "--batch-size", "5"])
    [run], _ = evaluate.load_and_score(args.checkpoints, args)
    threshold = run.logits[0].softmax(-1).amax(-1).median().item() + 1e-4
    left, predictions = evaluate.run_adaptive(run, threshold, args)
    assert len(set(left)) > 1
    assert left.tolist() == evaluate.exit_index(run.logits, threshold).tolist()
    assert predictions.tolist() == run.predictions[left, np.arange(len(left))].tolist()


# -- the command ------------------------------------------------------------------------------------------------------


def test_scores_equal_the_training_runs(runs, capsys, tmp_path):
    out = report(capsys, runs / "fold1", "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    trained = json.loads((runs / "fold1" / "results.json").read_text())
    for row, expected in zip([*results["test"]["exits"], results["test"]["fusion"]],
                             [*trained["test"]["exits"], trained["test"]["fusion"]]):  # fmt: skip
        assert expected.items() <= (row if "exit" in expected else {**row, "exit": None}).items()
        assert row["uar_ci95"][0] <= row["uar"] <= row["uar_ci95"][1]
        assert row["recall"].keys() == {"anger", "sadness"} and np.sum(row["confusion"]) == 12
    exits = results["test"]["exits"]
    assert [row["layers"] for row in exits] == [1, 2, 4]
    for name in ("parameters", "macs_per_second", "ms_per_clip"):
        assert all(row[name] > 0 for row in exits)
    assert exits[0]["macs_per_second"] < exits[1]["macs_per_second"] < exits[2]["macs_per_second"]
    assert len(results["adaptive"]) == 101
    assert results["adaptive"][0].keys() == {"threshold", "uar", "mean_layers", "macs_per_second", "exit_share"}
    assert results["chosen"]["threshold"] == sdser.MultiExitSER.from_pretrained(runs / "fold1").threshold
    for text in ("teacher", "fusion", "recall", "confusions of exit 4", "12 clips, 2 speakers", "chance is 0.500",
                 "intervals are rough", "early exit at confidence"):  # fmt: skip
        assert text in out.out


def test_folds_are_pooled(runs, capsys, tmp_path):
    report(capsys, runs / "fold1", runs / "fold2", "--json", tmp_path / "a.json", "--exit", 2)
    pooled = json.loads((tmp_path / "a.json").read_text())
    assert pooled["clips"] == 24 and pooled["speakers"] == 4 and pooled["confusion_exit"] == 2
    single = [json.loads((runs / name / "results.json").read_text())["test"]["exits"] for name in ("fold1", "fold2")]
    for i, row in enumerate(pooled["test"]["exits"]):
        assert row["accuracy"] == pytest.approx(np.mean([rows[i]["accuracy"] for rows in single]))


def test_against(runs, capsys, tmp_path):
    out = report(capsys, runs / "fold1", "--against", runs / "fold1", "--json", tmp_path / "a.json")
    assert "difference in UAR" in out.out
    for row in json.loads((tmp_path / "a.json").read_text())["against"]:
        assert row["difference"] == 0 and row["ci95"] == [0, 0]
    report(capsys, runs / "fold1", "--against", runs / "other", "--json", tmp_path / "a.json")
    assert len(json.loads((tmp_path / "a.json").read_text())["against"]) == 4
    assert "scored on one side alone" in refused(capsys, runs / "fold1", "--against", runs / "fold2")


def test_against_shallower_models(runs, capsys, tmp_path):
    """An exit does not differ from the same exit cut out, and costs the same."""
    for exit in (1, 2):
        sdser.MultiExitSER.from_pretrained(runs / "fold1").truncate(exit).save_pretrained(tmp_path / f"alone{exit}")
        shutil.copy(runs / "fold1" / "split.csv", tmp_path / f"alone{exit}")
    against = ["--against", tmp_path / "alone1", "--against", tmp_path / "alone2"]
    out = report(capsys, runs / "fold1", *against, "--json", tmp_path / "a.json")
    assert out.out.count("difference in UAR") == 2
    results = json.loads((tmp_path / "a.json").read_text())
    assert [row["exit"] for row in results["against"]] == [1, 2]
    for row, own in zip(results["against"], results["test"]["exits"]):
        assert row["difference"] == 0 and row["ci95"] == [0, 0]
        assert [row["against_uar"], row["against_uar_ci95"], row["against_macs_per_second"]] == [
            own["uar"], own["uar_ci95"], own["macs_per_second"]
        ]  # fmt: skip
    assert "alone2 has no exit of [1], only [2]" in refused(
        capsys, tmp_path / "alone1", "--against", tmp_path / "alone2"
    )


def test_json_on_standard_output_is_json_alone(runs, capsys):
    assert json.loads(report(capsys, runs / "fold1", "--json", "-").out)["labels"] == ["anger", "sadness"]


def test_other_corpora_are_matched_by_label(runs, corpus, capsys, tmp_path):
    lines = [f"{corpus.parent}/{line}" for line in corpus.read_text().splitlines()[1:]]
    mine = [f"{line}-elsewhere" for line in lines[:12]]
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("\n".join(["path,label,speaker", *mine]))
    shutil.copytree(corpus.parent, tmp_path / "copy")
    foreign.write_text(foreign.read_text().replace(str(corpus.parent), str(tmp_path / "copy")))
    out = report(capsys, runs / "fold1", "--data", foreign, "--json", tmp_path / "a.json").out
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["clips"] == 12 and "all" in results and "12 clips" in out
    foreign.write_text(foreign.read_text().replace("sadness,", "grief,"))
    message = refused(capsys, runs / "fold1", "--data", foreign)
    assert "does not know (grief; it knows anger, sadness); --common-labels leaves them out" in message
    out = report(capsys, runs / "fold1", "--data", foreign, "--common-labels", "--json", tmp_path / "a.json")
    assert "left out 6 of 12 clips, labelled grief" in out.err
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["all"]["fusion"]["recall"]["sadness"] is None


def test_training_clips_are_not_scored_by_mistake(runs, corpus, capsys, tmp_path):
    assert "was trained on 12 of these clips" in refused(capsys, runs / "fold1", "--data", corpus)
    shutil.copytree(corpus.parent, tmp_path / "moved")
    assert "was trained on 12" in refused(capsys, runs / "fold1", "--data", tmp_path / "moved" / "all.csv")


def test_own_training_clips_are_scored_on_request_with_a_warning(runs, capsys, tmp_path):
    with pytest.warns(UserWarning, match="was trained on clips of the split all"):
        report(capsys, runs / "fold1", "--split", "all", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["clips"] == 36


def test_speakers_unknown(runs, corpus, capsys, tmp_path):
    rows = corpus.read_text().splitlines()[1:]
    shutil.copytree(corpus.parent, tmp_path / "copy")
    anonymous = tmp_path / "copy" / "anonymous.csv"
    anonymous.write_text("\n".join(["path,label", *(row.rpartition(",")[0] for row in rows)]))
    assert (
        "speakers unknown, so the intervals are over clips" in report(capsys, runs / "fold1", "--data", anonymous).out
    )


def test_audio(runs, corpus, capsys, tmp_path):
    clips = [clip.path for clip in train.load_corpus(corpus)][:2]
    out = report_status(capsys, runs / "fold1", "--audio", *clips, "--exit", 2)
    assert out[0] == 0 and [line.split("  ")[0] for line in out[1].splitlines()] == clips and "exit 2" in out[1]
    status, printed, errors = report_status(
        capsys, runs / "fold1", "--audio", clips[0], "gone.wav", clips[1], "--json", "-"
    )
    rows = [json.loads(line) for line in printed.splitlines()]
    assert status == 2 and [row["path"] for row in rows] == clips and "gone.wav: no such file" in errors
    assert rows[0].keys() == {"path", "label", "confidence", "probabilities", "exit", "milliseconds"}
    shutil.copytree(runs / "fold1", tmp_path / "run")
    model = sdser.MultiExitSER.from_pretrained(tmp_path / "run")
    model.threshold = 0.0
    model.save_pretrained(tmp_path / "run")
    for flags in ([], ["--threshold", "auto"], ["--threshold", 0]):
        assert "exit 1 " in report_status(capsys, tmp_path / "run", "--audio", clips[0], *flags)[1]
    assert "exit 4 " in report_status(capsys, tmp_path / "run", "--audio", clips[0], "--threshold", 1)[1]


def report_status(capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        evaluate.main(list(map(str, flags)))
    return end.value.code, *capsys.readouterr()


def test_plots(runs, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    report(capsys, runs / "fold1", "--against", runs / "other", "--plot", tmp_path / "plots")
    files = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert files == ["confusion.png", "recall.png", "uar_against_cost.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in files)


def test_plots_without_matplotlib(runs, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, runs / "fold1", "--plot", "plots")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exit", 3], "exit 3: the model has exits 1, 2, 4"),
        (["--threshold", 0.5], "--threshold goes with --audio"),
        (["--audio", "x.wav", "--threshold", "high"], "give a number from 0 to 1, or auto"),
        (["--audio", "x.wav", "--plot", "plots"], "without --against, --data, --split and --plot"),
        (["--audio", "x.wav", "--threshold", 2], "give a probability from 0 to 1"),
        (["--audio", "x.wav", "--against", "y"], "--audio goes with one checkpoint"),
        (["--tolerance", -1], "--tolerance: -1 is not a share from 0 to 1"),
        (["--data", "nowhere"], "nowhere: no such folder or manifest"),
        (["--against", "nowhere"], "nowhere: no such folder"),
        (["--device", "cuda:7"], "--device cuda:7: cannot be used here"),
        (["--workers", -1], "--workers: -1 is not a whole number of at least 0"),
        (["--batch-size", 0], "--batch-size: 0 is not a whole number above 0"),
        (["--json", "/nonexistent/a.json"], "/nonexistent/a.json: cannot be written (No such file or directory)"),
        (["--audio", "x.wav", "--json", "/nonexistent/a.json"], "/nonexistent/a.json: cannot be written"),
        (["--plot", __file__], "cannot be made a folder"),
    ],
)
def test_wrong_flags(runs, capsys, flags, message):
    assert message in refused(capsys, runs / "fold1", *flags)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (evaluate, ["--json", "/nonexistent/a"]),
        (evaluate, ["--audio", "x.wav", "--json", "/nonexistent/a"]),
        (evaluate, ["--plot", f"{__file__}/a"]),
        (benchmark_edge, ["--json", "/nonexistent/a"]),
        (benchmark_edge, ["--plot", "/nonexistent/a"]),
        (benchmark_edge, ["--export", "/nonexistent/a.onnx"]),
        (benchmark_edge, ["--export", f"{__file__}/a"]),
        (train, ["--data", "nowhere", "--out", f"{__file__}/a"]),
    ],
)
def test_places_are_tried_before_any_work(capsys, script, flags):
    """Even before the checkpoint, or the data, which are not there."""
    with pytest.raises(SystemExit) as end:
        script.main([*([] if script is train else ["no-checkpoint"]), *flags])
    assert end.value.code == 2
    assert re.fullmatch(rf"error: {flags[-1]}: cannot be (written|made a folder) .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["config.json", "split.csv", "results.json", "model.safetensors"])
def test_files_of_a_run_are_not_replaced_by_reports(runs, capsys, name):
    before = (runs / "fold1" / name).read_bytes()
    assert "is a file of the model in that folder" in refused(capsys, runs / "fold1", "--json", runs / "fold1" / name)
    assert (runs / "fold1" / name).read_bytes() == before


def test_an_export_does_not_replace_a_model(runs, capsys):
    before = (runs / "fold1" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as end:
        benchmark_edge.main([str(runs / "fold1"), "--export", str(runs / "fold1"), "--exit", "1"])
    assert end.value.code == 2 and "holds a model already" in capsys.readouterr().err
    assert (runs / "fold1" / "model.safetensors").read_bytes() == before


def test_a_threshold_that_is_not_kept_is_not_said_to_be(runs, tmp_path, capsys):
    shutil.copytree(runs / "fold1", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text()) | {"threshold": None}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / ".config.json.tmp").mkdir()  # so that nothing can be written beside it
    with pytest.warns(UserWarning, match="the threshold is not kept"):
        printed = report(capsys, tmp_path / "run").out
    assert "early exit at confidence" in printed and "kept in config.json" not in printed
    (tmp_path / "run" / ".config.json.tmp").rmdir()
    assert "kept in config.json" in report(capsys, tmp_path / "run").out


def test_what_a_script_writes_is_whole_or_not_there(runs, tmp_path, capsys):
    """A file that cannot grow: one sentence, the earlier file in place, and nothing beside it."""
    (tmp_path / "a.json").write_text("earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        error = refused(capsys, runs / "fold1", "--json", tmp_path / "a.json")
        capsys.readouterr()
        with pytest.warns(UserWarning, match="the threshold is not kept: .*config.json: cannot be written"):
            evaluate.main([str(runs / "fold1")])
        with (
            pytest.raises(ValueError, match=r"plot\.png: cannot be written"),
            sdser.replacing(tmp_path / "plot.png") as file,
        ):
            file.write(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        error == f"error: {tmp_path / 'a.json'}: cannot be written (File too large); make room, or name another place"
    )
    assert (tmp_path / "a.json").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1
    assert not list((runs / "fold1").glob("*.tmp"))


def test_a_model_of_synthetic_voices_says_so_of_other_files(tmp_path, capsys, monkeypatch, wav):
    monkeypatch.setattr(train, "make_synthetic", partial(train.make_synthetic, clips=1))
    train.main(["--epochs", "1", "--out", str(tmp_path / "run")])
    voice = next(Path(train.make_synthetic()).iterdir())
    mine = wav(0.1 * np.random.default_rng(0).normal(size=8000))
    note = f"note: {tmp_path / 'run'} was trained on synthetic voices; its answer to {mine} means nothing"
    assert report_status(capsys, tmp_path / "run", "--audio", voice)[2] == ""
    assert report_status(capsys, tmp_path / "run", "--audio", voice, mine, mine)[2].count(note) == 1


def test_files_are_read_as_they_are_needed(corpus, monkeypatch):
    """Memory does not grow with the corpus: reading the first batch reads no other."""
    read, load_audio = [], sdser.load_audio
    monkeypatch.setattr(sdser, "load_audio", lambda path, *args: read.append(path) or load_audio(path, *args))
    clips = train.load_corpus(corpus)
    batches = train.file_batches([clip.path for clip in clips], [1.0] * len(clips), batch_size=4)
    indices, waveforms, lengths = next(batches)
    assert len(read) == len(indices) == len(waveforms) == len(lengths) == 4
    assert Counter(read).most_common(1)[0][1] == 1
