"""The evaluation script: costs and intervals against independent counts, and the whole command on small runs."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import LABELS, build, fit, lowest_threshold, macs_by_hand, read_run, uar, write

import benchmark_edge
import evaluate
import sdser

PLOT = ["--plot", "plots"] if importlib.util.find_spec("matplotlib") else []


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, fold, seed in (("fold1", "1/3", 0), ("fold2", "2/3", 0), ("other", "1/3", 1)):
        fit(corpus, folder / name, "--fold", fold, "--seed", seed)
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """Two folds of a run, and another of the first fold; a copy for each test, since some change them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "DRAWS", 200)  # so that it takes less time
    return shutil.copytree(trained, tmp_path / "runs")


def call(*flags) -> dict:
    """What the command writes as JSON."""
    evaluate.main([*map(str, flags), "--json", "results.json"])
    return json.loads(Path("results.json").read_text())


def configure(run, **changes) -> None:
    write(run / "config.json", json.dumps(json.loads((run / "config.json").read_text()) | changes))


def test_costs_of_every_layout_and_head(layout):
    model, passed = build(layout, exits=[1, 2, 3, 4], head=["gru", "lstm", "attention", "mean"]), 0  # heads on the way
    for k, kind in zip(model.exits, model.head_kinds):
        macs, with_all = (evaluate.count_macs(model, 32_000, k, on_the_way) for on_the_way in (False, True))
        expected, head = macs_by_hand(32_000, k, kind, gated=layout.startswith("wavlm"))
        passed += head
        assert macs == pytest.approx(expected, rel=0.005)
        assert with_all - macs == pytest.approx(passed - head, rel=0.01)
        assert evaluate.count_parameters(model, [k]) == sum(p.numel() for p in model.truncate(k).parameters())
    model.tile_seconds = 2.0
    assert evaluate.count_macs(model, 8000, 4) == evaluate.count_macs(model, 60_000, 4) == macs


