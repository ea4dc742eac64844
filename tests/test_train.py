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

import evaluate
import sdser
import train

ROOT = Path(__file__).parents[1]


def fit(corpus, out, *flags):
    train.main(["--data", str(corpus), "--epochs", "2", "--batch-size", "4", "--out", str(out), *map(str, flags)])
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON


def arguments(*flags):
    return train.complete_args(train.parse_args(list(flags)))[0]


def refused(capsys, *flags) -> str:
    """Runs the script, which must end with status 2, and returns its one sentence."""
    with pytest.raises(SystemExit) as end:
        train.main(list(map(str, flags)))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error
    return error.partition("error: ")[2]


# -- a run ------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(corpus, tmp_path, capsys):
    results = fit(corpus, tmp_path / "run", "--distill-warmup", 0)
    printed = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {"config.json", "model.safetensors", "train_state.pt", "split.csv", "log.jsonl", "results.json"}
    assert files - {"README.md"} == wanted

    assert results["labels"] == ["anger", "sadness"] and results["seconds"] > 0
    assert results["args"]["preset"] == "toy" and results["args"]["lr"] == arguments().lr
    for split in ("dev", "test"):
        assert [row["exit"] for row in results[split]["exits"]] == [1, 2, 4]
        for row in [*results[split]["exits"], results[split]["fusion"]]:
            assert all(0 <= row[name] <= 1 for name in ("uar", "accuracy", "macro_f1"))

    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
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

    assert "epoch 1/2" in printed and "epoch 2/2" in printed
    for name in ("teacher", "fusion", "dev", "test", "UAR", "accuracy", str(tmp_path / "run")):
        assert name in printed
    [prediction] = sdser.MultiExitSER.from_pretrained(tmp_path / "run").classify([rows[0]["path"]])
    assert prediction.label in results["labels"]


