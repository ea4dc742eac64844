"""Whatever is read may be damaged or made to do harm: each file is used, or refused in a sentence that names it."""

import os
import re
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, LAYOUTS, build
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Model

import sdser
import train

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
MEMORY = 2 * 2**30  # bytes beyond what is in use; no damaged file of half a second may need as much


def readable(path, read, *args) -> bool:
    """Whether the file could be read; fails unless the refusal is one sentence that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):
            read(*args, path)
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        return False
    return True


def damaged(content: bytes, rng: np.random.Generator, head: int) -> bytes:
    """A few of the first `head` bytes changed; now and then also cut."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(min(head, len(changed)))] = rng.choice([0, 255, 127, 128, rng.integers(256)])
    return bytes(changed if rng.random() < 0.8 else changed[: rng.integers(len(changed))])


@pytest.fixture
def little_memory():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("memory is limited by Linux's means")
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_damaged_audio(wav, ending, little_memory):
    rng, path, read = np.random.default_rng(0), wav(TONE, f"clip.{ending}"), set()
    content = path.read_bytes()
    for _ in range(40):
        path.write_bytes(damaged(content, rng, 100))
        read.add(readable(path, sdser.load_audio))
    assert read == {True, False}


def save(kind, folder) -> tuple:
    """Saves a whole one; returns what reads it, the folder coming last."""
    if kind == "checkpoint":
        build(head="mean").save_pretrained(folder)
        return (sdser.MultiExitSER.from_pretrained,)
    Wav2Vec2Model(LAYOUTS["wav2vec2-base"]).save_pretrained(folder)
    return sdser.MultiExitSER, LABELS


@pytest.mark.parametrize("kind", ["checkpoint", "backbone"])
def test_damaged_checkpoints(tmp_path, kind, little_memory):
    """Files that are gone or cut, a weight less, and configs that ask for other shapes, terabytes, or nonsense."""
    read, config, weights = save(kind, tmp_path), tmp_path / "config.json", tmp_path / "model.safetensors"
    assert readable(tmp_path, *read)
    for path in (config, weights):
        content = path.read_bytes()
        for kept in (0, len(content) // 2, len(content) - 100):
            path.write_bytes(content[:kept])
            assert not readable(tmp_path, *read), (path, kept)
        path.unlink()
        assert not readable(tmp_path, *read), path
        path.write_bytes(content)
    tensors, text = load_file(weights), config.read_text()
    for key, value in (("intermediate_size", 48), ("intermediate_size", 10**9), ("model_type", '"bert"')):
        config.write_text(re.sub(rf'"{key}": [^,\n]*', f'"{key}": {value}', text))
        assert config.read_text() != text and not readable(tmp_path, *read), (key, value)
    config.write_text(text)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, weights, {"format": "pt"})
    assert not readable(tmp_path, *read)


class Bomb:
    """Makes a folder if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "train_state.pt"])
def test_nothing_is_unpickled(tmp_path, monkeypatch, name, zipped):
    """Wherever weights are read, a malicious pickle is refused and does not run."""
    monkeypatch.chdir(tmp_path)
    read = save("backbone" if name == "pytorch_model.bin" else "checkpoint", tmp_path)
    if name == "train_state.pt":
        read = (lambda out: train.run(train.parse_args(["--resume", "--out", str(out)])),)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": Bomb()}, name, _use_new_zipfile_serialization=zipped)
    assert not readable(tmp_path, *read) and not Path("exploded").exists()
    torch.load(name, weights_only=False)
    assert Path("exploded").exists()  # the bomb works
