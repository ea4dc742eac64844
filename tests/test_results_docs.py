"""Blocks of docs/results.md on made-up speech: the recipe that pre-trains, the probe, other losses, the count."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import resamples

import sdser
import train

DOC = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in re.split(r"\n##+ ", DOC)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder, for what the blocks read in `path/to` and write."""
    monkeypatch.chdir(tmp_path)


def run(section: str, changes: dict[str, str], **names) -> dict:
    """Runs a section's first block, made smaller; `names` hide what it would find."""
    code = re.search(r"^```python\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)[1]
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, section, "exec"), names)
    return names


def write_clip(path: str, label: str, pitch: float, rng) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, train.synthesize(train.PROSODY[label], pitch, 1.0, rng)[:12_000], 16_000)


SMALLER = {
    "STEPS, EVERY, BATCH, CLUSTERS = 8000, 500, 16, 100": "STEPS, EVERY, BATCH, CLUSTERS = 4, 2, 2, 5",
    "FRAMES = 149": "FRAMES = 20",
}


@resamples  # the recipe needs torchaudio, for MFCCs
def test_the_recipe_pretrains_a_backbone_and_resumes(capsys):
    rng = np.random.default_rng(0)
    folders = [f"LibriSpeech/test-clean/{n}/7/" for n in range(10)] + [f"WAVE__SPEAKER{n:04}__" for n in range(11)]
    for i, name in enumerate(folders):
        for n in range(2):
            write_clip(f"path/to/speech/{name}{n}.flac", "anger", 100 + 10 * i, rng)

    lines = []

    def stop(*line):  # killed just before the second save
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("A small pre-trained network", SMALLER, print=stop)
    assert sorted(path.name for path in Path("pretrained").iterdir()) == ["frames.npz", "state.pt"]
    resumed = run("A small pre-trained network", SMALLER)
    Path("pretrained/state.pt").unlink()
    unbroken = run("A small pre-trained network", SMALLER)
    for (name, a), (_, b) in zip(resumed["model"].named_parameters(), unbroken["model"].named_parameters()):
        torch.testing.assert_close(a, b, msg=name)
    steps = re.findall(
        r"^(\d) loss \d\.\d+, held out: accuracy 0\.\d+, commonest 0\.\d+$", capsys.readouterr().out, re.M
    )
    assert steps == ["4", "2", "4"]

    # Speakers 0 and 20 in order of their names are held out, 2 of 21; a clip has as many frames as the network makes.
    clips = [len(soundfile.read(path)[0]) for path in Path("path/to/speech").rglob("*.flac")]
    frames = (min(clips) - 400) // 320 + 1
    assert min(clips) == max(clips) and len(unbroken["targets"]) == 42 * frames
    assert unbroken["train_frames"] == 38 * frames and len(unbroken["samples"]) == 42 * frames * 320
    assert set(unbroken["targets"].tolist()) == set(range(5))

    model = sdser.MultiExitSER(["anger", "joy"], "pretrained")
    assert model.exits == [2, 4, 5, 6] and model.backbone.config.hidden_dropout == 0.1
    torch.manual_seed(0)  # as in the recipe
    fresh = transformers.HubertModel(transformers.HubertConfig(**sdser.SIZES["small"]))
    trained = model.backbone.encoder.layers[5].feed_forward.output_dense.weight
    torch.testing.assert_close(trained, unbroken["model"].encoder.layers[5].feed_forward.output_dense.weight)
    assert trained.shape == fresh.encoder.layers[5].feed_forward.output_dense.weight.shape
    assert not torch.equal(trained, fresh.encoder.layers[5].feed_forward.output_dense.weight)


def test_the_probe_compares_the_folder_with_random_weights():
    pytest.importorskip("matplotlib").use("agg")
    rng = np.random.default_rng(0)
    for speaker in range(5):
        for letter, label in zip("WFNT", train.PROSODY):
            write_clip(f"path/to/EMO-DB/{speaker + 10}a01{letter}a.wav", label, 100 + 20 * speaker, rng)
        for emotion in range(1, 9):
            name = f"03-01-{emotion:02}-01-01-01-{speaker + 1:02}.wav"
            write_clip(f"path/to/RAVDESS/{name}", "anger", 100 + 20 * emotion, rng)
    deaf = transformers.HubertModel(transformers.HubertConfig(**sdser.SIZES["small"]))
    torch.nn.init.zeros_(deaf.feature_projection.projection.weight)  # so all clips have the same features
    deaf.save_pretrained("pretrained")
    run("Is it pre-trained?", {"max_iter=200": "max_iter=20"})
    results = {name: np.array(rows) for name, rows in json.loads(Path("probe.json").read_text()).items()}
    for corpus, chance in (("EMO-DB", 1 / 4), ("RAVDESS", 1 / 8)):
        np.testing.assert_allclose(results[f"{corpus}, pre-trained"], np.full((5, 7), chance))
        assert results[f"{corpus}, random"].mean() > 1.2 * chance
    assert Path("probe.png").stat().st_size > 5000


