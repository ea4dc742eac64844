"""The training script end to end on a small corpus, and what it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUTS
from transformers import AutoModel, Wav2Vec2Config, Wav2Vec2Model

import sdser
import train

ROOT = Path(__file__).parents[1]


def fit(corpus, out, *flags):
    train.main(["--data", str(corpus), "--epochs", "2", "--batch-size", "4", "--out", str(out), *map(str, flags)])
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON


def refused(capsys, *flags) -> str:
    """Runs the script, which must end with status 2, and returns its one sentence."""
    with pytest.raises(SystemExit) as end:
        train.main(list(map(str, flags)))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error
    return error.partition("error: ")[2]


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def with_splits(corpus, tmp_path, *more):
    """A manifest of the corpus with fixed splits, and more rows."""
    split = dict(zip("012345", ["train", "train", "train", "dev", "dev", "test"]))
    rows = [f"{corpus.parent}/{row},{split[row[0]]}" for row in corpus.read_text().splitlines()[1:]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker,split", *rows, *more]))
    return tmp_path / "list.csv"


# -- a run ------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(corpus, tmp_path):
    results = fit(corpus, tmp_path / "run", "--distill-warmup", 0)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {"config.json", "model.safetensors", "train_state.pt", "split.csv", "log.jsonl", "results.json"}
    assert files - {"README.md"} == wanted

    assert results["labels"] == ["anger", "sadness"] and results["seconds"] > 0
    assert results["args"]["preset"] == "toy" and results["args"]["lr"] == train.parse_args([]).lr
    for split in ("dev", "test"):
        assert [row["exit"] for row in results[split]["exits"]] == [1, 2, 4]
        for row in [*results[split]["exits"], results[split]["fusion"]]:
            assert all(0 <= row[name] <= 1 for name in ("uar", "accuracy", "macro_f1"))

    log = read_log(tmp_path / "run")
    assert [line["epoch"] for line in log] == [1, 2]
    for line in log:
        total = line["ce"] + line["ce_students"] + line["kl"] + line["hint"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    best = max(log, key=lambda line: line["dev_uar"])
    assert results["dev"] == best["dev"], "the saved model is the best epoch's"

    rows = list(csv.DictReader((tmp_path / "run" / "split.csv").open()))
    assert list(rows[0]) == ["path", "label", "speaker", "split"] and len(rows) == 36
    assert all(Path(row["path"]).is_absolute() for row in rows)
    assert train.split_clips(train.load_corpus(tmp_path / "run" / "split.csv")) == [train.Clip(**row) for row in rows]
    [prediction] = sdser.MultiExitSER.from_pretrained(tmp_path / "run").classify([rows[0]["path"]])
    assert prediction.label in results["labels"]


def test_same_seed_same_weights_whatever_the_workers(corpus, tmp_path):
    weights = []
    for name, flags in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        fit(corpus, tmp_path / name, "--seconds", 0.4, "--epochs", 1, *flags)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    splits = [(tmp_path / name / "split.csv").read_text() for name in "abc"]
    assert splits[0] == splits[1] == splits[2]


def test_resume_ends_where_an_unbroken_run_does(corpus, tmp_path, monkeypatch, capsys):
    fit(corpus, tmp_path / "whole", "--epochs", 3, "--seconds", 0.4)
    epoch = train.train_epoch

    def killed(*args):
        if args[-1].startswith("epoch 3"):
            raise KeyboardInterrupt
        return epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "train_epoch", killed)
        fit(corpus, tmp_path / "cut", "--epochs", 3, "--seconds", 0.4)
    assert end.value.code == 130 and f"--resume --out {tmp_path / 'cut'}" in capsys.readouterr().err
    assert "--lr" in refused(capsys, "--resume", "--out", tmp_path / "cut", "--lr", 0.5)
    train.main(["--resume", "--out", str(tmp_path / "cut")])
    for file in ("model.safetensors", "split.csv"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    whole, cut = (torch.load(tmp_path / run / "train_state.pt", weights_only=True) for run in ("whole", "cut"))
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    assert len(read_log(tmp_path / "cut")) == 3


def test_a_folder_that_holds_something_is_not_written_to(corpus, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert str(tmp_path) in refused(capsys, "--data", corpus, "--out", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert "config.json" in refused(capsys, "--data", corpus, "--out", tmp_path / "config.json")
    assert "train_state.pt" in refused(capsys, "--resume", "--out", tmp_path)


def test_epochs_and_seeds_differ_in_their_batches(corpus, tmp_path, monkeypatch):
    orders, make_batches = [], train.make_batches

    def spy(*args):
        orders.append(make_batches(*args))
        return orders[-1]

    monkeypatch.setattr(train, "make_batches", spy)
    for seed in (0, 1):
        fit(corpus, tmp_path / str(seed), "--seed", seed)
    assert len(orders) == 4 and all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_test_clips_are_read_once_and_last(corpus, tmp_path, monkeypatch):
    read, load_audio = [], sdser.load_audio

    def spy(path, *args, **kwargs):
        read.append(str(path))
        return load_audio(path, *args, **kwargs)

    monkeypatch.setattr(sdser, "load_audio", spy)
    fit(corpus, tmp_path)
    tested = [row["path"] for row in csv.DictReader((tmp_path / "split.csv").open()) if row["split"] == "test"]
    assert sorted(read[-len(tested) :]) == sorted(tested)
    assert not set(tested) & set(read[: -len(tested)])


def test_labels_keep_their_clips_alone(corpus, tmp_path, capsys):
    rows = [f"{corpus.parent}/{row}" for row in corpus.read_text().splitlines()[1:]]
    more = [row.replace("anger", "joy") for row in rows if ",anger" in row]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker", *rows, *more]))
    fit(tmp_path / "list.csv", tmp_path / "run", "--epochs", 1, "--labels", "sadness", "anger")
    assert sdser.MultiExitSER.from_pretrained(tmp_path / "run").labels == ["anger", "sadness"]
    split = list(csv.DictReader((tmp_path / "run" / "split.csv").open()))
    assert {row["label"] for row in split} == {"anger", "sadness"} and len(split) == 36
    flags = "--data", tmp_path / "list.csv", "--out", tmp_path / "other", "--labels"
    assert "fury" in refused(capsys, *flags, "anger", "fury")
    assert "--labels" in refused(capsys, *flags, "anger", "anger")


def test_final_trains_on_dev_too_and_keeps_the_last_epoch(corpus, tmp_path):
    results = fit(corpus, tmp_path / "run", "--final", "--epochs", 3)
    assert "dev" not in results and [row["exit"] for row in results["test"]["exits"]] == [1, 2, 4]
    splits = {row["path"]: row["split"] for row in csv.DictReader((tmp_path / "run" / "split.csv").open())}
    usual = {clip.path: clip.split for clip in train.split_clips(train.load_corpus(corpus))}
    assert splits == {path: "train" if split == "dev" else split for path, split in usual.items()}
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    kept = sdser.MultiExitSER.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in state["model"].items())
    assert all("dev" not in line and line["loss"] > 0 for line in state["log"])
    train.main(["--resume", "--out", str(tmp_path / "run")])  # nothing is left to train


@pytest.mark.parametrize("exits", [[1, 4], [1, 2, 4]])
def test_fusion_is_that_of_the_students(corpus, tmp_path, exits):
    """Worked out clip by clip; the teacher takes no part, and one student alone is not fused."""
    results = fit(corpus, tmp_path, "--exits", *exits, "--epochs", 1)
    clips = [clip for clip in train.load_corpus(tmp_path / "split.csv") if clip.split == "test"]
    model = sdser.MultiExitSER.from_pretrained(tmp_path)
    answers = []
    for clip in clips:
        students = [output.logits[0] for output in model(sdser.load_audio(clip.path)[None])[:-1]]
        margins = [abs(logits[0] - logits[1]).item() for logits in students]  # of two classes
        answers.append(students[margins.index(max(margins))].argmax().item())
    targets = [model.labels.index(clip.label) for clip in clips]
    expected = sdser.scores(targets, answers, 2)
    assert results["test"].get("fusion") == (expected if exits == [1, 2, 4] else None)


@torch.no_grad()
def test_predict_gives_files_in_any_order_what_each_gets_alone(wav):
    model = sdser.MultiExitSER(["a", "b"], "tiny").eval()
    paths = [wav(0.1 * torch.randn(n).numpy(), f"{n}.wav", subtype="FLOAT") for n in (9000, 401, 20000, 5000, 12000)]
    clips = train.look_at([train.Clip(str(path), "a", None) for path in paths])
    assert [clip.seconds for clip in clips] == [n / 16000 for n in (9000, 401, 20000, 5000, 12000)]
    logits = train.predict(model, clips, batch_size=2)
    for i, path in enumerate(paths):
        for row, output in zip(logits[:, i], model(sdser.load_audio(path)[None])):
            torch.testing.assert_close(row, output.logits[0], atol=1e-5, rtol=0)


# -- steps ------------------------------------------------------------------------------------------------------------


def weights_after_a_step(corpus, batch_size, accumulate):
    """Weights after one step on 8 clips without dropout or masks."""
    flags = ["--batch-size", batch_size, "--accumulate", accumulate, "--lr", 0.1, "--device", "cpu"]
    args = train.parse_args(list(map(str, flags)))
    clips = train.look_at(train.load_corpus(corpus)[:8])
    torch.manual_seed(0)
    config = {**LAYOUTS["wav2vec2-base"].to_dict(), "mask_time_prob": 0.0}
    for name in config:
        config[name] = 0.0 if "dropout" in name else config[name]
    model = sdser.MultiExitSER(["anger", "sadness"], config, [1, 4], "gru")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batches = [list(range(8))[i : i + batch_size] for i in range(0, 8, batch_size)]
    dataset = train.ClipDataset(clips, ["anger", "sadness"], crop_seconds=args.seconds)
    losses = train.train_epoch(model, dataset, batches, optimizer, scheduler, args, 0, "")
    return losses, model.state_dict()


def test_accumulation_equals_one_large_batch(corpus):
    losses, large = weights_after_a_step(corpus, 8, 1)
    for batch_size, accumulate in ((2, 4), (3, 3)):  # 3, 3 and 2 clips: uneven
        same_losses, small = weights_after_a_step(corpus, batch_size, accumulate)
        assert same_losses["ce"] == pytest.approx(losses["ce"], rel=1e-4)
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, atol=1e-5, rtol=1e-4)
    _, separate = weights_after_a_step(corpus, 2, 1)
    assert not torch.allclose(separate["heads.4.classifier.weight"], large["heads.4.classifier.weight"], atol=1e-4)


def test_batches_hold_clips_of_similar_length_in_random_order():
    seconds = np.random.default_rng(0).uniform(1, 6, 200)
    clips = [train.Clip(str(i), "a", None, "train", length) for i, length in enumerate(seconds)]
    args = train.parse_args(["--batch-size", "8", "--seconds", "6"])
    batches = train.make_batches(clips, args, np.random.default_rng(1))
    assert sorted(i for batch in batches for i in batch) == list(range(200)) and max(map(len, batches)) == 8
    assert np.mean([np.ptp(seconds[batch]) for batch in batches]) < 1.5 < np.ptp(seconds)
    assert batches == train.make_batches(clips, args, np.random.default_rng(1))
    assert batches != train.make_batches(clips, args, np.random.default_rng(2))
    args.window = "tile"  # all of one length: sorting would gain nothing, and mix batches less
    tiled = train.make_batches(clips, args, np.random.default_rng(1))
    assert [i for batch in tiled for i in batch] == np.random.default_rng(1).permutation(200).tolist()


def test_long_clips_are_cropped_elsewhere_in_each_epoch(wav):
    path = wav(np.random.default_rng(0).normal(0, 0.1, 61 * 16000))
    [clip] = train.look_at([train.Clip(str(path), "anger", "s0", "train")])
    first, second = (train.ClipDataset([clip], ["anger"], crop_seconds=2.0, seed=f"0 {n}")[0][0] for n in (1, 2))
    assert len(first) == len(second) == 32_000 and not torch.equal(first, second)
    tiled, _ = train.ClipDataset([clip], ["anger"], tile_seconds=2.0, crop_seconds=2.0)[0]
    assert torch.equal(tiled, sdser.load_audio(path)[:32_000])


def test_learning_rate_warms_up_and_decays_or_stays():
    model = sdser.MultiExitSER(["a", "b"], "tiny")
    for preset, expected in (("fast", {0: 0.1, 9: 1.0, 54: 0.51, 99: 0.0}), ("paper", {0: 1.0, 99: 1.0})):
        args = train.parse_args(["--preset", preset])
        optimizer, scheduler = train.make_optimizer(model, args, steps=100)
        rates = []
        for _ in range(100):
            rates.append(scheduler.get_last_lr()[0] / args.lr)
            optimizer.step()
            scheduler.step()
        assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("layout", ["wav2vec2-base", "hubert-large", "wavlm-base"])
def test_a_pre_trained_folder_trains_with_a_frozen_encoder(corpus, tmp_path, layout):
    AutoModel.from_config(LAYOUTS[layout]).save_pretrained(tmp_path / "backbone")
    before = AutoModel.from_pretrained(tmp_path / "backbone").state_dict()
    results = fit(corpus, tmp_path / "run", "--backbone", tmp_path / "backbone", "--exits", 1, 4, "--epochs", 1)
    assert results["args"]["preset"] == "fast" and results["args"]["freeze_cnn"]
    after = sdser.MultiExitSER.from_pretrained(tmp_path / "run").backbone.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("feature_extractor"), name


def test_wav2vec2_base_shaped_checkpoint_takes_a_step(corpus, tmp_path):
    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(tmp_path / "wav2vec2-base")
    args = train.parse_args(["--backbone", str(tmp_path / "wav2vec2-base"), "--device", "cpu", "--dtype", "float32"])
    model = sdser.MultiExitSER(["anger", "sadness"], args.backbone, args.exits, args.head)
    assert model.exits == [3, 8, 10, 12] and args.preset == "fast"
    optimizer, scheduler = train.make_optimizer(model, args, steps=10)
    dataset = train.ClipDataset(train.look_at(train.load_corpus(corpus)[:2]), ["anger", "sadness"])
    before = model.backbone.encoder.layers[11].feed_forward.output_dense.weight.clone()
    losses = train.train_epoch(model, dataset, [[0, 1]], optimizer, scheduler, args, 0, "")
    assert np.isfinite(losses["loss"])
    assert not torch.equal(before, model.backbone.encoder.layers[11].feed_forward.output_dense.weight)


@pytest.mark.parametrize("flags", [
    ["--preset", "paper", "--backbone", "tiny"], ["--exits", 2, "--head", "lstm"],
    ["--window", "tile", "--seconds", 0.3], ["--kl-weight", 0, "--hint-weight", 0],
    ["--no-detach-teacher", "--temperature", 2, "--accumulate", 3], ["--dtype", "bfloat16", "--label-fraction", 0.2],
    ["--fold", "2/3", "--head", "mean", "gru", "attention"],
])  # fmt: skip
def test_flags_of_the_comparisons(corpus, tmp_path, flags):
    results = fit(corpus, tmp_path, *flags, "--epochs", 1)
    model = sdser.MultiExitSER.from_pretrained(tmp_path)
    assert len(model.exits) == len(results["test"]["exits"])
    if "mean" in flags:
        assert model.head_kinds == ["mean", "gru", "attention"]
    if "lstm" in flags:
        assert model.exits == [2] == [len(model.backbone.encoder.layers)] and model.head_kinds == ["lstm"]
    if "tile" in flags or "paper" in flags:
        assert model.tile_seconds == (0.3 if "tile" in flags else 5.984)


def test_distillation_grows_from_nothing(corpus, tmp_path):
    for share, silent in ((1, [True, False]), (0, [False, False])):
        fit(corpus, tmp_path / str(share), "--batch-size", 64, "--distill-warmup", share)  # a step an epoch
        log = read_log(tmp_path / str(share))
        assert [(line["kl"] == 0, line["hint"] == 0) for line in log] == [(s, s) for s in silent]
    ramped, full = (read_log(tmp_path / name)[1] for name in ("1", "0"))
    assert full["loss"] == pytest.approx(full["ce"] + full["ce_students"] + full["kl"] + full["hint"], rel=1e-4)
    half = (ramped["kl"] + ramped["hint"]) / 2  # the second of two steps
    assert ramped["loss"] == pytest.approx(ramped["ce"] + ramped["ce_students"] + half, rel=1e-4)


def test_presets():
    assert train.parse_args([]).preset == train.parse_args(["--backbone", "small"]).preset == "toy"
    assert train.parse_args(["--backbone", "facebook/wav2vec2-base"]).preset == "fast"
    paper = train.parse_args(["--preset", "paper"])
    recipe = dict(backbone="facebook/wav2vec2-base", lr=3e-5, head_lr=3e-5, batch_size=16, epochs=20, window="tile",
                  seconds=5.984, head="gru", kl_weight=1, hint_weight=1, temperature=1, weight_decay=0, warmup=None,
                  distill_warmup=0, dtype="float32", fold=[1, 5])  # fmt: skip
    assert recipe.items() <= vars(paper).items()
    assert round(paper.seconds * sdser.SAMPLE_RATE) == 95_744
    assert train.parse_args(["--preset", "paper", "--lr", "1e-4"]).lr == 1e-4
    assert train.parse_args(["--lr", "0.5"]).head_lr == 0.5
    assert train.parse_args(["--backbone", "x/y", "--lr", "0.5"]).head_lr == 1e-3


def test_label_fraction_is_stratified_nested_and_of_training_clips_alone():
    clips = []
    for split in train.SPLITS:
        for label, n in (("a", 40), ("b", 10), ("c", 3)):
            clips += [train.Clip(f"{label}{split}{i}", label, None, split) for i in range(n)]

    def count(some):
        return [sum(clip.label == label and clip.split == "train" for clip in some) for label in "abc"]

    tenth, quarter = train.take_fraction(clips, 0.1, seed=0), train.take_fraction(clips, 0.25, seed=0)
    assert count(tenth) == [4, 1, 1] and count(quarter) == [10, 2, 1]
    assert set(tenth) < set(quarter)
    assert [clip for clip in tenth if clip.split != "train"] == [clip for clip in clips if clip.split != "train"]
    assert tenth != train.take_fraction(clips, 0.1, seed=1)
    assert train.take_fraction(clips, 1.0, seed=0) == clips


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--exits", "2", "1"], ["--head", "conv"], ["--fold", "4/3"], ["--batch-size", "0"], ["--temperature", "nan"],
    ["--backbone", "huge"], ["--device", "toaster"], ["--label-fraction", "-1"],
])  # fmt: skip
def test_wrong_flags_are_named_before_anything_is_written(corpus, tmp_path, capsys, flags):
    message = refused(capsys, "--data", corpus, "--out", tmp_path / "run", *flags)
    assert flags[0].strip("-") in message or flags[1] in message
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_unreadable_clips_stop_the_run_or_are_left_out(corpus, tmp_path, capsys, wav):
    broken = {"cut.wav": lambda b: b[:5000], "empty.wav": lambda _: b"", "text.wav": lambda _: b"no audio"}
    source = (corpus.parent / "0-anger-0.wav").read_bytes()
    for name, change in broken.items():
        (tmp_path / name).write_bytes(change(source))
    wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT")  # its header is sound
    bad = [*broken, "nan.wav", "gone.wav"]
    manifest = with_splits(corpus, tmp_path, *(f"{name},anger,s0,train" for name in bad))
    message = refused(capsys, "--data", manifest, "--out", tmp_path / "run")
    assert "cut.wav" in message and "--skip-bad" in message
    with pytest.warns(UserWarning) as warned:
        fit(manifest, tmp_path / "run", "--skip-bad", "--epochs", 1)
    told = [str(warning.message) for warning in warned]
    assert all(any(name in message for message in told) for name in bad)
    assert len((tmp_path / "run" / "split.csv").read_text().splitlines()) == 37


def test_a_clip_that_fails_later_stops_the_run_with_its_name_and_resume_goes_on(corpus, tmp_path, capsys, wav):
    path = wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT")
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")
    for workers in (0, 1):
        out = tmp_path / str(workers)
        flags = "--data", manifest, "--out", out, "--epochs", 1, "--workers", workers
        assert str(path) in refused(capsys, *flags), "test clips are read after training"
        wav(np.random.default_rng(0).uniform(-0.1, 0.1, 8000), "nan.wav")  # repaired
        train.main(["--resume", "--out", str(out)])
        assert json.loads((out / "results.json").read_text())["test"]["exits"]
        wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT")


def test_long_clips_are_trained_on_but_not_scored(corpus, tmp_path, capsys, wav):
    path = wav(np.random.default_rng(0).normal(0, 0.1, 61 * 16000), "long.wav")
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")
    assert str(path) in refused(capsys, "--data", manifest, "--out", tmp_path / "run")


def test_a_loss_that_is_not_finite_names_its_files_and_keeps_the_last_checkpoint(corpus, tmp_path, capsys):
    epoch = train.train_epoch

    def spoilt(model, *args):
        if args[-1].startswith("epoch 2"):
            model.heads["4"].classifier.bias.data[0] = torch.inf
        return epoch(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", spoilt)
        message = refused(capsys, "--data", corpus, "--out", tmp_path, "--epochs", 3)
    assert str(corpus.parent) in message and "--lr" in message
    sdser.MultiExitSER.from_pretrained(tmp_path).classify(str(corpus.parent / "0-anger-0.wav"))
    train.main(["--resume", "--out", str(tmp_path)])
    assert len(read_log(tmp_path)) == 3


def test_a_gradient_or_answers_that_are_not_finite_are_never_saved(corpus, tmp_path, capsys, monkeypatch):
    flags = "--data", corpus, "--out", tmp_path / "run", "--preset", "paper", "--backbone", "tiny", "--seconds", 0.3
    forward = sdser.ExitHead.forward

    def overflow(self, *args):
        logits, embedding = forward(self, *args)
        return logits + (0 * logits).abs().sqrt(), embedding  # the root's slope at 0 is infinite

    with monkeypatch.context() as patch:  # the loss is finite, its gradient not
        patch.setattr(sdser.ExitHead, "forward", overflow)
        refused(capsys, *flags)
    # all in one step, so that only the dev split sees what it did
    assert "--lr" in refused(capsys, *flags, "--lr", "1e30", "--batch-size", 100)
    assert not list((tmp_path / "run").iterdir())


def test_as_a_command(tmp_path):
    """A sentence, status 2 and no traceback also where a process of its own runs."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", "nowhere", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere: ") and done.stderr.count("\n") == 1
