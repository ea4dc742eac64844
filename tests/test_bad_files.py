"""Whatever is read may be damaged or made to do harm: each file is used, or refused in a sentence that names it."""

import json
import os
import pickle
import resource
import shutil
import warnings
from pathlib import Path

import numpy as np
import processes
import pytest
import soundfile
import torch
from conftest import LABELS, LAYOUTS, build
from transformers import Wav2Vec2Model

import sdser
import train

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)


def outcome(path, read, *args) -> bool:
    """Whether the file could be read; fails unless the refusal is one sentence that starts with the file's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(*args)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), error
        return False
    return True


def damaged(content: bytes, rng: np.random.Generator, head: int) -> bytes:
    """Bytes flipped, mostly among the first `head`; now and then cut, doubled, or filled."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        where = rng.integers(min(head, len(changed)) if rng.random() < 0.8 else len(changed))
        changed[where] = rng.choice([0, 255, 127, 128, rng.integers(256)])
    cut = rng.integers(len(changed))
    ways = [changed] * 7 + [changed[:cut], changed[:cut] + changed, changed[:cut] + bytes(100)]
    return bytes(ways[rng.integers(len(ways))])


# -- audio ------------------------------------------------------------------------------------------------------------

MEMORY = 2 * 2**30  # bytes beyond what torch itself has mapped; no damaged file of half a second may need as much


def read_damaged_audio(folder, log) -> None:
    with processes.output_to(log):  # mp3's library prints
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
        rng, read = np.random.default_rng(0), []
        for source in sorted(folder.iterdir()):
            content, path = source.read_bytes(), folder / f"damaged{source.suffix}"
            for _ in range(60):
                path.write_bytes(damaged(content, rng, 100))
                read.append(outcome(path, sdser.load_audio, path))
        assert 0 < sum(read) < len(read)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by Linux's means")
def test_damaged_audio(tmp_path):
    (tmp_path / "audio").mkdir()
    for ending in ("wav", "flac", "ogg", "mp3", "aiff", "au", "caf"):
        soundfile.write(tmp_path / "audio" / f"tone.{ending}", TONE, 16_000)
    process = processes.start(read_damaged_audio, tmp_path / "audio", tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]


def test_a_wrong_ending_is_no_matter_and_rates_beyond_belief_are_refused(wav):
    path = wav(TONE, "clip.flac")
    assert len(sdser.load_audio(path.rename(path.with_suffix(".wav")))) == 8000
    path = wav(TONE, "long.flac")
    content = bytearray(path.read_bytes())
    content[22:26] = b"\xff\xff\xff\xff"  # declares 19 hours
    path.write_bytes(content)
    assert not outcome(path, sdser.load_audio, path)
    for rate in (999, 1_000_001, 2_000_000_000):  # resampling from 2 GHz would take gigabytes
        path = wav(TONE, rate=rate)
        assert not outcome(path, sdser.load_audio, path)


# -- manifests --------------------------------------------------------------------------------------------------------


def test_damaged_manifests(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.csv"
    text = 'path,label,speaker,split\r\n"a, b.wav",joy,S1,train\r\nsub/ü.wav,Sorge,S2,dev\r\n/a.wav,joy,S3,test\r\n'
    content, read = text.encode("utf-8-sig"), []
    for _ in range(300):
        path.write_bytes(damaged(content, rng, len(content)))
        read.append(outcome(path, train.load_corpus, path))
        if read[-1]:
            clips = train.load_corpus(path)
            assert all(clip.path and clip.label and clip.split in (None, *train.SPLITS) for clip in clips)
    assert 0 < sum(read) < len(read)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_damaged_checkpoints(tmp_path):
    """Bytes of config.json and of the weights' header changed: nothing but a refusal, or a model of those shapes."""
    rng, folder = np.random.default_rng(0), tmp_path / "out"
    build(head="mean").save_pretrained(folder)
    for name, head in (("config.json", 10**9), ("model.safetensors", 3000)):
        content = (folder / name).read_bytes()
        for _ in range(40):
            (folder / name).write_bytes(damaged(content, rng, head))
            outcome(folder, sdser.MultiExitSER.from_pretrained, folder)
        (folder / name).write_bytes(content)
    assert outcome(folder, sdser.MultiExitSER.from_pretrained, folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("hidden_size", 3_200_000),
        ("intermediate_size", 10**9),
        ("conv_dim", [10**6] * 7),
        ("vocab_size", 10**12),
    ],
)
def test_a_config_that_asks_for_terabytes(tmp_path, where, value):
    build(head="mean").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"][where] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert outcome(tmp_path, sdser.MultiExitSER.from_pretrained, tmp_path) == (where == "vocab_size")


# -- no code from data ------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder if it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/exploded",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
@pytest.mark.parametrize("where", ["model.safetensors", "pytorch_model.bin", "train_state.pt", "backbone"])
def test_nothing_is_unpickled(tmp_path, capsys, where, how):
    """In each place where a checkpoint is read, a malicious pickle is refused and does not run."""
    if where == "backbone":
        Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(tmp_path)
    else:
        build(head="mean").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / ("pytorch_model.bin" if where == "backbone" else where)
    if how == "torch":
        torch.save({"model": Bomb(tmp_path)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Bomb(tmp_path)}))
    if where == "backbone":
        assert not outcome(tmp_path, sdser.MultiExitSER, LABELS, str(tmp_path))
    elif where == "train_state.pt":
        with pytest.raises(SystemExit) as end:
            train.main(["--resume", "--out", str(tmp_path)])
        assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {path}: ")
    else:
        assert not outcome(tmp_path, sdser.MultiExitSER.from_pretrained, tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_harmless_pickled_backbone_is_read_as_data(tmp_path):
    backbone = Wav2Vec2Model(LAYOUTS["wav2vec2-base"])
    backbone.save_pretrained(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "gone")
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    model = sdser.MultiExitSER(LABELS, str(tmp_path))
    assert torch.equal(model.backbone.encoder.layer_norm.weight, backbone.encoder.layer_norm.weight)