def divergence(teacher: list[float], student: list[float]) -> float:
    """KL(softmax(teacher) ‖ softmax(student))."""
    p, q = (np.exp(z) / np.exp(z).sum() for z in (np.array(teacher), np.array(student)))
    return float((p * np.log(p / q)).sum())


def test_other_losses_are_what_they_say(corpus, monkeypatch):
    for module, name in ((sdser, "self_distillation_loss"), (train, "make_optimizer")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end, whatever the block does
    flags = ["--data", str(corpus), "--epochs", "1", "--batch-size", "4", "--distill-warmup", "0"]
    train.main([*flags, "--out", "ours"])
    blocks = {}
    for change in ("none", "projected"):
        monkeypatch.setattr(sys, "argv", ["remedies.py", change, *flags, "--out", change])
        blocks[change] = run("Other forms of the loss", {"torch.nn.Linear(192, 192)": "torch.nn.Linear(128, 128)"})
    ours, none, projected = (json.loads(Path(out, "log.jsonl").read_text()) for out in ("ours", "none", "projected"))
    for part in ("loss", "ce", "ce_students", "kl", "hint"):
        assert none[part] == pytest.approx(ours[part], rel=1e-5)
    assert projected["hint"] != pytest.approx(ours["hint"], rel=0.01)
    before, after = (blocks[change]["projections"] for change in ("none", "projected"))
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(before, after))  # they were trained

    first, second = [[0.0, 1.0], [2.0, 0.0]], [[1.0, 0.0], [2.0, 0.0]]  # the students' logits for two clips
    teacher, targets = [[-1.0, 2.0], [3.0, 0.0]], torch.tensor([0, 0])  # wrong about the first clip
    outputs = [
        sdser.ExitOutput(k, torch.tensor(z), torch.zeros(2, 128)) for k, z in enumerate((first, second, teacher))
    ]
    wanted = {
        "none": [divergence(teacher[i], z[i]) for z in (first, second) for i in (0, 1)],
        "right": [divergence(teacher[1], z[1]) for z in (first, second)],
        "averaged": [divergence(([0.0, 1.0], [7 / 3, 0.0])[i], z[i]) for z in (first, second) for i in (0, 1)],
    }
    for change, divergences in wanted.items():
        blocks["none"]["change"] = change
        total, parts = blocks["none"]["loss"](outputs, targets, 0.5, 0.0, 1.0, True)
        assert parts["kl"] == pytest.approx(sum(divergences) / 4, rel=1e-5)
        assert total.item() == pytest.approx(parts["ce"] + parts["ce_students"] + 0.5 * parts["kl"], rel=1e-5)


def test_exits_are_compared_as_counted_by_hand(corpus, monkeypatch, capsys):
    for n in "12":
        flags = ["--data", str(corpus), "--epochs", "1", "--batch-size", "4", "--fold", f"{n}/3"]
        train.main([*flags, "--out", f"run-{n}"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["exits.py", "run-?"])
    run("What the exits know", {})
    dev, test = re.split(r"^(?=run-)", capsys.readouterr().out, flags=re.M)[1:]
    assert dev.startswith("run-? dev: UAR") and test.startswith("run-? test: UAR")

    right, same, confidence = [], [], []  # on test
    for n in "12":
        model = sdser.MultiExitSER.from_pretrained(f"run-{n}").eval()
        for clip in train.load_corpus(f"run-{n}/split.csv"):
            if clip.split == "test":
                with torch.no_grad():
                    logits = [output.logits[0] for output in model(sdser.load_audio(clip.path)[None])]
                answers = [model.labels[z.argmax()] for z in logits]
                right.append([answer == clip.label for answer in answers])
                same.append(answers[0] == answers[-1])
                confidence.append(logits[-1].softmax(-1).max().item())
    right, count = np.array(right), len(right)
    assert count == 24
    numbers = [float(number) for number in re.findall(r"[-+]?0\.\d+", test)]
    uars, (difference, low, high), others = numbers[:3], numbers[3:6], numbers[6:]
    assert uars == pytest.approx(right.mean(0), abs=6e-4)  # as many clips of either label
    assert difference == pytest.approx(uars[2] - uars[0], abs=1.1e-3) and low <= difference <= high
    only_deepest, only_shallowest = right[:, 2] & ~right[:, 0], right[:, 0] & ~right[:, 2]
    expected = [same, only_deepest, only_shallowest, right[:, 2], confidence]
    assert others[:5] == pytest.approx([np.mean(values) for values in expected], abs=6e-4)
    assert abs(others[3] - others[4]) <= others[5] + 1e-3 <= 1