def test_same_seed_same_scores(corpus, tmp_path):
    a, b, _ = (
        fit(corpus, tmp_path / name, "--seed", seed, "--seconds", 0.4) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (a["dev"], a["test"]) == (b["dev"], b["test"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    splits = [(tmp_path / name / "split.csv").read_text() for name in "abc"]
    assert splits[0] == splits[1] == splits[2]


def test_workers_change_nothing(corpus, tmp_path):
    flags = "--seconds", 0.4, "--epochs", 1
    a, b = fit(corpus, tmp_path / "a", *flags), fit(corpus, tmp_path / "b", *flags, "--workers", 2)
    assert (a["dev"], a["test"]) == (b["dev"], b["test"])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


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
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(
        f"interrupted: python train.py --resume --out {tmp_path / 'cut'} goes on after epoch 2\n"
    )
    assert not (tmp_path / "cut" / "results.json").exists()
    train.main(["--resume", "--out", str(tmp_path / "cut")])
    for file in ("model.safetensors", "split.csv"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    whole, cut = (torch.load(tmp_path / run / "train_state.pt", weights_only=True) for run in ("whole", "cut"))
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 3
    message = refused(capsys, "--resume", "--out", tmp_path / "cut", "--lr", 0.5)
    assert message.startswith("--lr 0.5: the run in")


def test_a_run_from_before_a_flag_was_there_resumes(corpus, tmp_path):
    fit(corpus, tmp_path, "--epochs", 1)
    state = torch.load(tmp_path / "train_state.pt", weights_only=True)
    del state["args"]["labels"], state["args"]["final"]
    torch.save(state, tmp_path / "train_state.pt")
    train.main(["--resume", "--out", str(tmp_path)])


def test_resume_on_changed_data_is_refused(corpus, tmp_path, capsys):
    rows = [f"{corpus.parent}/{row}" for row in corpus.read_text().splitlines()[1:]]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,label,speaker", *rows]))
    fit(manifest, tmp_path / "run", "--epochs", 1)
    manifest.write_text("\n".join(["path,label,speaker", *rows]).replace(",s0", ",t9"))
    assert "no longer those of the run" in refused(capsys, "--resume", "--out", tmp_path / "run")


def test_a_run_that_fails_early_leaves_the_earlier_one_whole(corpus, tmp_path, capsys):
    fit(corpus, tmp_path, "--epochs", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused(capsys, "--data", corpus, "--out", tmp_path, "--lr", "1e30", "--batch-size", 2, "--fold", "2/3")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_run_replaces_all_of_an_earlier_one(corpus, tmp_path, monkeypatch, capsys):
    fit(corpus, tmp_path, "--epochs", 3)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sdser.MultiExitSER, "save_pretrained", killed)
        fit(corpus, tmp_path, "--fold", "2/3")
    assert "no epoch was finished, so there is nothing to resume" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"split.csv", "README.md"}


def test_seeds_share_no_epoch(corpus, tmp_path, monkeypatch):
    orders = {}
    make_batches = train.make_batches

    def spy(seconds, size, rng):
        orders.setdefault(seed, []).append(batches := make_batches(seconds, size, rng))
        return batches

    monkeypatch.setattr(train, "make_batches", spy)
    for seed in (0, 1):
        fit(corpus, tmp_path, "--seed", seed)
    assert all(a != b for a in orders[0] for b in orders[1])


def test_test_clips_are_read_once_and_last(corpus, tmp_path, monkeypatch):
    read, load_audio = [], sdser.load_audio
    monkeypatch.setattr(
        sdser, "load_audio", lambda path, *a, **kw: read.append(str(path)) or load_audio(path, *a, **kw)
    )
    fit(corpus, tmp_path)
    tested = [row["path"] for row in csv.DictReader((tmp_path / "split.csv").open()) if row["split"] == "test"]
    assert sorted(read[-len(tested) :]) == sorted(tested)
    assert not set(tested) & set(read[: -len(tested)])


def test_labels_keep_their_clips_alone(corpus, tmp_path, capsys):
    rows = [f"{corpus.parent}/{row}" for row in corpus.read_text().splitlines()[1:]]
    grief = [row.replace(",anger", ",grief") for row in rows if "anger-0" in row]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker", *rows, *grief]).replace(",anger,s5", ",joy,s5"))
    results = fit(tmp_path / "list.csv", tmp_path / "run", "--epochs", 1, "--labels", "sadness", "grief")
    assert results["labels"] == ["grief", "sadness"] == sdser.MultiExitSER.from_pretrained(tmp_path / "run").labels
    split = list(csv.DictReader((tmp_path / "run" / "split.csv").open()))
    assert {row["label"] for row in split} == {"grief", "sadness"} and len(split) == 18 + 6
    flags = "--data", tmp_path / "list.csv", "--out", tmp_path / "run", "--labels"
    assert "--labels fury: " in (message := refused(capsys, *flags, "anger", "fury"))
    assert message.endswith("has anger, grief, joy, sadness")
    assert "at least two different ones" in refused(capsys, *flags, "anger", "anger")


def test_final_trains_on_dev_too_and_keeps_the_last_epoch(corpus, tmp_path, capsys):
    results = fit(corpus, tmp_path / "run", "--final", "--epochs", 3)
    printed = capsys.readouterr().out
    assert "last epoch, 3, kept" in printed and "dev UAR" not in printed and "      test" in printed
    assert "dev" not in results and [row["exit"] for row in results["test"]["exits"]] == [1, 2, 4]
    splits = {row["path"]: row["split"] for row in csv.DictReader((tmp_path / "run" / "split.csv").open())}
    usual = {clip.path: clip.split for clip in train.split_clips(train.load_corpus(corpus))}
    assert splits == {path: "train" if split == "dev" else split for path, split in usual.items()}
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    kept = sdser.MultiExitSER.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in state["model"].items())
    assert all("dev" not in line and line["loss"] > 0 for line in state["log"])
    train.main(["--resume", "--out", str(tmp_path / "run")])  # nothing is left to train
    assert "last epoch, 3, kept" in capsys.readouterr().out


def test_final_needs_no_dev_split(corpus, tmp_path, capsys):
    rows = [f"{corpus.parent}/{row},{'test' if row[0] in '45' else 'train'}" for row in corpus.read_text().split()[1:]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker,split", *rows]))
    flags = "--data", tmp_path / "list.csv", "--out", tmp_path / "run", "--epochs", 1
    assert "the dev split has no anger, sadness" in refused(capsys, *flags)
    assert "test" in fit(tmp_path / "list.csv", tmp_path / "run", "--epochs", 1, "--final")


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


def test_final_scores_of_a_bfloat16_run_are_those_of_evaluate(corpus, tmp_path):
    results = fit(corpus, tmp_path / "run", "--dtype", "bfloat16", "--seconds", 0.3)
    evaluate.main([str(tmp_path / "run"), "--json", str(tmp_path / "a.json")])
    scored = json.loads((tmp_path / "a.json").read_text())
    for row, expected in zip(train.score_rows(scored["test"]), train.score_rows(results["test"])):
        assert expected.items() <= (row if "exit" in expected else row | {"exit": None}).items()


# -- steps ------------------------------------------------------------------------------------------------------------


def weights_after_a_step(corpus, batch_size, accumulate):
    """Weights after one step on 8 clips without dropout or masks."""
    args = arguments("--batch-size", str(batch_size), "--accumulate", str(accumulate), "--lr", "0.1")
    args.device, args.max_norm = "cpu", 1.0
    clips = train.load_corpus(corpus)[:8]
    torch.manual_seed(0)
    config = LAYOUTS["wav2vec2-base"].to_dict() | dict(do_normalize=True, mask_time_prob=0.0)
    config |= dict.fromkeys([name for name in config if "dropout" in name], 0.0)
    model = sdser.MultiExitSER(["anger", "sadness"], config, [1, 4], "gru")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batches = [list(range(8))[i : i + batch_size] for i in range(0, 8, batch_size)]
    dataset = train.TrainingClips(clips, ["anger", "sadness"], args)
    losses, _ = train.train_epoch(model, batches, dataset, optimizer, scheduler, args, 1, "")
    return losses, model.state_dict()


def test_accumulation_equals_one_large_batch(corpus):
    losses, large = weights_after_a_step(corpus, 8, 1)
    for batch_size, accumulate in ((2, 4), (3, 3)):  # 3, 3 and 2 clips: uneven
        same_losses, small = weights_after_a_step(corpus, batch_size, accumulate)
        assert same_losses == pytest.approx(losses, rel=1e-4)
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, atol=1e-5, rtol=1e-4)
    _, separate = weights_after_a_step(corpus, 2, 1)
    assert not torch.allclose(separate["heads.4.classifier.weight"], large["heads.4.classifier.weight"], atol=1e-4)


def test_batches_hold_clips_of_similar_length_in_random_order():
    seconds = np.random.default_rng(0).uniform(1, 6, 200).tolist()
    batches = train.make_batches(seconds, 8, np.random.default_rng(1))
    assert sorted(i for batch in batches for i in batch) == list(range(200)) and max(map(len, batches)) == 8
    spread = np.mean([np.ptp(np.array(seconds)[batch]) for batch in batches])
    assert spread < 1.5 < np.ptp(seconds)
    assert batches == train.make_batches(seconds, 8, np.random.default_rng(1))
    assert batches != train.make_batches(seconds, 8, np.random.default_rng(2))


def test_clips_of_one_length_are_shuffled_plainly():
    """As with `--window tile`: sorting would gain nothing, and mix batches less."""
    batches = train.make_batches([5.984] * 50, 8, np.random.default_rng(1))
    assert [i for batch in batches for i in batch] == np.random.default_rng(1).permutation(50).tolist()
    assert [len(batch) for batch in batches] == [8] * 6 + [2]


def test_tiled_clips_are_shuffled_plainly(corpus, tmp_path, monkeypatch):
    seen, make_batches = [], train.make_batches
    monkeypatch.setattr(train, "make_batches", lambda *args: seen.append(args[0]) or make_batches(*args))
    fit(corpus, tmp_path, "--window", "tile", "--seconds", 0.6, "--epochs", 1)
    assert set(seen[0]) == {0.6}, "though the files last from 0.375 to 0.5 s"


def test_learning_rate_warms_up_and_decays_or_stays():
    model = sdser.MultiExitSER(["a", "b"], "tiny")
    for preset, expected in (("fast", {0: 0.1, 9: 1.0, 54: 0.51, 99: 0.0}), ("paper", {0: 1.0, 99: 1.0})):
        args = arguments("--preset", preset)
        optimizer, scheduler = train.make_optimizer(model, args, steps=100)
        rates = []
        for _ in range(100):
            rates.append(scheduler.get_last_lr()[0] / args.lr)
            optimizer.step()
            scheduler.step()
        assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=0.02)


def test_frozen_encoder_stays_and_the_rest_learns(corpus, tmp_path):
    torch.manual_seed(0)
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path / "backbone")
    before = AutoModel.from_pretrained(tmp_path / "backbone").state_dict()
    fit(corpus, tmp_path / "run", "--backbone", tmp_path / "backbone", "--epochs", 1)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (
        results["args"]["preset"] == "fast" and results["args"]["freeze_cnn"] and results["args"]["dtype"] == "bfloat16"
    )
    after = sdser.MultiExitSER.from_pretrained(tmp_path / "run").backbone.state_dict()
    for name in before:
        unchanged = torch.equal(before[name], after[name])
        assert unchanged == name.startswith("feature_extractor"), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_from_a_local_folder(corpus, tmp_path, layout):
    AutoModel.from_config(LAYOUTS[layout]).save_pretrained(tmp_path / "backbone")
    results = fit(corpus, tmp_path / "run", "--backbone", tmp_path / "backbone", "--exits", 1, 3, "--epochs", 1)
    assert [row["exit"] for row in results["test"]["exits"]] == [1, 3]


