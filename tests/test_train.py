"""The training script end to end on a small corpus, and what it refuses."""

import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, NO_CHANCE, read_run
from transformers import AutoModel

import evaluate
import sdser
import train

ROOT = Path(__file__).parents[1]


def fit(corpus, out, *flags) -> tuple[dict, list[dict]]:
    train.main(["--data", str(corpus), "--epochs", "2", "--batch-size", "4", "--out", str(out), *map(str, flags)])
    return read_run(out)


def with_splits(corpus, tmp_path, *more):
    """A manifest of the corpus with fixed splits, and more rows."""
    split = dict(zip("012345", ["train", "train", "train", "dev", "dev", "test"]))
    rows = [f"{corpus.parent}/{row},{split[row[0]]}" for row in corpus.read_text().splitlines()[1:]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker,split", *rows, *more]))
    return tmp_path / "list.csv"


# -- a run ------------------------------------------------------------------------------------------------------------
def test_files_of_a_run(corpus, tmp_path, monkeypatch):
    """In a thread, as behind a button of a web page. Test clips are read once, after all others."""
    out, load_audio = tmp_path / "run", Mock(wraps=sdser.load_audio)
    monkeypatch.setattr(sdser, "load_audio", load_audio)
    thread = threading.Thread(target=fit, args=(corpus, out, "--distill-warmup", 0))
    thread.start()
    thread.join()
    results, log = read_run(out)
    wanted = {"config.json", "model.safetensors", "train_state.pt", "split.csv", "log.jsonl", "results.json"}
    assert {path.name for path in out.iterdir()} == {"README.md", *wanted}
    assert results["labels"] == ["anger", "sadness"] and results["args"]["preset"] == "toy"
    assert [line["epoch"] for line in log] == [1, 2]
    for line in log:
        assert line["loss"] == pytest.approx(line["ce"] + line["ce_students"] + line["kl"] + line["hint"], rel=1e-4)
        assert line["kl"] > 0 and line["hint"] > 0
    assert results["dev"] == max(log, key=lambda line: line["dev_uar"])["dev"], "the best epoch was saved"
    clips = train.load_corpus(out / "split.csv")
    assert clips == train.split_clips(train.load_corpus(corpus))
    read, tested = [call.args[0] for call in load_audio.mock_calls], [c.path for c in clips if c.split == "test"]
    assert sorted(read[-len(tested) :]) == sorted(tested) and not set(tested) & set(read[: -len(tested)])


def test_seeds_and_epochs_decide_on_batches_crops_and_weights(corpus, tmp_path, monkeypatch):
    """And the number of workers on nothing."""
    weights, train_epoch = [], Mock(wraps=train.train_epoch)
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    for name, flags in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        fit(corpus, tmp_path / name, "--seconds", 0.2, *flags)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert len({(tmp_path / name / "split.csv").read_text() for name in "abc"}) == 1
    batches = [call.args[2] for call in train_epoch.mock_calls]
    crops = [call.args[1][2][0].tolist() for call in train_epoch.mock_calls]  # of the third clip
    assert all(len(crop) == 0.2 * 16000 for crop in crops)
    for seen in (batches, crops):
        assert seen[:2] == seen[2:4] and all(a != b for a, b in combinations(seen[2:], 2))


def test_a_folder_that_holds_something_is_not_written_to(corpus, tmp_path, refused):
    (tmp_path / "config.json").write_text("mine")
    assert str(tmp_path) in refused(train, "--data", corpus, "--out", tmp_path)
    assert "config.json" in refused(train, "--data", corpus, "--out", tmp_path / "config.json")
    assert "train_state.pt" in refused(train, "--resume", "--out", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_labels_keep_their_clips_alone(corpus, tmp_path, refused):
    joy = [f"joy-{i}.wav,joy,s0,train" for i in range(3)]
    for row in joy:
        shutil.copy(corpus.parent / "0-anger-0.wav", tmp_path / row.partition(",")[0])
    manifest, out = with_splits(corpus, tmp_path, *joy), tmp_path / "run"
    results, _ = fit(manifest, out, "--epochs", 1, "--labels", "sadness", "anger")
    assert results["labels"] == sdser.MultiExitSER.from_pretrained(out).labels == ["anger", "sadness"]
    clips = train.load_corpus(out / "split.csv")
    assert len(clips) == 36 and {clip.label for clip in clips} == {"anger", "sadness"}
    for labels in (["anger", "fury"], ["anger", "anger"]):
        assert "--labels" in refused(train, "--data", manifest, "--out", tmp_path / "other", "--labels", *labels)


def test_final_trains_on_dev_too_and_keeps_the_last_epoch(corpus, tmp_path):
    results, log = fit(corpus, tmp_path, "--final", "--epochs", 3)
    assert "dev" not in results and [row["exit"] for row in results["test"]["exits"]] == [1, 2, 4]
    assert all("dev" not in line for line in log)
    usual = train.split_clips(train.load_corpus(corpus))
    for clip, own in zip(usual, train.load_corpus(tmp_path / "split.csv"), strict=True):
        assert own == clip._replace(split="test" if clip.split == "test" else "train")
    state = torch.load(tmp_path / "train_state.pt", weights_only=True)
    kept = sdser.MultiExitSER.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in state["model"].items())


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


def test_a_corpus_that_has_moved_is_found_by_its_new_paths(corpus, tmp_path, refused):
    """As the sentence of the error says, with sed."""
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(corpus.parent, old)
    results, _ = fit(old / "all.csv", out, "--epochs", 1)
    (out / "results.json").unlink()
    old.rename(new)
    sentence = refused(train, "--resume", "--out", out)
    assert f"{old}/0-anger-0.wav" in sentence and "--skip-bad" not in sentence
    command = re.search(r"sed -i .*split\.csv", sentence)[0].replace("OLD", str(old)).replace("NEW", str(new))
    subprocess.run(command, shell=True, check=True)
    for flag in (["--data", new / "all.csv"], ["--lr=1"]):  # the run's own count
        assert str(flag[0]).partition("=")[0] in refused(train, "--resume", "--out", out, *flag)
    train.main(["--resume", "--out", str(out)])
    assert read_run(out)[0]["test"] == results["test"]


def test_a_manifests_other_columns_stay_with_the_clip_and_may_be_the_truth(corpus, tmp_path, monkeypatch):
    """Votes for each label instead of one: `target_of` alone says so."""
    rows = corpus.read_text().splitlines()
    votes = {"anger": "2,1", "sadness": "0,3"}
    rows = ["path,label,speaker,angry,sad", *(f"{corpus.parent}/{row},{votes[row.split(',')[1]]}" for row in rows[1:])]
    (tmp_path / "votes.csv").write_text("\n".join(rows))
    seen, loss = [], sdser.self_distillation_loss

    def share_of_votes(clip, labels):
        votes = torch.tensor([float(clip.more["angry"]), float(clip.more["sad"])])
        return (votes / votes.sum()).tolist()

    def told(outputs, targets, *args):
        seen.append(targets)
        return loss(outputs, targets, *args)

    monkeypatch.setattr(train, "target_of", share_of_votes)
    monkeypatch.setattr(sdser, "self_distillation_loss", told)
    monkeypatch.setattr(sdser, "scores", lambda targets, logits: {"uar": -F.cross_entropy(logits, targets).item()})
    fit(tmp_path / "votes.csv", tmp_path / "run", "--epochs", 1)
    distinct = {tuple(row) for batch in seen for row in batch.tolist()}
    assert distinct == {(0.0, 1.0), tuple(torch.tensor([2 / 3, 1 / 3]).tolist())}
    assert {tuple(clip.more.items()) for clip in train.load_corpus(tmp_path / "run" / "split.csv")} == {
        (("angry", "2"), ("sad", "1")), (("angry", "0"), ("sad", "3"))
    }  # fmt: skip
    [scored] = [evaluate.load_and_score([str(tmp_path / "run")], "test", None, "cpu")]
    assert scored.targets.shape == (len(scored.clips), 2)


# -- steps ------------------------------------------------------------------------------------------------------------
def weights_after_an_epoch(corpus, batch_size, *flags):
    """Losses of an epoch of 8 clips without dropout or masks, and the weights after it."""
    args = train.parse_args(["--device", "cpu", *flags])
    args.max_norm = None  # it would hide a wrong scale
    clips = train.look_at(train.load_corpus(corpus)[:8])
    torch.manual_seed(0)
    config = {**LAYOUTS["wav2vec2-base"].to_dict(), **NO_CHANCE}
    model = sdser.MultiExitSER(["anger", "sadness"], config, [1, 4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batches = [list(range(8))[i : i + batch_size] for i in range(0, 8, batch_size)]
    dataset = train.ClipDataset(clips, model.labels, crop_seconds=args.seconds)
    losses = train.train_epoch(model, dataset, batches, optimizer, scheduler, args, 0, "")
    return losses, model.state_dict()


def test_accumulation_equals_one_large_batch(corpus):
    losses, large = weights_after_an_epoch(corpus, 8)
    for batch_size, accumulate in ((2, "4"), (3, "3")):  # 3, 3 and 2 clips: uneven
        same_losses, small = weights_after_an_epoch(corpus, batch_size, "--accumulate", accumulate)
        assert same_losses["ce"] == pytest.approx(losses["ce"], rel=1e-4)
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, atol=1e-5, rtol=1e-4)
    _, separate = weights_after_an_epoch(corpus, 2)
    assert not torch.allclose(separate["heads.4.classifier.weight"], large["heads.4.classifier.weight"], atol=1e-4)


def test_freezing_only_freezes():
    """What was frozen before, as peft does, stays so; a learning rate of 0 leaves the backbone without gradients."""
    model = sdser.MultiExitSER(["a", "b"], "tiny")
    convolutions = list(model.backbone.feature_extractor.parameters())
    convolutions[0].requires_grad_(False)
    train.make_optimizer(model, train.parse_args([]), 10)
    assert not convolutions[0].requires_grad and convolutions[1].requires_grad
    train.make_optimizer(model, train.parse_args(["--freeze-cnn"]), 10)
    assert not any(p.requires_grad for p in convolutions)
    assert all(p.requires_grad for p in model.backbone.encoder.parameters())
    train.make_optimizer(model, train.parse_args(["--lr", "0", "--head-lr", "1e-3"]), 10)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"heads"}


def test_a_learning_rate_of_0_trains_only_the_exits(corpus, tmp_path, refused):
    fit(corpus, tmp_path / "run", "--lr", 0, "--head-lr", 1e-2, "--epochs", 1)
    torch.manual_seed(0)
    start = sdser.MultiExitSER(["anger", "sadness"], "tiny", head="attention").state_dict()
    for name, value in sdser.MultiExitSER.from_pretrained(tmp_path / "run").state_dict().items():
        assert torch.equal(value, start[name]) == name.startswith("backbone"), name
    with pytest.raises(SystemExit):  # or nothing would train
        train.parse_args(["--lr", "0"])


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


@pytest.mark.parametrize(("layout", "has_it", "flags", "dtype"), [
    ("wav2vec2-base", True, [], "bfloat16"), ("hubert-large", False, [], "float32"),
    ("wavlm-base", False, ["--dtype", "bfloat16"], "bfloat16"),
])  # fmt: skip
def test_a_pre_trained_folder_trains_fast(corpus, tmp_path, monkeypatch, layout, has_it, flags, dtype):
    """With a frozen encoder, and in bfloat16 where the processor has it."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", Mock(return_value=has_it))
    backbone, out = tmp_path / "backbone", tmp_path / "run"
    AutoModel.from_config(LAYOUTS[layout]).save_pretrained(backbone)
    before = AutoModel.from_pretrained(backbone).state_dict()
    fit(corpus, out, "--backbone", backbone, "--exits", 1, 4, "--epochs", 1, "--device", "cpu", *flags)
    after = sdser.MultiExitSER.from_pretrained(out).backbone.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("feature_extractor"), name
    train.main(["--resume", "--out", str(out)])
    results, _ = read_run(out)
    assert (results["args"]["preset"], results["args"]["dtype"]) == ("fast", dtype)
    assert "fusion" not in results["test"], "one student alone is not fused"


@pytest.mark.parametrize(("flags", "heads", "tile_seconds"), [
    (["--preset", "paper", "--backbone", "tiny", "--seconds", 0.3], ["gru", "gru", "mean"], 0.3),
    (["--exits", 2, "--head", "lstm", "--kl-weight", 0, "--hint-weight", 0], ["lstm"], None),
    (["--fold", "2/3", "--head", "mean", "gru", "attention", "--accumulate", 3], ["mean", "gru", "attention"], None),
    (["--no-detach-teacher", "--dtype", "bfloat16", "--label-fraction", 0.2], ["attention", "attention", "mean"], None),
])  # fmt: skip
def test_flags_of_the_comparisons(corpus, tmp_path, flags, heads, tile_seconds):
    results, _ = fit(corpus, tmp_path, *flags, "--epochs", 1)
    model = sdser.MultiExitSER.from_pretrained(tmp_path)
    assert (model.head_kinds, model.tile_seconds) == (heads, tile_seconds)
    assert len(results["test"]["exits"]) == len(heads)
    assert (len(train.load_corpus(tmp_path / "split.csv")) < 36) == ("--label-fraction" in flags)
    assert len(model.backbone.encoder.layers) == model.exits[-1] == results["test"]["exits"][-1]["exit"]


def test_distillation_grows_from_nothing(corpus, tmp_path):
    _, [first, second] = fit(corpus, tmp_path, "--batch-size", 64, "--distill-warmup", 1)  # a step an epoch
    assert first["kl"] == first["hint"] == 0 < second["kl"]
    half = (second["kl"] + second["hint"]) / 2
    assert second["loss"] == pytest.approx(second["ce"] + second["ce_students"] + half, rel=1e-4)


def test_balanced_weights_are_inverse_frequencies(corpus):
    clips = train.load_corpus(corpus)[:8]  # 5 of anger, 3 of sadness
    weights = train.inverse_frequencies(train.ClipDataset(clips, ["anger", "sadness"]))
    assert weights.tolist() == pytest.approx([8 / 2 / 5, 8 / 2 / 3])
    plain, balanced = (weights_after_an_epoch(corpus, 8, *flags)[0]["ce"] for flags in ([], ["--balanced"]))
    assert plain != pytest.approx(balanced, rel=1e-3)


def test_presets():
    assert train.parse_args([]).preset == train.parse_args(["--backbone", "small"]).preset == "toy"
    assert train.parse_args(["--backbone", "facebook/wav2vec2-base"]).preset == "fast"
    recipe = dict(backbone="facebook/wav2vec2-base", lr=3e-5, head_lr=3e-5, batch_size=16, epochs=20, window="tile",
                  seconds=5.984, head="gru", kl_weight=1, hint_weight=1, temperature=1, weight_decay=0, warmup=None,
                  distill_warmup=0, dtype="float32", fold=[1, 5])  # fmt: skip
    assert recipe.items() <= vars(train.parse_args(["--preset", "paper"])).items()
    assert train.parse_args(["--preset", "paper", "--lr", "1e-4"]).head_lr == 1e-4  # as --lr, unless told


def test_label_fraction_is_stratified_nested_and_of_training_clips_alone():
    labels = "a" * 40 + "b" * 10 + "c" * 3
    clips = [train.Clip(f"{split}{i}", label, None, split) for split in train.SPLITS for i, label in enumerate(labels)]
    tenth, quarter = train.take_fraction(clips, 0.1, seed=0), train.take_fraction(clips, 0.25, seed=0)
    for kept, counts in ((tenth, {"a": 4, "b": 1, "c": 1}), (quarter, {"a": 10, "b": 2, "c": 1})):
        assert Counter(clip.label for clip in kept if clip.split == "train") == counts
    assert {clip.path for clip in tenth} < {clip.path for clip in quarter}
    assert tenth != train.take_fraction(clips, 0.1, seed=1)
    assert [clip for clip in tenth if clip.split != "train"] == [clip for clip in clips if clip.split != "train"]
    assert train.take_fraction(clips, 1.0, seed=0) == clips


# -- what is refused --------------------------------------------------------------------------------------------------
def test_unreadable_clips_stop_the_run_or_are_left_out(corpus, tmp_path, refused, wav):
    (tmp_path / "text.wav").write_bytes(b"no audio")
    wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT")  # its header is sound
    bad = ["gone.wav", "text.wav", "nan.wav"]
    manifest = with_splits(corpus, tmp_path, *(f"{name},anger,s0,train" for name in bad))
    assert "gone.wav" in refused(train, "--data", manifest, "--out", tmp_path / "run")
    with pytest.warns(UserWarning) as warned:
        fit(manifest, tmp_path / "run", "--skip-bad", "--epochs", 1)
    for name in bad:
        assert sum(name in str(warning.message) for warning in warned) == 1
    assert len(train.load_corpus(tmp_path / "run" / "split.csv")) == 36
    shutil.copy(corpus, manifest)  # not one of the clips lies beside it
    assert "36 of 36" in refused(train, "--data", manifest, "--out", tmp_path / "no", "--skip-bad")
    path = wav(np.random.default_rng(0).normal(0, 0.1, 61 * 16000), "long.wav")
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")  # too long to be scored
    assert str(path) in refused(train, "--data", manifest, "--out", tmp_path / "no")


def test_a_clip_that_fails_later_stops_the_run_with_its_name_and_resume_goes_on(corpus, tmp_path, refused, wav):
    """A test clip, which is read after training, by a process that loads."""
    path, out = wav(np.full(8000, np.nan, dtype=np.float32), "nan.wav", subtype="FLOAT"), tmp_path / "run"
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")
    flags = "--data", manifest, "--out", out, "--epochs", 1, "--workers", 1
    assert str(path) in refused(train, *flags) and (out / "train_state.pt").exists()
    wav(np.random.default_rng(0).uniform(-0.1, 0.1, 8000), "nan.wav")  # repaired
    train.main(["--resume", "--out", str(out)])
    assert read_run(out)[0]["test"]["exits"]


def spoil_loss(bias):
    bias.data[0] = torch.inf


def spoil_gradient(bias):
    bias.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_what_is_not_finite_names_its_files_and_keeps_the_last_checkpoint(corpus, tmp_path, refused, spoil):
    """In the only step of the second epoch, so that no later step's loss shows what is wrong with a gradient."""
    epoch = train.train_epoch

    def spoilt(model, *args):
        if args[-1].startswith("epoch 2"):
            spoil(model.heads["4"].classifier.bias)
        return epoch(model, *args)

    flags = ["--data", corpus, "--out", tmp_path, "--epochs", 3, "--batch-size", 100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", spoilt)
        assert str(corpus.parent) in refused(train, *flags, "--preset", "paper", "--backbone", "tiny")
    sdser.MultiExitSER.from_pretrained(tmp_path).classify(str(corpus.parent / "0-anger-0.wav"))
    train.main(["--resume", "--out", str(tmp_path)])
    assert len(read_run(tmp_path)[1]) == 3


def test_answers_that_are_not_finite_are_never_saved(corpus, tmp_path, refused):
    """All clips in one step, so that only the dev split can show it."""
    refused(train, "--data", corpus, "--out", tmp_path / "run", "--batch-size", 100, "--lr", "1e30")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("wrong", [["--data", "nowhere"], ["--backbone", "huge"], ["--device", "toaster"]])
def test_as_a_command(corpus, tmp_path, wrong):
    """A sentence, status 2 and no traceback also where a process of its own runs; and nothing is written."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(corpus), "--out", "run", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and wrong[1] in done.stderr
    assert not list(tmp_path.glob("run/*"))
