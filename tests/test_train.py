"""The training script end to end on a small corpus, and what it refuses."""

import csv
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import LAYOUTS
from transformers import AutoModel

import sdser
import train

ROOT = Path(__file__).parents[1]


def fit(corpus, out, *flags):
    train.main(["--data", str(corpus), "--epochs", "2", "--batch-size", "4", "--out", str(out), *map(str, flags)])
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON


def refused(capsys, *flags) -> str:
    """Runs the script, which must end with status 2, and returns the last line of what it says."""
    with pytest.raises(SystemExit) as end:
        train.main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_split(out) -> list[dict]:
    with open(out / "split.csv", newline="") as file:
        return list(csv.DictReader(file))


def with_splits(corpus, tmp_path, *more):
    """A manifest of the corpus with fixed splits, and more rows."""
    split = dict(zip("012345", ["train", "train", "train", "dev", "dev", "test"]))
    rows = [f"{corpus.parent}/{row},{split[row[0]]}" for row in corpus.read_text().splitlines()[1:]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker,split", *rows, *more]))
    return tmp_path / "list.csv"


# -- a run ------------------------------------------------------------------------------------------------------------
def test_files_of_a_run(corpus, tmp_path):
    """In a thread, as behind a button of a web page."""
    out = tmp_path / "run"
    thread = threading.Thread(target=fit, args=(corpus, out, "--distill-warmup", 0))
    thread.start()
    thread.join()
    results, log, rows = json.loads((out / "results.json").read_text()), read_log(out), read_split(out)
    wanted = {"config.json", "model.safetensors", "train_state.pt", "split.csv", "log.jsonl", "results.json"}
    assert {path.name for path in out.iterdir()} == {"README.md", *wanted}
    assert results["labels"] == ["anger", "sadness"] and results["args"]["preset"] == "toy"
    for split in ("dev", "test"):
        assert [row["exit"] for row in results[split]["exits"]] == [1, 2, 4]
        for row in [*results[split]["exits"], results[split]["fusion"]]:
            assert all(0 <= row[name] <= 1 for name in ("uar", "accuracy", "macro_f1"))
    assert [line["epoch"] for line in log] == [1, 2]
    for line in log:
        assert line["loss"] == pytest.approx(line["ce"] + line["ce_students"] + line["kl"] + line["hint"], rel=1e-4)
    assert results["dev"] == max(log, key=lambda line: line["dev_uar"])["dev"], "the best epoch was saved"
    assert len(rows) == 36 and all(Path(row["path"]).is_absolute() for row in rows)
    assert train.split_clips(train.load_corpus(out / "split.csv")) == [train.Clip(**row) for row in rows]


def test_same_seed_same_weights_whatever_the_workers(corpus, tmp_path):
    weights = []
    for name, flags in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        fit(corpus, tmp_path / name, "--seconds", 0.4, "--epochs", 1, *flags)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert read_split(tmp_path / "a") == read_split(tmp_path / "b") == read_split(tmp_path / "c")


def test_a_folder_that_holds_something_is_not_written_to(corpus, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert str(tmp_path) in refused(capsys, "--data", corpus, "--out", tmp_path)
    assert "config.json" in refused(capsys, "--data", corpus, "--out", tmp_path / "config.json")
    assert "train_state.pt" in refused(capsys, "--resume", "--out", tmp_path)
    assert "--lr" in refused(capsys, "--resume", "--out", tmp_path, "--lr", 0.5), "the run's own flags are used"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_test_clips_are_read_once_and_last(corpus, tmp_path, monkeypatch):
    read, load_audio = [], sdser.load_audio

    def spy(path, *args, **kwargs):
        read.append(str(path))
        return load_audio(path, *args, **kwargs)

    monkeypatch.setattr(sdser, "load_audio", spy)
    fit(corpus, tmp_path)
    tested = [row["path"] for row in read_split(tmp_path) if row["split"] == "test"]
    assert sorted(read[-len(tested) :]) == sorted(tested)
    assert not set(tested) & set(read[: -len(tested)])


def test_labels_keep_their_clips_alone(corpus, tmp_path, capsys):
    anger = [row for row in corpus.read_text().splitlines() if ",anger" in row]
    joy = [f"{corpus.parent}/{row},train".replace(",anger", ",joy") for row in anger]
    manifest, out = with_splits(corpus, tmp_path, *joy), tmp_path / "run"
    fit(manifest, out, "--epochs", 1, "--labels", "sadness", "anger")
    assert sdser.MultiExitSER.from_pretrained(out).labels == ["anger", "sadness"]
    assert len(read_split(out)) == 36 and {row["label"] for row in read_split(out)} == {"anger", "sadness"}
    for labels in (["anger", "fury"], ["anger", "anger"]):
        assert "--labels" in refused(capsys, "--data", manifest, "--out", tmp_path / "other", "--labels", *labels)


def test_final_trains_on_dev_too_and_keeps_the_last_epoch(corpus, tmp_path):
    results = fit(corpus, tmp_path, "--final", "--epochs", 3)
    assert "dev" not in results and [row["exit"] for row in results["test"]["exits"]] == [1, 2, 4]
    usual = {clip.path: clip.split for clip in train.split_clips(train.load_corpus(corpus))}
    for row in read_split(tmp_path):
        assert row["split"] == ("test" if usual[row["path"]] == "test" else "train")
    state = torch.load(tmp_path / "train_state.pt", weights_only=True)
    kept = sdser.MultiExitSER.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in state["model"].items())
    assert all("dev" not in line for line in state["log"])


@torch.no_grad()
def test_predict_gives_files_in_any_order_what_each_gets_alone(wav):
    model, sizes = sdser.MultiExitSER(["a", "b"], "tiny").eval(), (9000, 401, 20000, 5000, 12000)
    paths = [wav(0.1 * torch.randn(size).numpy(), f"{size}.wav", subtype="FLOAT") for size in sizes]
    clips = train.look_at([train.Clip(str(path), "a", None) for path in paths])
    assert [clip.seconds for clip in clips] == [size / 16000 for size in sizes]
    logits = train.predict(model, clips, batch_size=2)
    for i, path in enumerate(paths):
        for row, output in zip(logits[:, i], model(sdser.load_audio(path)[None])):
            torch.testing.assert_close(row, output.logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile_seconds", [None, 4.0])
def test_scoring_holds_no_more_seconds_at_once_than_a_training_batch(monkeypatch, tile_seconds):
    """Long clips come in smaller batches, and nothing else changes."""
    model, seen = sdser.MultiExitSER(["a", "b"], "tiny", tile_seconds=tile_seconds).eval(), []
    clips = [train.Clip(str(i), "a", None, "test", seconds) for i, seconds in enumerate([30.0, 1.0, 40.0, 2.0] * 10)]

    def load(dataset, batches, workers):
        seen.extend(batches)
        return [(torch.zeros(len(batch), 400), torch.full((len(batch),), 400), None) for batch in batches]

    monkeypatch.setattr(train, "load", load)
    train.predict(model, clips)
    assert sorted(i for batch in seen for i in batch) == list(range(40))
    assert max(len(batch) for batch in seen) == 16
    for batch in seen:
        longest = tile_seconds or max(clips[i].seconds for i in batch)
        assert len(batch) * longest <= train.BATCH_SECONDS


def test_resume_finds_the_clips_where_they_lie_now(corpus, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(corpus.parent, old)
    fit(old / "all.csv", tmp_path / "run", "--epochs", 1)
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    (tmp_path / "run" / "results.json").unlink()
    old.rename(tmp_path / "new")
    assert "old" in refused(capsys, "--resume", "--out", tmp_path / "run")
    train.main(["--resume", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "new" / "all.csv")])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"] == scores


# -- steps ------------------------------------------------------------------------------------------------------------
def weights_after_a_step(corpus, batch_size, accumulate):
    """Losses of an epoch of 8 clips without dropout or masks, and the weights after it."""
    args = train.parse_args(["--batch-size", str(batch_size), "--accumulate", str(accumulate), "--device", "cpu"])
    args.max_norm = None  # it would hide a wrong scale
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
    assert batches != train.make_batches(clips, args, np.random.default_rng(2))
    args.window = "tile"  # all of one length: sorting would gain nothing, and mix batches less
    tiled = train.make_batches(clips, args, np.random.default_rng(1))
    assert [i for batch in tiled for i in batch] == np.random.default_rng(1).permutation(200).tolist()


def test_epochs_and_seeds_differ_in_batches_and_crops(corpus, tmp_path, monkeypatch):
    seen, epoch = [], train.train_epoch

    def spy(model, dataset, batches, *args):
        seen.append((batches, dataset[2][0].tolist()))
        return epoch(model, dataset, batches, *args)

    monkeypatch.setattr(train, "train_epoch", spy)
    for seed in (0, 1):
        fit(corpus, tmp_path / str(seed), "--seed", seed, "--seconds", 0.2)
    for batches, crop in seen:
        assert len(crop) == 0.2 * 16000
        assert sum(batches == others or crop == other for others, other in seen) == 1  # itself


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
    assert "fusion" not in results["test"], "one student alone is not fused"
    after = sdser.MultiExitSER.from_pretrained(tmp_path / "run").backbone.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("feature_extractor"), name


@pytest.mark.parametrize(("flags", "heads", "tile_seconds"), [
    (["--preset", "paper", "--backbone", "tiny", "--seconds", 0.3], ["gru", "gru", "mean"], 0.3),
    (["--exits", 2, "--head", "lstm", "--kl-weight", 0, "--hint-weight", 0], ["lstm"], None),
    (["--fold", "2/3", "--head", "mean", "gru", "attention", "--accumulate", 3], ["mean", "gru", "attention"], None),
    (["--no-detach-teacher", "--dtype", "bfloat16", "--label-fraction", 0.2], ["attention", "attention", "mean"], None),
])  # fmt: skip
def test_flags_of_the_comparisons(corpus, tmp_path, flags, heads, tile_seconds):
    results = fit(corpus, tmp_path, *flags, "--epochs", 1)
    model = sdser.MultiExitSER.from_pretrained(tmp_path)
    assert (model.head_kinds, model.tile_seconds) == (heads, tile_seconds)
    assert len(results["test"]["exits"]) == len(heads)
    assert len(model.backbone.encoder.layers) == model.exits[-1] == results["test"]["exits"][-1]["exit"]


def test_distillation_grows_from_nothing(corpus, tmp_path):
    for share, silent in ((1, [True, False]), (0, [False, False])):
        fit(corpus, tmp_path / str(share), "--batch-size", 64, "--distill-warmup", share)  # a step an epoch
        log = read_log(tmp_path / str(share))
        assert [(line["kl"] == 0, line["hint"] == 0) for line in log] == [(s, s) for s in silent]
    line = read_log(tmp_path / "1")[1]  # the second of two steps
    half = (line["kl"] + line["hint"]) / 2
    assert line["loss"] == pytest.approx(line["ce"] + line["ce_students"] + half, rel=1e-4)


def test_balanced_weights_are_inverse_frequencies(corpus, tmp_path):
    clips = [train.Clip(str(i), label, None) for i, label in enumerate("aaab")]
    weights = train.inverse_frequencies(train.ClipDataset(clips, ["a", "b"]))
    assert weights.tolist() == pytest.approx([4 / 2 / 3, 4 / 2 / 1])
    rows = [f"{corpus.parent}/{row}" for row in corpus.read_text().splitlines()[1:] if "sadness-2" not in row]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker", *rows]))
    fit(tmp_path / "list.csv", tmp_path / "plain", "--epochs", 1)
    fit(tmp_path / "list.csv", tmp_path / "balanced", "--epochs", 1, "--balanced")
    plain, balanced = (read_log(tmp_path / name)[0]["ce"] for name in ("plain", "balanced"))
    assert plain != pytest.approx(balanced, rel=1e-3)


@pytest.mark.parametrize(("has_it", "flags", "wanted"), [
    (True, [], "bfloat16"), (False, [], "float32"), (False, ["--dtype", "bfloat16"], "bfloat16"),
])  # fmt: skip
def test_fast_is_bfloat16_where_the_processor_has_it(corpus, tmp_path, monkeypatch, has_it, flags, wanted):
    AutoModel.from_config(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path / "backbone")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", Mock(return_value=has_it))
    out, flags = tmp_path / "run", ["--exits", 1, "--epochs", 1, "--device", "cpu", *flags]
    fit(corpus, out, "--backbone", tmp_path / "backbone", *flags)
    train.main(["--resume", "--out", str(out)])
    assert json.loads((out / "results.json").read_text())["args"]["dtype"] == wanted


def test_presets():
    assert train.parse_args([]).preset == train.parse_args(["--backbone", "small"]).preset == "toy"
    assert train.parse_args(["--backbone", "facebook/wav2vec2-base"]).preset == "fast"
    recipe = dict(backbone="facebook/wav2vec2-base", lr=3e-5, head_lr=3e-5, batch_size=16, epochs=20, window="tile",
                  seconds=5.984, head="gru", kl_weight=1, hint_weight=1, temperature=1, weight_decay=0, warmup=None,
                  distill_warmup=0, dtype="float32", fold=[1, 5])  # fmt: skip
    assert recipe.items() <= vars(train.parse_args(["--preset", "paper"])).items()
    assert train.parse_args(["--preset", "paper", "--lr", "1e-4"]).head_lr == 1e-4  # as --lr, unless told
    assert train.parse_args(["--backbone", "x/y", "--lr", "0.5"]).head_lr == 1e-3


def test_label_fraction_is_stratified_nested_and_of_training_clips_alone():
    clips = []
    for split in train.SPLITS:
        for label, n in (("a", 40), ("b", 10), ("c", 3)):
            clips += [train.Clip(f"{label}{split}{i}", label, None, split) for i in range(n)]

    def count(some):
        return [sum(clip.label == label and clip.split == "train" for clip in some) for label in "abc"]

    tenth, quarter = train.take_fraction(clips, 0.1, seed=0), train.take_fraction(clips, 0.25, seed=0)
    assert count(tenth) == [4, 1, 1] and count(quarter) == [10, 2, 1] and set(tenth) < set(quarter)
    assert [clip for clip in tenth if clip.split != "train"] == [clip for clip in clips if clip.split != "train"]
    assert tenth != train.take_fraction(clips, 0.1, seed=1)
    assert train.take_fraction(clips, 1.0, seed=0) == clips


# -- what is refused --------------------------------------------------------------------------------------------------
def test_unreadable_clips_stop_the_run_or_are_left_out(corpus, tmp_path, capsys, wav):
    (tmp_path / "text.wav").write_bytes(b"no audio")
    wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT")  # its header is sound
    bad = ["gone.wav", "text.wav", "nan.wav"]
    manifest = with_splits(corpus, tmp_path, *(f"{name},anger,s0,train" for name in bad))
    assert "gone.wav" in refused(capsys, "--data", manifest, "--out", tmp_path / "run")
    with pytest.warns(UserWarning) as warned:
        fit(manifest, tmp_path / "run", "--skip-bad", "--epochs", 1)
    for name in bad:
        assert sum(name in str(warning.message) for warning in warned) == 1
    assert len(read_split(tmp_path / "run")) == 36
    rows = [f"{split}-{label}.wav,{label},{split},{split}" for split in train.SPLITS for label in "ab"]
    manifest.write_text("\n".join(["path,label,speaker,split", *rows]))  # not one of them is there
    assert "6 of 6" in refused(capsys, "--data", manifest, "--out", tmp_path / "no", "--skip-bad")
    path = wav(np.random.default_rng(0).normal(0, 0.1, 61 * 16000), "long.wav")
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")  # too long to be scored
    assert str(path) in refused(capsys, "--data", manifest, "--out", tmp_path / "no")


def test_a_clip_that_fails_later_stops_the_run_with_its_name_and_resume_goes_on(corpus, tmp_path, capsys, wav):
    """A test clip, which is read after training, by a process that loads."""
    path, out = wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT"), tmp_path / "run"
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")
    flags = "--data", manifest, "--out", out, "--epochs", 1, "--workers", 1
    assert str(path) in refused(capsys, *flags) and (out / "train_state.pt").exists()
    wav(np.random.default_rng(0).uniform(-0.1, 0.1, 8000), "nan.wav")  # repaired
    train.main(["--resume", "--out", str(out)])
    assert json.loads((out / "results.json").read_text())["test"]["exits"]


def test_a_loss_that_is_not_finite_names_its_files_and_keeps_the_last_checkpoint(corpus, tmp_path, capsys):
    epoch = train.train_epoch

    def spoilt(model, *args):
        if args[-1].startswith("epoch 2"):
            model.heads["4"].classifier.bias.data[0] = torch.inf
        return epoch(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", spoilt)
        assert str(corpus.parent) in refused(capsys, "--data", corpus, "--out", tmp_path, "--epochs", 3)
    sdser.MultiExitSER.from_pretrained(tmp_path).classify(str(corpus.parent / "0-anger-0.wav"))
    train.main(["--resume", "--out", str(tmp_path)])
    assert len(read_log(tmp_path)) == 3


def test_a_gradient_or_answers_that_are_not_finite_are_never_saved(corpus, tmp_path, capsys, monkeypatch):
    """All clips in one step, so that only the gradient, and then only the dev split, can show what is wrong."""
    flags = ["--data", corpus, "--out", tmp_path / "run", "--seconds", 0.3, "--batch-size", 100]
    flags += ["--preset", "paper", "--backbone", "tiny"]
    forward = sdser.ExitHead.forward

    def overflow(self, *args):
        logits, embedding = forward(self, *args)
        return logits + (0 * logits).abs().sqrt(), embedding  # the root's slope at 0 is infinite

    with monkeypatch.context() as patch:  # the loss is finite, its gradient not
        patch.setattr(sdser.ExitHead, "forward", overflow)
        assert str(corpus.parent) in refused(capsys, *flags), "its clips are named"
    refused(capsys, *flags, "--lr", "1e30")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("wrong", [["--data", "nowhere"], ["--backbone", "huge"], ["--device", "toaster"]])
def test_as_a_command(corpus, tmp_path, wrong):
    """A sentence, status 2 and no traceback also where a process of its own runs; and nothing is written."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(corpus), "--out", "run", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and wrong[1] in done.stderr
    assert not list(tmp_path.glob("run/*"))