def test_wav2vec2_base_shaped_checkpoint_takes_a_step(corpus, tmp_path):
    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(tmp_path / "wav2vec2-base")
    args = arguments("--backbone", str(tmp_path / "wav2vec2-base"))
    args.device = "cpu"
    model = sdser.MultiExitSER(["anger", "sadness"], args.backbone, args.exits, args.head)
    assert model.exits == [3, 8, 10, 12] and args.preset == "fast"
    optimizer, scheduler = train.make_optimizer(model, args, steps=10)
    dataset = train.TrainingClips(train.load_corpus(corpus)[:2], ["anger", "sadness"], args)
    before = model.backbone.encoder.layers[11].feed_forward.output_dense.weight.clone()
    losses, _ = train.train_epoch(model, [[0, 1]], dataset, optimizer, scheduler, args, 1, "")
    assert np.isfinite(losses["loss"])
    assert not torch.equal(before, model.backbone.encoder.layers[11].feed_forward.output_dense.weight)


@pytest.mark.parametrize("flags", [
    ["--preset", "paper"], ["--exits", 4], ["--exits", 2, "--head", "lstm"], ["--window", "tile", "--seconds", 0.3],
    ["--kl-weight", 0, "--hint-weight", 0], ["--no-detach-teacher", "--temperature", 2], ["--dtype", "bfloat16"],
    ["--accumulate", 3, "--label-fraction", 0.2], ["--fold", "2/3"], ["--head", "mean", "gru", "attention"],
])  # fmt: skip
def test_flags_of_the_comparisons(corpus, tmp_path, flags):
    tiny = ["--backbone", "tiny"] if "paper" in flags else []
    results = fit(corpus, tmp_path, *flags, *tiny, "--epochs", 1)
    model = sdser.MultiExitSER.from_pretrained(tmp_path)
    assert len(model.exits) == len(results["test"]["exits"])
    if flags[:2] == ["--head", "mean"]:
        assert model.head_kinds == ["mean", "gru", "attention"]
    if "--exits" in flags:
        assert model.exits == [flags[1]] == [len(model.backbone.encoder.layers)]
        assert model.head_kinds == ["lstm" if "lstm" in flags else "attention"]
    if "tile" in flags or "paper" in flags:
        assert model.tile_seconds == (0.3 if "tile" in flags else 5.984)


