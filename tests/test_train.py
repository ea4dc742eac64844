"""The training script end to end on a small corpus, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, NO_CHANCE, command, fit, lowest_threshold, read_run, write
from torch.nn.utils import parameters_to_vector
from transformers import AutoModel

import evaluate
import sdser
import train
from evaluate import Clip

NAN = np.full(8000, np.nan, dtype=np.float32)  # in a file, its header is sound


def with_splits(corpus, tmp_path, *more):
    """A manifest of the corpus with fixed splits, and more rows."""
    split = dict(zip("012345", ["train", "train", "train", "dev", "dev", "test"]))
    rows = [f"{corpus.parent}/{row},{split[row[0]]}" for row in corpus.read_text().splitlines()[1:]]
    return write(tmp_path / "list.csv", "\n".join(["path,label,speaker,split", *rows, *more]))


# -- a run ------------------------------------------------------------------------------------------------------------
def test_files_of_a_run(corpus, tmp_path, monkeypatch):
    """In a thread, as behind a button of a web page. Test clips are scored once, at the end."""
    out, load_audio = tmp_path / "run", Mock(wraps=sdser.load_audio)
    monkeypatch.setattr(sdser, "load_audio", load_audio)
    with ThreadPoolExecutor(1) as pool:
        results, log = pool.submit(fit, corpus, out, "--epochs", 3, "--batch-size", 64).result()
    wanted = "README.md config.json log.jsonl model.safetensors results.json split.csv train_state.pt"
    assert sorted(os.listdir(out)) == wanted.split() and [line["epoch"] for line in log] == [1, 2, 3]
    assert results["labels"] == ["anger", "sadness"] and results["args"]["preset"] == "scratch"
    for line in log:  # distilled from the first epoch on
        assert line["loss"] == pytest.approx(line["ce"] + line["ce_students"] + line["kl"] + line["hint"], rel=1e-4)
    assert results["dev"] == log[-1]["dev"] != log[0]["dev"], "the last epoch is kept"
    clips = evaluate.split_clips(evaluate.load_corpus(corpus))
    assert clips == evaluate.load_corpus(out / "split.csv")
    scored, tested = ([clip.path for clip in clips if clip.split in splits] for splits in (("dev", "test"), ("test",)))
    read = [call.args[0] for call in load_audio.mock_calls]
    first, later, last = read[: len(scored)], read[len(scored) : -len(tested)], read[-len(tested) :]
    assert sorted(first) == sorted(scored)  # decodes what is scored, before training
    assert sorted(last) == sorted(tested) and not set(tested) & set(later)


def test_seeds_and_epochs_decide_on_batches_crops_and_weights_and_workers_do_not(corpus, tmp_path, monkeypatch):
    weights, train_epoch = [], Mock(wraps=train.train_epoch)
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    for name, flags in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        fit(corpus, tmp_path / name, "--seconds", 0.2, *flags)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert len({(tmp_path / name / "split.csv").read_text() for name in "abc"}) == 1
    crops = [call.args[1][2][0].tolist() for call in train_epoch.mock_calls]  # of the third clip
    assert all(len(crop) == 0.2 * 16000 for crop in crops)
    for seen in ([call.args[2] for call in train_epoch.mock_calls], crops):  # batches
        assert seen[:2] == seen[2:4] and len(set(map(str, seen))) == 4


def test_a_folder_that_holds_something_is_not_written_to(corpus, tmp_path, refused, monkeypatch):
    """Nor one into which another run has saved its first epoch meanwhile."""
    (tmp_path / "config.json").write_text("mine")
    assert str(tmp_path) in refused(train, "--out", tmp_path)
    assert "config.json" in refused(train, "--out", tmp_path / "config.json")
    assert "train_state.pt" in refused(train, "--resume", "--out", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    torch.save({"weights": torch.zeros(2)}, tmp_path / "train_state.pt")  # of something else
    assert "train_state.pt" in refused(train, "--resume", "--out", tmp_path)
    split = tmp_path / "run" / "split.csv"
    monkeypatch.setattr(train, "train_epoch", lambda *_: write(split, "theirs") and {"loss": 1.0})
    assert str(split.parent) in refused(train, *command(corpus, split.parent))
    assert split.read_text() == "theirs" and os.listdir(split.parent) == ["split.csv"]


def test_labels_keep_their_clips_alone_and_final_trains_on_dev_too_to_the_last_epoch(corpus, tmp_path, refused):
    manifest, out = with_splits(corpus, tmp_path), tmp_path / "run"
    write(manifest, manifest.read_text().replace("2.wav,anger", "2.wav,joy"))
    results, log = fit(manifest, out, "--labels", "sadness", "anger", "--final", "--epochs", 3)
    model, state = sdser.MultiExitSER.from_pretrained(out), torch.load(out / "train_state.pt", weights_only=True)
    assert results["labels"] == model.labels == ["anger", "sadness"]
    assert not any("dev" in line for line in [results, *log]), "there are no clips to choose a threshold by"
    assert [row["exit"] for row in results["test"]["exits"]] == [1, 2, 4] and model.threshold is None
    usual = [clip for clip in evaluate.load_corpus(manifest) if clip.label != "joy"]
    expected = [clip._replace(split="test" if clip.split == "test" else "train") for clip in usual]
    assert evaluate.load_corpus(out / "split.csv") == expected and len(expected) == 30
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    model.truncate(1).save_pretrained(out)  # over the run
    assert "train_state.pt" in refused(train, "--resume", "--out", out)


def test_scoring_gives_files_what_each_gets_alone_and_holds_no_more_at_once_than_training(wav, monkeypatch):
    """Real speech of 1.4 to 9 s, and the shortest of clips. Long clips come in smaller batches."""
    model, shortest = sdser.MultiExitSER(["a", "b"], "small").eval(), wav(0.1 * torch.randn(401).numpy())
    paths = [*sorted((evaluate.DATA / "emodb").glob("*.ogg"))[:60:10], shortest]
    clips = evaluate.inspect_clips([Clip(str(path), "a", None) for path in paths])
    for clip, answers in zip(clips, evaluate.predict(model, clips, batch_size=2).unbind(1), strict=True):
        waveform = sdser.load_audio(clip.path)
        assert clip.seconds == len(waveform) / 16000
        for row, output in zip(answers, model(waveform[None])):
            torch.testing.assert_close(row, output.logits[0], atol=1e-5, rtol=0)
    evaluate.predict(model, [clips[0]._replace(seconds=100.0)])  # more than a batch may hold: it gets one of its own
    monkeypatch.setattr(evaluate, "load_batches", batches := Mock(return_value=[]))
    clips = [Clip(str(i), "a", None, "test", seconds) for i, seconds in enumerate([7.0, 1.0, 10.0, 1.5] * 10)]
    for model.tile_seconds, most in ((None, 16), (4.0, 6)):
        evaluate.predict(model, clips)
        seen = batches.call_args.args[1]
        assert sorted(i for batch in seen for i in batch) == list(range(40)) and max(map(len, seen)) == most
        longest = [model.tile_seconds or max(clips[i].seconds for i in batch) for batch in seen]
        assert all(len(batch) * seconds <= evaluate.BATCH_SECONDS for batch, seconds in zip(seen, longest))


def test_a_corpus_that_has_moved_is_found_by_its_new_paths(corpus, tmp_path, refused):
    """As docs/corpora.md says, to which the sentence of the error points."""
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(corpus.parent, old)
    results, _ = fit(old / "all.csv", out, "--epochs", 1)
    (out / "results.json").unlink()
    old.rename(new)
    sentence = refused(train, "--resume", "--out", out)
    assert f"{old}/0-anger-0.wav" in sentence and "docs/corpora.md" in sentence
    write(out / "split.csv", (out / "split.csv").read_text().replace(str(old), str(new)))
    for flag in (f"--data={new}/all.csv", "--lr=1"):  # the run's own count
        assert flag.partition("=")[0] in refused(train, "--resume", "--out", out, flag)
    train.main(["--resume", "--out", str(out)])
    assert read_run(out)[0]["test"] == results["test"]


def test_the_last_epochs_threshold_is_chosen_on_dev_and_stays_with_it(corpus, tmp_path, monkeypatch):
    """In a run that is stopped in its third epoch, and then goes on with two; all logits are made up."""
    losses = [{"loss": 1.0}] * 2
    monkeypatch.setattr(train, "train_epoch", Mock(side_effect=[*losses, KeyboardInterrupt, *losses]))
    dev = [clip for clip in evaluate.split_clips(evaluate.load_corpus(corpus)) if clip.split == "dev"]
    made_up = torch.randn(4, 3, len(dev), 2, generator=torch.Generator().manual_seed(36))
    on_dev, on_test = iter(made_up), torch.zeros(3, 12, 2)  # on dev once an epoch
    monkeypatch.setattr(evaluate, "predict", lambda _, clips, *__: on_test if len(clips) == 12 else next(on_dev))
    with pytest.raises(SystemExit):
        fit(corpus, tmp_path, "--epochs", 4)
    expected = [lowest_threshold(evaluate.targets_of(dev, ["anger", "sadness"]), each, 0.01) for each in made_up]
    assert expected.count(expected[3]) == 1 and expected[1] != 1, "the test must see thresholds differ"
    assert sdser.MultiExitSER.from_pretrained(tmp_path).threshold == expected[1]
    train.main(["--resume", "--out", str(tmp_path)])
    assert sdser.MultiExitSER.from_pretrained(tmp_path).threshold == expected[3]


def test_a_manifests_other_columns_stay_with_the_clip_and_may_be_the_truth(corpus, tmp_path, monkeypatch):
    """Votes for each label instead of one: `target_of` alone says so. Scores are those by the label with the most."""
    votes = {"anger": {"angry": "2", "sad": "1"}, "sadness": {"angry": "0", "sad": "3"}}
    rows = ["path,label,speaker,angry,sad"]
    for row in corpus.read_text().splitlines()[1:]:
        rows.append(f"{corpus.parent}/{row},{','.join(votes[row.split(',')[1]].values())}")
    monkeypatch.setattr(sdser, "self_distillation_loss", loss := Mock(wraps=sdser.self_distillation_loss))
    monkeypatch.setattr(evaluate, "target_of", lambda clip, labels: [int(votes) / 3 for votes in clip.more.values()])
    monkeypatch.setattr(evaluate, "DRAWS", 50)
    fit(write(tmp_path / "votes.csv", "\n".join(rows)), tmp_path / "run", "--balanced")
    learned = torch.cat([call.args[1] for call in loss.mock_calls]).unique(dim=0)
    torch.testing.assert_close(learned, torch.tensor([[0, 1], [2 / 3, 1 / 3]]))
    assert all(clip.more == votes[clip.label] for clip in evaluate.load_corpus(tmp_path / "run" / "split.csv"))
    results, flags = [], [tmp_path / "run", "--tolerance", 0.05, "--against", tmp_path / "run"]
    for target_of in (evaluate.target_of, lambda clip, labels: labels.index(clip.label)):
        monkeypatch.setattr(evaluate, "target_of", target_of)
        evaluate.main(list(map(str, [*flags, "--json", tmp_path / "a.json"])))
        results.append(json.loads((tmp_path / "a.json").read_text()))
    assert results[0] == results[1] and results[0]["rows"][0]["uar"] <= 1


# -- steps ------------------------------------------------------------------------------------------------------------
def step_of_an_epoch(corpus, batch_size, *flags):
    """Losses of an epoch of 8 clips without dropout or masks, and the step that the weights made in it."""
    args = train.parse_args(["--device", "cpu", "--preset", "scratch", *flags])
    args.workers, args.max_norm = 0, None  # a limit to the gradient would hide a wrong scale
    clips = evaluate.inspect_clips(evaluate.load_corpus(corpus)[:8])
    torch.manual_seed(0)
    model = sdser.MultiExitSER(["anger", "sadness"], {**LAYOUTS["wav2vec2-base"].to_dict(), **NO_CHANCE}, [1, 4])
    optimizer, start = torch.optim.SGD(model.parameters(), lr=0.01), parameters_to_vector(model.parameters()).detach()
    batches = [list(range(8))[i : i + batch_size] for i in range(0, 8, batch_size)]
    dataset = train.TrainingClips(clips, model.labels, args, epoch=1)
    losses = train.train_epoch(model, dataset, batches, optimizer, Mock(), args, "")
    return losses, parameters_to_vector(model.parameters()).detach() - start


def test_accumulation_equals_one_large_batch_and_balanced_weights_are_inverse_frequencies(corpus):
    """By the length of what differs, in proportion to the step, so whatever the loss and the learning rate."""
    losses, large = step_of_an_epoch(corpus, 8)
    for batch_size, accumulate in ((2, "4"), (3, "3")):  # 3, 3 and 2 clips: uneven
        same, small = step_of_an_epoch(corpus, batch_size, "--accumulate", accumulate)
        assert same["ce"] == pytest.approx(losses["ce"], rel=1e-4) and (small - large).norm() < 1e-3 * large.norm()
    assert (step_of_an_epoch(corpus, 2)[1] - large).norm() > 1e-2 * large.norm(), "steps of their own differ"
    dataset = evaluate.ClipDataset(evaluate.load_corpus(corpus)[:8], ["anger", "sadness"], None)  # 5 and 3 clips
    assert train.inverse_frequencies(dataset).tolist() == pytest.approx([8 / 2 / 5, 8 / 2 / 3])
    assert step_of_an_epoch(corpus, 8, "--balanced")[0]["ce"] != pytest.approx(losses["ce"], rel=1e-3)


def test_batches_hold_clips_of_similar_length_in_random_order():
    seconds = np.random.default_rng(0).uniform(1, 6, 200)
    clips = [Clip(str(i), "a", None, "train", length) for i, length in enumerate(seconds)]
    args = train.parse_args(["--batch-size", "8", "--seconds", "6"])
    batches = train.make_batches(clips, args, np.random.default_rng(1))
    assert sorted(i for batch in batches for i in batch) == list(range(200)) and max(map(len, batches)) == 8
    assert np.mean([np.ptp(seconds[batch]) for batch in batches]) < 1.5 < np.ptp(seconds)
    assert batches != train.make_batches(clips, args, np.random.default_rng(2))
    args.window = "tile"  # all of one length: sorting would gain nothing, and mix batches less
    tiled = train.make_batches(clips, args, np.random.default_rng(1))
    assert [i for batch in tiled for i in batch] == np.random.default_rng(1).permutation(200).tolist()


@pytest.mark.parametrize(("preset", "expected"), [("fast", {0: 0.1, 9: 1, 54: 0.51, 99: 0}), ("paper", {0: 1, 99: 1})])
def test_learning_rate_warms_up_and_decays_or_stays_and_what_was_frozen_stays_so(preset, expected):
    args, model = train.parse_args(["--preset", preset]), sdser.MultiExitSER(["a", "b"], "tiny")
    first, second, *_ = model.backbone.feature_extractor.parameters()
    first.requires_grad_(False)  # as peft does
    optimizer, scheduler = train.make_optimizer(model, args, steps=100)
    assert not first.requires_grad and second.requires_grad == (preset == "paper")
    for step in range(100):
        rates = np.divide(scheduler.get_last_lr(), [args.lr, args.head_lr])
        assert step not in expected or rates == pytest.approx(np.full(2, expected[step]), abs=0.02)
        optimizer.step(), scheduler.step()
    train.make_optimizer(model, train.parse_args(["--lr", "0", "--preset", "paper"]), 10)  # costs no gradients
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"heads"}


@pytest.mark.parametrize(("layout", "has_it", "flags", "dtype", "frozen"), [
    ("wav2vec2-base", True, [], "bfloat16", "backbone.feature_extractor"),
    ("hubert-large", False, [], "float32", "backbone.feature_extractor"),
    ("hubert-base", None, ["--lr", "0"], "float32", "backbone"),  # only the exits learn
    ("wavlm-base", False, ["--dtype", "bfloat16"], "bfloat16", "backbone.feature_extractor"),
])  # fmt: skip
def test_a_pre_trained_folder_trains_fast(corpus, tmp_path, monkeypatch, layout, has_it, flags, dtype, frozen):
    """With a frozen encoder, and in bfloat16 where the processor has it."""
    operators = {} if has_it is None else {"_is_mkldnn_bf16_supported": lambda: has_it}  # a Mac's torch has none
    monkeypatch.setattr(torch.ops, "mkldnn", type("operators", (), operators))
    backbone, out = tmp_path / "backbone", tmp_path / "run"
    AutoModel.from_config(LAYOUTS[layout]).save_pretrained(backbone)
    torch.manual_seed(0)  # as the run starts
    before = sdser.MultiExitSER(["anger", "sadness"], backbone, [1, 4], "stats").state_dict()
    fit(corpus, out, "--backbone", backbone, "--exits", 1, 4, "--epochs", 1, "--device", "cpu", *flags)
    for name, value in sdser.MultiExitSER.from_pretrained(out).state_dict().items():
        assert torch.equal(before[name], value) == name.startswith(frozen), name
    shutil.rmtree(backbone)  # a run does not need it any more
    train.main(["--resume", "--out", str(out), "--device", "cpu"])
    results = read_run(out)[0]
    assert results["args"].items() >= {"preset": "fast", "dtype": dtype}.items()
    assert "fusion" not in results["test"], "one student alone is not fused"


# -- flags ------------------------------------------------------------------------------------------------------------
RECIPE = dict(loss=(1.0, 1.0, 1.0, True), rates=[2e-3, 2e-3], decay=0.01, norm=1.0, bfloat16=False,
              heads=["attention", "attention", "mean"], tile=None)  # fmt: skip


@pytest.mark.parametrize(("flags", "changes"), [
    ("", {}),
    ("--preset paper --lr 1e-4 --seconds 0.3",
     dict(rates=[1e-4, 1e-4], decay=0.0, norm=np.inf, heads=["gru", "gru", "mean"], tile=0.3)),
    ("--exits 2 --head lstm --lr 1e-4 --head-lr 1e-2 --dtype bfloat16",
     dict(rates=[1e-4, 1e-2], bfloat16=True, heads=["lstm"])),
    ("--kl-weight 0.5 --hint-weight 2 --temperature 3 --no-detach-teacher --label-fraction 0.2 --head stats",
     dict(loss=(0.5, 2.0, 3.0, False), heads=["stats"] * 3)),
    ("--kl-weight 0 --hint-weight 0 --fold 2/3 --head mean gru attention --batch-size 2 --accumulate 3",
     dict(loss=(0.0, 0.0, 1.0, True), heads=["mean", "gru", "attention"])),
])  # fmt: skip
def test_every_flag_of_a_recipe_reaches_the_training(corpus, tmp_path, monkeypatch, flags, changes):
    """By what the loss (its weights, temperature and detachment), the optimizer, the clipping and the layers get."""
    autocast, run, enabled = [], sdser.MultiExitSER.forward, torch.is_autocast_enabled
    monkeypatch.setattr(sdser, "self_distillation_loss", loss := Mock(wraps=sdser.self_distillation_loss))
    monkeypatch.setattr(torch.optim, "AdamW", adamw := Mock(wraps=torch.optim.AdamW))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip := Mock(wraps=torch.nn.utils.clip_grad_norm_))
    monkeypatch.setattr(sdser.MultiExitSER, "forward", lambda *args: autocast.append(enabled("cpu")) or run(*args))
    results, log = fit(corpus, tmp_path, "--epochs", 1, "--batch-size", 64, *flags.split())
    model = sdser.MultiExitSER.from_pretrained(tmp_path)
    rates = [group["initial_lr"] for group in adamw.call_args.args[0]]
    assert RECIPE | changes == dict(
        loss=loss.call_args.args[2:6], rates=rates, decay=adamw.call_args.kwargs["weight_decay"],
        norm=clip.call_args.args[1], bfloat16=autocast[0], heads=model.head_kinds, tile=model.tile_seconds,
    )  # fmt: skip
    assert not autocast[-1], "the last scores are computed in float32"
    assert (log[-1]["lr"] == pytest.approx(0)) == ("--accumulate" in flags), "after two steps, not one, it is 0"
    assert [row["exit"] for row in results["test"]["exits"]] == model.exits
    assert len(model.heads) == len(model.exits) and len(model.backbone.encoder.layers) == model.exits[-1]
    assert (len(evaluate.load_corpus(tmp_path / "split.csv")) < 36) == ("--label-fraction" in flags)


def test_presets():
    presets = {"": "toy", "--data x": "toy", f"--backbone {evaluate.DATA}/hubert-small": "toy",
               "--backbone small": "scratch", "--backbone small --preset fast": "fast",
               "--backbone facebook/wav2vec2-base": "fast"}  # fmt: skip
    assert {flags: train.parse_args(flags.split()).preset for flags in presets} == presets
    toy = train.parse_args([])
    assert (toy.backbone, toy.data) == (str(evaluate.DATA / "hubert-small"), str(evaluate.DATA / "emodb"))
    assert (toy.exits, toy.dtype, toy.freeze_cnn) == ([1, 2, 6], "float32", True)
    recipe = dict(backbone="facebook/wav2vec2-base", lr=3e-5, head_lr=3e-5, batch_size=16, epochs=20, window="tile",
                  seconds=5.984, head="gru", kl_weight=1, hint_weight=1, temperature=1, weight_decay=0, max_norm=None,
                  schedule="constant", dtype="float32", fold=[1, 5])  # fmt: skip
    assert recipe.items() <= vars(train.parse_args(["--preset", "paper"])).items()


def test_label_fraction_is_stratified_nested_and_of_training_clips_alone():
    labels = "a" * 40 + "b" * 10 + "c" * 3
    clips = [Clip(f"{split}{i}", label, None, split) for split in evaluate.SPLITS for i, label in enumerate(labels)]
    tenth, quarter = train.take_fraction(clips, 0.1, seed=0), train.take_fraction(clips, 0.25, seed=0)
    for kept, counts in ((tenth, {"a": 4, "b": 1, "c": 1}), (quarter, {"a": 10, "b": 2, "c": 1})):
        assert Counter(clip.label for clip in kept if clip.split == "train") == counts
    assert {clip.path for clip in tenth} < {clip.path for clip in quarter}
    assert tenth != train.take_fraction(clips, 0.1, seed=1)
    assert [clip for clip in tenth if clip.split != "train"] == [clip for clip in clips if clip.split != "train"]
    assert train.take_fraction(clips, 1.0, seed=0) == clips


@pytest.mark.parametrize(("device", "workers"), [("cuda:1", 4), ("cpu", 0), ("cuda --workers 2", 2)])
def test_workers_load_for_a_gpu_unless_told_otherwise(monkeypatch, corpus, tmp_path, refused, device, workers):
    """Played: a device named cuda, on which the run ends as it starts to load."""
    monkeypatch.setattr(evaluate, "usable_device", lambda name: name)
    monkeypatch.setattr(train, "computes_in_bfloat16", lambda name: False)
    monkeypatch.setattr(train, "load_data", Mock(side_effect=sdser.InputError))
    refused(train, *command(corpus, tmp_path / "run", "--device", *device.split()))
    assert train.load_data.call_args.args[0].workers == workers


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "named"), [
    ("--label-fraction 3", "--label-fraction"), ("--fold 6/5", "--fold"), ("--exits 3 2", "--exits"),
    ("--temperature 0", "--temperature"), ("--lr -1", "--lr"), ("--head-lr 0", "--head-lr"),
    ("--labels anger fury", "--labels"), ("--labels anger anger", "--labels"),
    ("--data nowhere", "nowhere"), ("--backbone huge", "huge"), ("--device toaster", "toaster"),
    ("--lr 1e30 --batch-size 100", "not finite"),  # all clips in one step, so that only the dev split can show it
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(corpus, tmp_path, refused, flags, named):
    assert named in refused(train, *command(corpus, tmp_path / "run", *flags.split()))
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("MPS backend out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:125] . DefaultCPUAllocator: can't allocate memory: you tried"),
])  # fmt: skip
def test_too_little_memory_is_one_sentence_and_faults_in_the_code_show(corpus, tmp_path, refused, monkeypatch, error):
    monkeypatch.setattr(train, "train_epoch", Mock(side_effect=error))
    sentence = refused(train, *command(corpus, tmp_path))
    assert all(flag in sentence for flag in ("--batch-size", "--accumulate", "--seconds"))
    for fault in (RuntimeError("sizes differ"), KeyError("lr"), TypeError("None"), ValueError("too many to unpack")):
        train.train_epoch.side_effect = fault
        with pytest.raises(type(fault)) as shown:
            fit(corpus, tmp_path)
        assert shown.value is fault


def test_as_a_command(corpus, tmp_path):
    """Labels that a Western Windows console lacks stay readable, and each line comes at once, so before the error."""
    manifest = with_splits(corpus, tmp_path)
    write(manifest, manifest.read_text().replace(",sadness,", ",\u6124\u6012,"))
    script = [sys.executable, train.__file__, *command(manifest, tmp_path / "run", "--backbone", "huge")]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUNBUFFERED": ""}
    done = subprocess.run(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    first, _, _, _, error = done.stdout.splitlines()
    assert first.endswith("list.csv: anger 18, \\u6124\\u6012 18")
    assert error.startswith("error: huge: ") and done.returncode == 2


def test_unreadable_clips_stop_the_run_or_are_left_out(corpus, tmp_path, refused, wav):
    wav(NAN, "nan.wav", subtype="FLOAT"), write(tmp_path / "text.wav", "no audio")
    bad = ["gone.wav", "text.wav", "nan.wav"]
    manifest, out = with_splits(corpus, tmp_path, *(f"{name},anger,s0,train" for name in bad)), tmp_path / "run"
    assert "gone.wav" in refused(train, *command(manifest, out))
    with pytest.warns(UserWarning) as warned:
        fit(manifest, out, "--skip-bad", "--epochs", 1)
    for name in bad:
        assert sum(name in str(warning.message) for warning in warned) == 1
    assert len(evaluate.load_corpus(out / "split.csv")) == 36
    shutil.copy(corpus, manifest)  # not one of the clips lies beside it
    assert "36 of 36" in refused(train, *command(manifest, tmp_path / "no", "--skip-bad"))


@pytest.mark.parametrize(("speaker", "split", "samples"), [
    ("s0", "train", NAN), ("s4", "dev", NAN), ("s5", "test", NAN), ("s5", "test", np.zeros(61 * 16_000)),
])  # fmt: skip
def test_a_clip_that_cannot_be_read_stops_the_run(corpus, tmp_path, monkeypatch, refused, wav, speaker, split, samples):
    """Before the training if it is scored, else by a process that loads; repaired, the same command goes through."""
    monkeypatch.setattr(train, "train_epoch", Mock(wraps=train.train_epoch))
    path, out = wav(samples, "bad.wav", subtype="FLOAT"), tmp_path / "run"
    manifest = with_splits(corpus, tmp_path, f"{path},anger,{speaker},{split}")
    flags = command(manifest, out, "--epochs", 1, "--workers", 1)
    assert str(path) in refused(train, *flags)
    assert train.train_epoch.called == (split == "train") and not any(out.iterdir())
    if split == "train":
        wav(np.random.default_rng(0).uniform(-0.1, 0.1, 8000), "bad.wav")
        train.main(flags)
        assert read_run(out)[0]["test"]["exits"]


@pytest.mark.parametrize("spoil", [
    lambda bias: bias.data.fill_(torch.inf),  # and so the loss
    lambda bias: bias.register_hook(lambda gradient: gradient * torch.inf),
])  # fmt: skip
def test_what_is_not_finite_names_its_files_and_keeps_the_last_checkpoint(corpus, tmp_path, refused, spoil):
    """In the only step of the second epoch, so that no later step's loss shows what is wrong with a gradient."""
    epoch = train.train_epoch

    def spoilt(model, *args):
        if args[-1].startswith("epoch 2"):
            spoil(model.heads["4"].classifier.bias)
        return epoch(model, *args)

    flags = ["--preset", "paper", "--seconds", 0.5, "--epochs", 3, "--batch-size", 100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", spoilt)
        assert str(corpus.parent) in refused(train, *command(corpus, tmp_path, *flags))
    sdser.MultiExitSER.from_pretrained(tmp_path).classify(str(corpus.parent / "0-anger-0.wav"))
    train.main(["--resume", "--out", str(tmp_path)])
    assert len(read_run(tmp_path)[1]) == 3