# -- intervals --------------------------------------------------------------------------------------------------------
def made_up(wrong: float) -> evaluate.Pool:
    """20 clips of each of 12 speakers, and answers of which a share is wrong."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 240)
    answers = np.where(rng.random(240) < wrong, (targets + 1) % 3, targets)
    clips = [evaluate.Clip(f"{i}.wav", LABELS[target], f"s{i // 20}", "test") for i, target in enumerate(targets)]
    logits = torch.nn.functional.one_hot(torch.tensor(answers), 3).float().expand(3, -1, -1)
    return evaluate.Pool(build(), clips, torch.zeros(len(clips), dtype=int), logits, [None])


def test_bootstrap_draws_speakers_with_all_their_clips_and_comparison_is_paired():
    scored = made_up(wrong=0.3)
    targets, logits, units = scored.targets, scored.logits[0], np.array(scored.units)
    assert set(units) == {f"s{i}" for i in range(12)}
    draws = evaluate.bootstrap(targets, logits[None], units)[0]
    rng, names, expected = np.random.default_rng(1), np.unique(units), []
    for _ in range(1000):  # the plain way: draw speakers, put their clips together, score them
        clips = np.concatenate([np.flatnonzero(units == name) for name in rng.choice(names, len(names))])
        expected.append(uar(targets[clips], logits[clips]))
    assert draws.mean() == pytest.approx(np.mean(expected), abs=0.005)
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx(np.percentile(expected, [2.5, 97.5]), abs=0.015)
    # by hand: a mean over the classes that are drawn; class 2 has one speaker, class 3 none; one speaker has no width
    targets, logits = torch.tensor([0, 1, 0, 1, 2]), torch.eye(4)[torch.tensor([[0, 1, 0, 1, 0]])]
    for speakers, uars in (("aabbc", {0.0, 0.666667, 1.0}), ("aaaaa", {0.666667})):
        assert set(evaluate.bootstrap(targets, logits, list(speakers))[0].round(6)) == uars
    good, bad = made_up(wrong=0.1), made_up(wrong=0.5)
    ours, theirs = (uar(pool.targets, pool.logits[0]) for pool in (good, bad))
    for row, exit in zip(evaluate.compare(good, bad), [1, 2, 4, "fusion"], strict=True):
        assert row["exit"] == exit and row["difference"] == pytest.approx(ours - theirs)
        assert 0 < row["ci95"][0] < row["difference"] < row["ci95"][1]


def test_intervals_cover_the_truth_95_times_in_100():
    """Where plain percentiles of a bootstrap over few units do not; of fewer than five units there is none."""
    for n, bound in ((6, 0.88), (10, 0.91), (24, 0.94)):
        rng, covered = np.random.default_rng(0), []
        for _ in range(1500):
            units = rng.normal(size=n)
            draws = units[rng.integers(n, size=(1000, n))].mean(1)
            both = evaluate.interval(draws, list(map(str, range(n)))), np.percentile(draws, [2.5, 97.5])
            covered.append([low < 0 < high for low, high in both])
        ours, percentiles = np.mean(covered, 0)
        assert percentiles < bound < ours and 0.92 < ours < 0.965
    assert evaluate.interval(np.arange(1001.0), ["a", "b", "c", "d"]) is None


# -- early exit -------------------------------------------------------------------------------------------------------
def test_early_exit_and_fusion_by_hand():
    logits = torch.zeros(3, 4, 3)
    logits[0, 0, 0] = logits[1, 1, 1] = logits[2, 2, 2] = 10.0  # certain at exit 1, at exit 2, at exit 4; never
    assert evaluate.exit_index(logits, 0.9).tolist() == [0, 1, 2, 2]
    assert evaluate.exit_index(logits, torch.tensor([0.9, 0.0, 0.9, 0.0])).tolist() == [0, 0, 2, 0]
    assert evaluate.exit_index(logits, logits[0, 0].softmax(-1).max().item())[0] == 0  # just reached
    assert evaluate.early_logits(logits, 0.9).argmax(-1).tolist() == [0, 1, 2, 0]
    rows = {exit: row.argmax(-1).tolist() for exit, row in evaluate.logits_by_row([1, 2, 4], logits).items()}
    assert rows[4] == [0, 0, 2, 0] and rows["fusion"] == [0, 1, 0, 0]  # of exits 1 and 2
    # exit 1 is certain and wrong, even at a confidence of 1, where the deepest exit is right
    targets, logits = torch.tensor([1]), torch.tensor([[[200.0, 0.0]], [[0.0, 1.0]]])
    assert evaluate.choose_threshold(targets, logits, 1.0) == 0.0
    assert evaluate.choose_threshold(targets, logits, 0.5) is None


@pytest.mark.parametrize("tolerance", [0, 0.05, 1])
def test_tolerance_chooses_each_runs_threshold_anew_on_dev(runs, tolerance, monkeypatch, refused):
    """The clips' logits are made up, so that the thresholds of runs, splits and tolerances differ."""
    torch.manual_seed(234)
    folds = [str(runs / "fold1"), str(runs / "fold2")]
    made_up = {clip.path: 2 * torch.randn(3, 2) for clip in evaluate.load_corpus(runs / "fold1" / "split.csv")}
    answers = Mock(side_effect=lambda _, clips: torch.stack([made_up[clip.path] for clip in clips], 1))
    monkeypatch.setattr(evaluate, "predict", answers)
    for fold, threshold in zip(folds, call(*folds, "--tolerance", tolerance)["thresholds"], strict=True):
        dev = [clip for clip in evaluate.load_corpus(f"{fold}/split.csv") if clip.split == "dev"]
        targets, logits = evaluate.targets_of(dev, ["anger", "sadness"]), answers(None, dev)
        assert threshold == lowest_threshold(targets, logits, tolerance)
    monkeypatch.setattr(evaluate, "choose_threshold", Mock(return_value=None))  # none is within
    assert folds[0] in refused(evaluate, *folds, "--tolerance", tolerance)