def test_compiled_layers_train(corpus, tmp_path, monkeypatch):
    """Traced as for CUDA, with lengths that change; the code generator itself would take a minute on a CPU."""
    compile_layer, compiled = torch.nn.Module.compile, []

    def trace(layer, **kwargs):
        compiled.append(layer)
        compile_layer(layer, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    results = fit(corpus, tmp_path / "a", "--compile", "--exits", 1, 2, "--dtype", "bfloat16")
    assert len(compiled) == 2
    plain = fit(corpus, tmp_path / "b", "--exits", 1, 2, "--dtype", "bfloat16")
    assert results["test"].keys() == plain["test"].keys()
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    weights = [sdser.MultiExitSER.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
    assert weights[0].keys() == weights[1].keys()


def test_distillation_grows_from_nothing(corpus, tmp_path):
    ramp = lambda share, steps=10: [  # noqa: E731
        train.distillation_ramp(step, steps, arguments("--distill-warmup", str(share))) for step in range(4)
    ]
    assert ramp(0) == [1, 1, 1, 1] and ramp(0.2) == [0, 0.5, 1, 1] and ramp(1, 4) == [0, 0.25, 0.5, 0.75]
    flags = ["--epochs", 2, "--batch-size", 64, "--kl-weight", 1, "--hint-weight", 1]  # a step an epoch
    for share, silent in ((1, [True, False]), (0, [False, False])):
        fit(corpus, tmp_path / str(share), *flags, "--distill-warmup", share)
        log = [json.loads(line) for line in (tmp_path / str(share) / "log.jsonl").open()]
        assert [(line["kl"] == 0, line["hint"] == 0) for line in log] == [(s, s) for s in silent]


def test_presets():
    assert arguments().preset == arguments("--backbone", "small").preset == "toy"
    assert arguments("--backbone", "facebook/wav2vec2-base").preset == "fast"
    assert arguments("--preset", "paper").backbone == "facebook/wav2vec2-base"
    paper = arguments("--preset", "paper")
    recipe = dict(lr=3e-5, head_lr=3e-5, batch_size=16, epochs=20, window="tile", seconds=5.984, head="gru",
                  kl_weight=1, hint_weight=1, temperature=1, weight_decay=0, warmup=None, distill_warmup=0,
                  dtype="float32")  # fmt: skip
    assert recipe.items() <= vars(paper).items()
    assert round(paper.seconds * sdser.SAMPLE_RATE) == 95_744
    assert arguments("--preset", "paper", "--lr", "1e-4").lr == 1e-4
    assert arguments("--lr", "0.5").head_lr == 0.5
    assert arguments("--backbone", "x/y", "--lr", "0.5").head_lr == 1e-3


def test_label_fraction_is_stratified_nested_and_of_training_clips_alone():
    clips = [train.Clip(f"{split}{i}", label, None, split)
             for split in train.SPLITS for label, n in (("a", 40), ("b", 10), ("c", 3)) for i in range(n)]  # fmt: skip
    clips = [clip._replace(path=clip.label + clip.path) for clip in clips]
    count = lambda some: [sum(c.label == label and c.split == "train" for c in some) for label in "abc"]  # noqa: E731
    tenth, quarter = train.take_fraction(clips, 0.1, seed=0), train.take_fraction(clips, 0.25, seed=0)
    assert count(tenth) == [4, 1, 1] and count(quarter) == [10, 2, 1]
    assert set(tenth) < set(quarter)
    assert [c for c in tenth if c.split != "train"] == [c for c in clips if c.split != "train"]
    assert tenth != train.take_fraction(clips, 0.1, seed=1)
    assert train.take_fraction(clips, 1.0, seed=0) == clips


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exits", "2", "1"], "exits [2, 1]: they must increase, from 1 to the backbone's 4 layers at most"),
        (["--exits", "0"], "they must increase"),
        (["--exits", "5"], "4 layers at most"),
        (
            ["--head", "gru", "mean"],
            "head ['gru', 'mean']: give one of gru, lstm, attention, mean, or one for each of 3",
        ),
        (["--head", "conv"], "invalid choice: 'conv'"),
        (["--fold", "4/3"], "4/3 is not I/N"),
        (["--fold", "1/2"], "1/2 is not I/N"),
        (["--label-fraction", "0"], "0 is not a share above 0"),
        (["--temperature", "nan"], "nan is not a number above 0"),
        (["--batch-size", "0"], "0 is not a whole number above 0"),
        (["--backbone", "huge"], "huge: not a built-in size (tiny, small, base, large)"),
        (["--device", "toaster"], "--device toaster"),
        (["--workers", "-1"], "--workers: -1 is not a whole number"),
        (["--seed", "-5"], "--seed: -5 is not a whole number"),
        (["--seconds", "0.01"], "0.01 is not a length of at least one frame"),
        (["--seconds", "1e305"], "and at most 60 s"),
        (["--device", "meta"], "--device meta: cannot be used here"),
        (["--resume"], "so there is no run to resume"),
    ],
)
def test_wrong_flags(corpus, tmp_path, capsys, flags, message):
    assert message in refused(capsys, "--data", corpus, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_out_that_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert "cannot be made a folder" in refused(capsys, "--data", corpus, "--out", tmp_path / "run", "--epochs", 1)
    assert (tmp_path / "run").read_text() == "mine"


def test_unreadable_clips_stop_the_run_or_are_left_out(corpus, tmp_path, capsys):
    broken = {"cut.wav": lambda b: b[:5000], "empty.wav": lambda _: b"", "text.wav": lambda _: b"no audio"}
    rows = corpus.read_text().splitlines()
    rows = [rows[0], *(f"{corpus.parent}/{row}" for row in rows[1:])]
    source = (corpus.parent / "0-anger-0.wav").read_bytes()
    for name, change in broken.items():
        (tmp_path / name).write_bytes(change(source))
        rows.append(f"{name},anger,s0")
    rows.append("gone.wav,anger,s0")
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(rows))
    message = refused(capsys, "--data", manifest, "--out", tmp_path / "run")
    assert "cut.wav: cut short" in message and "(4 of 40 clips are bad; --skip-bad leaves them out)" in message
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="left out") as warned:
        fit(manifest, tmp_path / "run", "--skip-bad", "--epochs", 1)
    assert {name for name in (*broken, "gone.wav") if any(name in str(w.message) for w in warned)} == {
        *broken,
        "gone.wav",
    }
    assert len((tmp_path / "run" / "split.csv").read_text().splitlines()) == 37


