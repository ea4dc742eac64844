"""The recipe in docs/results.md that pre-trains a network, and the probe of what came of it, on made-up speech."""

import json
import re
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