def test_early_exits_row_is_what_the_model_does(runs):
    scored = evaluate.score_runs([str(runs / "fold1")], "test", None, "cpu")
    certain = np.sort(scored.logits[0].softmax(-1).amax(-1).numpy())
    threshold = float(certain[5:7].mean())  # half of the 12 clips leave at exit 1
    configure(runs / "fold1", threshold=threshold)
    results = call(runs / "fold1")
    model = sdser.MultiExitSER.from_pretrained(runs / "fold1")
    waveforms = [sdser.load_audio(clip.path)[None] for clip in scored.clips]
    logits, exits = map(torch.cat, zip(*(model.early_exit(waveform, None, threshold) for waveform in waveforms)))
    right, left = (logits.argmax(-1) == scored.targets).sum().item(), exits.tolist()
    seconds = np.mean([soundfile.info(clip.path).duration for clip in scored.clips])
    macs = [evaluate.count_macs(model, round(16_000 * seconds), exit, heads_on_the_way=True) for exit in left]
    row = results["rows"][-1]
    assert row["exit"] == "early exit" and results["thresholds"] == [model.threshold] == [threshold]
    assert row["accuracy"] == right / 12 and row["layers"] == results["mean_layers"] == np.mean(left)
    assert results["exit_share"] == pytest.approx({"1": 0.5, "2": left.count(2) / 12, "4": left.count(4) / 12})
    assert row["macs_per_second"] == pytest.approx(np.mean(macs) / seconds)


# -- the command ------------------------------------------------------------------------------------------------------
def test_scores_equal_the_training_runs_and_folds_are_pooled(runs, monkeypatch, refused):
    """The JSON, which tells each clip's answers, is written before anything is printed."""
    folds = [runs / "fold1", runs / "fold2"]
    one, two, pooled = call(folds[0]), call(folds[1]), call(*folds)
    training, (*rows, early) = read_run(folds[0])[0]["test"], one["rows"]
    for row, expected in zip(rows, [*training["exits"], {"exit": "fusion", **training["fusion"]}], strict=True):
        assert expected.items() <= row.items()
    for row in [*rows, early]:
        assert row["uar_ci95"] is None and row["uar_sd_over_runs"] is None, "two speakers, one run"
        assert np.mean(list(row["recall"].values())) == pytest.approx(row["uar"]) and np.sum(row["confusion"]) == 12
    assert [row["layers"] for row in rows] == [1, 2, 4, 2]
    for name in ("parameters", "macs_per_second"):
        assert 0 < rows[0][name] < rows[1][name] < rows[3][name] < rows[2][name]
    assert (one["split"], one["clips"], one["speakers"], one["chance"]) == ("test", 12, 2, 0.5)
    assert (pooled["clips"], pooled["speakers"]) == (24, 4)
    clips = [clip for fold in folds for clip in evaluate.load_corpus(fold / "split.csv") if clip.split == "test"]
    said = [(clip["path"], clip["speaker"], clip["label"]) for clip in pooled["predictions"]]
    assert said == [(clip.path, clip.speaker, clip.label) for clip in clips]
    for row, first, second in zip(pooled["rows"], one["rows"], two["rows"], strict=True):
        assert np.array_equal(row["confusion"], np.add(first["confusion"], second["confusion"]))
        right = [clip["answers"][str(row["exit"])] == clip["label"] for clip in pooled["predictions"]]
        assert np.mean(right) == pytest.approx(row["accuracy"])
        assert row["uar_sd_over_runs"] == pytest.approx(abs(first["uar"] - second["uar"]) / 2**0.5)
    configure(folds[0], threshold=0.0), configure(folds[1], threshold=1.0)  # each fold stops at its own
    monkeypatch.setattr(evaluate, "report", Mock(side_effect=BrokenPipeError(32, "Broken pipe")))
    refused(evaluate, *folds, "--json", "own.json")
    assert json.loads(Path("own.json").read_text())["exit_share"] == {"1": 0.5, "2": 0, "4": 0.5}