def test_a_clip_found_bad_only_when_read(corpus, tmp_path, capsys, wav):
    path = wav(np.full(8000, np.nan, dtype=np.float32), subtype="FLOAT")
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s0,train")
    message = refused(capsys, "--data", manifest, "--out", tmp_path / "run")
    assert (
        message
        == f"{path}: holds NaN or infinite samples; write it anew from its source (--skip-bad leaves such clips out)"
    )
    with pytest.warns(UserWarning, match="NaN or infinite"):
        fit(manifest, tmp_path / "run", "--skip-bad", "--epochs", 1)


def with_splits(corpus, tmp_path, *more):
    """A manifest of the corpus with fixed splits, and more rows."""
    split = dict(zip("012345", ["train", "train", "train", "dev", "dev", "test"]))
    rows = [f"{corpus.parent}/{row},{split[row[0]]}" for row in corpus.read_text().splitlines()[1:]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,speaker,split", *rows, *more]))
    return tmp_path / "list.csv"


def test_a_bad_test_clip_costs_no_training(corpus, tmp_path, capsys, wav):
    path = wav(np.full(8000, np.nan, dtype=np.float32), subtype="FLOAT")
    manifest = with_splits(corpus, tmp_path, f"{path},anger,s5,test")
    assert "NaN or infinite" in refused(capsys, "--data", manifest, "--out", tmp_path / "run", "--epochs", 1)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        train.main(["--resume", "--skip-bad", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"]["exits"]


@pytest.mark.parametrize(
    ("unreadable", "message"),
    [
        (("3-anger", "4-anger"), "the dev split is left without a readable clip"),
        (("0", "1", "2"), "no training clip could be read"),
    ],
)
def test_a_split_without_readable_clips_of_a_label(corpus, tmp_path, capsys, monkeypatch, unreadable, message):
    load_audio = sdser.load_audio

    def broken(path, *args, **kwargs):
        if Path(path).name.startswith(unreadable):
            raise ValueError(f"{path}: broken")
        return load_audio(path, *args, **kwargs)

    monkeypatch.setattr(sdser, "load_audio", broken)
    manifest = with_splits(corpus, tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        assert message in refused(capsys, "--data", manifest, "--out", tmp_path / "run", "--skip-bad")
    assert not (tmp_path / "run" / "results.json").exists()


def test_long_clips_train_cropped_but_are_not_evaluated(corpus, tmp_path, capsys, wav):
    path = wav(np.random.default_rng(0).normal(0, 0.1, 61 * 16000))
    clips = [train.Clip(str(path), "anger", "s0", split) for split in ("train", "dev")]
    assert train.keep_readable(clips[:1], skip_bad=False) == (clips[:1], [61.0])
    with pytest.raises(ValueError, match=r"61\.0 s is longer than the limit of 60 s"):
        train.keep_readable(clips, skip_bad=False)
    dataset = train.TrainingClips(clips[:1], ["anger"], arguments("--seconds", "2"))
    first, _ = dataset[0]
    assert len(first) == 32_000
    dataset.epoch = 1
    assert not torch.equal(first, dataset[0][0])


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut", {"model": 1}, [1]])
def test_state_that_cannot_be_resumed(tmp_path, capsys, content):
    if isinstance(content, bytes):
        (tmp_path / "train_state.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "train_state.pt")
    message = refused(capsys, "--resume", "--out", tmp_path)
    assert message.startswith(f"{tmp_path}/train_state.pt: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_names_its_files_and_keeps_the_last_checkpoint(corpus, tmp_path, capsys, dtype):
    flags = "--data", corpus, "--out", tmp_path, "--epochs", 3, "--dtype", dtype
    epoch = train.train_epoch

    def spoilt(model, *args):
        if args[-1].startswith("epoch 2"):
            model.heads["4"].classifier.bias.data[0] = torch.inf
        return epoch(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", spoilt)
        message = refused(capsys, *flags)
    assert message.startswith("the loss became nan on ") and "smaller --lr" in message
    names = message.partition(" on ")[2].partition("; try")[0]
    assert "and 9 more" in names, "12 clips of a batch"
    assert all(Path(name).is_file() for name in names.partition(" and ")[0].split(", "))
    sdser.MultiExitSER.from_pretrained(tmp_path).classify([names.partition(",")[0]])
    train.main(["--resume", "--out", str(tmp_path)])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_gradient_or_answers_that_are_not_finite_are_never_saved(corpus, tmp_path, capsys, monkeypatch):
    flags = "--data", corpus, "--out", tmp_path / "run", "--preset", "paper", "--backbone", "tiny", "--seconds", 0.3
    with monkeypatch.context() as patch:  # the loss is finite, its gradient not
        patch.setattr(sdser.ExitHead, "forward", lambda self, *args, f=sdser.ExitHead.forward: overflow(f(self, *args)))
        assert "the gradient became nan on" in refused(capsys, *flags)
    # all in one step, so that only the dev split sees what it did
    message = refused(capsys, *flags, "--lr", "1e30", "--batch-size", 100)
    assert message == "the model's answers to the dev split are not finite; try a smaller --lr"
    assert not list((tmp_path / "run").iterdir())


def overflow(outputs):
    logits, embedding = outputs
    return logits + (0 * logits).abs().sqrt(), embedding  # the root's slope at 0 is infinite


# -- whose files they are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "results.json", "log.jsonl", "train_state.pt", "split.csv"])
def test_files_of_others_are_not_replaced(corpus, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"mine": 1}')
    assert f"holds a {name} that is not of a run" in refused(capsys, "--data", corpus, "--out", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mine": 1}']


def test_a_run_does_not_replace_its_backbone_nor_its_data(corpus, tmp_path, capsys):
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path / "backbone")
    before = (tmp_path / "backbone" / "config.json").read_text()
    flags = "--data", corpus, "--backbone", tmp_path / "backbone", "--out", tmp_path / "backbone"
    assert "holds a config.json that is not of a run" in refused(capsys, *flags)
    assert (tmp_path / "backbone" / "config.json").read_text() == before
    fit(corpus, tmp_path / "run", "--epochs", 1)
    split = tmp_path / "run" / "split.csv"
    before = split.read_text()
    assert "which is --data, would be replaced" in refused(capsys, "--data", split, "--out", tmp_path / "run")
    assert split.read_text() == before
    assert "an empty name of a folder was given" in refused(capsys, "--data", corpus, "--out", "")


def test_two_runs_in_one_folder_notice(corpus, tmp_path, monkeypatch, capsys):
    """The second one starts, and ends, while the first one trains its second epoch."""
    epoch = train.train_epoch

    def meanwhile(*args):
        if args[-1].startswith("epoch 2"):
            monkeypatch.setattr(train, "train_epoch", epoch)
            fit(corpus, tmp_path / "run", "--epochs", 1, "--seed", 7)
        return epoch(*args)

    monkeypatch.setattr(train, "train_epoch", meanwhile)
    assert "another run has written into it" in refused(
        capsys, "--data", corpus, "--out", tmp_path / "run", "--epochs", 3
    )


def test_as_a_command(tmp_path):
    """A sentence, status 2 and no traceback also where a process of its own runs."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", "nowhere", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: nowhere: no such folder or manifest; give one, or a corpus known by name (synthetic, ravdess, emodb)\n"
    )