def test_against_and_plots(runs, monkeypatch, refused):
    """With a seed missing on one side the pairs would not be pairs; twice as many seeds are fine."""
    one, two, other, alone, wider = (runs / name for name in ("fold1", "fold2", "other", "alone", "wider"))
    tiled, swapped = (shutil.copytree(one, runs / name) for name in ("tiled", "swapped"))
    configure(tiled, tile_seconds=1.0), configure(swapped, labels=["sadness", "anger"])
    model = sdser.MultiExitSER.from_pretrained(one)
    model.truncate(2).save_pretrained(alone)
    config = {**model.backbone.config.to_dict(), "intermediate_size": 64}
    sdser.MultiExitSER(model.labels, config, model.exits, model.head_kinds).save_pretrained(wider)
    for run in (alone, wider, tiled, swapped):  # not of one kind
        shutil.copyfile(one / "split.csv", run / "split.csv")
        assert str(run) in refused(evaluate, one, run)
    results = call(one, other, "--split", "dev", "--against", one)  # on both sides
    assert [row["exit"] for row in results["against"]] == [1, 2, 4, "fusion"] and results["split"] == "dev"
    for ours, theirs in (([one], [two]), ([one, two, other], [one, two]), ([one], [swapped])):
        assert "--against" in refused(evaluate, *ours, "--against", *theirs)
    [row] = call(one, "--against", alone, *PLOT)["against"]
    assert (row["exit"], row["difference"]) == (2, 0), "an exit equals the same exit cut out"
    plots = {path.name: path.read_bytes()[:4] for path in Path().glob("plots/*")}
    assert plots == dict.fromkeys(["uar_against_cost.png", "confusion.png"] if PLOT else [], b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in refused(evaluate, "no-checkpoint", "--plot", "plots")
    for flag, value in (("--json", "/nonexistent/a.json"), ("--plot", f"{__file__}/a"), ("--device", "fax")):
        assert value in refused(evaluate, "no-checkpoint", flag, value)  # before the checkpoint, which is not there


def test_another_corpus(runs, refused):
    """Of six clips, one speaker is known, which is not enough. Chance is over the labels that occur."""
    rng, text = np.random.default_rng(0), "path,label,speaker"
    for i, label in enumerate(["anger", "sadness"] * 3):
        soundfile.write(f"{i}.wav", rng.normal(size=8000), 16_000)
        text += f"\n{i}.wav,{label},{'' if i else 'anna'}"
    configure(runs / "fold1", threshold=0.0), configure(runs / "fold2", threshold=1.0)  # also here, each has its own
    results = call(runs / "fold1", runs / "fold2", "--data", write("new.csv", text))
    assert results["thresholds"] == [0, 1] and results["exit_share"] == {"1": 0.5, "2": 0, "4": 0.5}
    results = call(runs / "fold1", "--data", "new.csv", "--against", runs / "other")
    assert (results["split"], results["clips"], results["speakers"]) == ("all", 6, None)
    assert len(set(evaluate.Pool(None, evaluate.load_corpus("new.csv"), None, None, []).units)) == 6, "clips are drawn"
    write("new.csv", text.replace("sadness", "joy"))
    with pytest.warns(UserWarning, match=r"new\.csv: .*joy"):  # the rest is scored
        results = call(runs / "fold1", "--data", "new.csv")
    assert results["clips"] == 3 and results["labels"] == ["anger", "sadness"] and results["chance"] == 1
    write("new.csv", "path,label\n0.wav,grief\n")
    assert "new.csv" in refused(evaluate, runs / "fold1", "--data", "new.csv")


def test_training_clips_are_not_scored(runs, corpus, tmp_path, refused):
    """What looks like the run's own corpus is refused, wherever it lies, whichever system has written split.csv."""
    run, (header, *rows) = runs / "fold1", corpus.read_text().splitlines()
    moved = write(tmp_path / "moved.csv", corpus.read_text().replace(".wav", ".WAV"))
    split = (run / "split.csv").read_text()
    for text in (split.replace("/", "\\").replace("\\tmp", "C:\\tmp"), split):
        write(run / "split.csv", text)
        for source in (corpus, moved):
            assert str(source) in refused(evaluate, run, "--data", source)
    lines = [*rows[:7], *(row.replace("-", "_", 1) for row in rows[-12:])]
    for line in lines:
        shutil.copy(corpus.parent / "0-anger-0.wav", line.partition(",")[0])
    # a third may be the same by chance; a column of splits says that it is another corpus
    assert call(run, "--data", write("a.csv", "\n".join([header, *lines[1:]])))["clips"] == 18
    assert "a.csv" in refused(evaluate, run, "--data", write("a.csv", "\n".join([header, *lines])))
    write("a.csv", "\n".join([f"{header},split", *(f"{line},test" for line in lines)]))
    assert call(run, "--data", "a.csv")["clips"] == 19


def test_audio(runs, corpus, refused):
    """Of files, a folder and a wildcard, also behind one that is not there."""
    run, clips = runs / "fold1", [str(corpus.parent / f"0-anger-{n}.wav") for n in (0, 1)]
    configure(run, threshold=None)
    Path("folder/deep").mkdir(parents=True)
    clips += [shutil.copy(clips[0], "folder/b.wav"), shutil.copy(clips[0], "folder/deep/a.wav")]
    names = [clips[0], "gone.wav", f"{corpus.parent}/0-anger-[1].wav", "folder"]
    assert "gone.wav" in refused(evaluate, run, "--audio", *names, "--json", "a.json")
    model = sdser.MultiExitSER.from_pretrained(run)
    for path, row, wanted in zip(clips, json.loads(Path("a.json").read_text()), model.classify(clips), strict=True):
        assert (row["path"], row["label"], row["exit"]) == (path, wanted.label, 4)
        assert row["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-6)
    configure(run, threshold=0.0)
    for flags, exit in ([], 1), (["--threshold", "1"], 4), (["--exit", "2"], 2):
        with pytest.raises(SystemExit) as end:
            call(run, "--audio", clips[0], *flags)
        assert end.value.code == 0 and json.loads(Path("results.json").read_text())[0]["exit"] == exit


def test_one_speaker_has_no_interval_and_without_a_threshold_there_is_no_early_exit(runs, capsys):
    """As every fold of IEMOCAP, when it is not pooled with others; and as after --final."""
    for split in (runs / "fold1" / "split.csv", runs / "other" / "split.csv"):
        rows = split.read_text().splitlines()
        speaker = next(row for row in rows if row.endswith("test")).split(",")[2]
        write(split, "\n".join(row for row in rows if not row.endswith("test") or f",{speaker}," in row))
    configure(runs / "fold1", threshold=None)
    results = call(runs / "fold1", "--against", runs / "other", *PLOT)
    assert [row["exit"] for row in results["rows"]] == [1, 2, 4, "fusion"] and results["thresholds"] == [None]
    assert len(call(runs / "fold1", runs / "fold2")["rows"]) == 4, "one of them has none"
    assert results["speakers"] == 1 and all(row["uar_ci95"] is None for row in results["rows"])
    assert all(row["ci95"] is None for row in results["against"])
    out = capsys.readouterr().out
    assert out.count("  -  ") >= len(results["rows"])
    for row in results["rows"]:
        assert f"{row['parameters'] / 1e6:.2f}  {row['macs_per_second'] / 1e9:6.2f}  {row['uar']:.3f}" in out


def test_a_checkpoint_is_only_read(runs, corpus, capsys):
    """Its config is spelled otherwise than `save_pretrained` would, so that even the same values show."""
    configure(runs / "fold1", threshold=0.97)
    before = {path: path.read_bytes() for path in runs.rglob("*.*")}
    call(runs / "fold1", "--against", runs / "other")
    assert "config.json" not in capsys.readouterr().out
    call(runs / "fold1", runs / "fold2", "--tolerance", 0.05)
    assert "config.json" in capsys.readouterr().out, "it says where the threshold could be kept"
    with pytest.raises(SystemExit):
        call(runs / "fold1", "--audio", corpus.parent / "0-anger-0.wav")
    benchmark_edge.main([str(runs / "fold1"), "--export", "exit", "--exit", "2"])
    assert set(runs.rglob("*.*")) == before.keys() and len(before) == 21
    assert [path for path, content in before.items() if path.read_bytes() != content] == []
