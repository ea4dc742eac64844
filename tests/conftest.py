import json
import os
import warnings
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small a second thread costs more than it gains

import numpy as np
import pytest
import soundfile
import torch
from transformers import HubertConfig, Wav2Vec2Config, WavLMConfig

import evaluate
import sdser
import train

# Six layouts: three backbones, each with the norm of "base" models (GroupNorm, post-LN) and of "large" ones (pre-LN).
TINY = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
)  # fmt: skip
PRE_LN = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
NO_CHANCE = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, apply_spec_augment=False)
NO_CHANCE |= dict(feat_proj_dropout=0.0, final_dropout=0.0)
LAYOUTS = {}
for kind in (Wav2Vec2Config, HubertConfig, WavLMConfig):
    LAYOUTS |= {f"{kind.model_type}-base": kind(**TINY), f"{kind.model_type}-large": kind(**TINY, **PRE_LN)}
LABELS = ["anger", "joy", "sadness"]

problem = ""
try:
    import torchaudio  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:
    problem = f"torchaudio is absent, or does not load beside torch {torch.__version__} ({error})"
resamples = pytest.mark.skipif(bool(problem), reason=problem)  # for tests of files that are not at 16 kHz


def build(layout="wav2vec2-base", exits=(1, 2, 4), head="gru", tile_seconds=None, **changes) -> sdser.MultiExitSER:
    """A tiny model of a layout, in evaluation mode; its random weights depend on torch's seed."""
    config = LAYOUTS[layout].to_dict() | {"do_normalize": True} | changes
    return sdser.MultiExitSER(LABELS, config, list(exits), head, tile_seconds).eval()


def macs_by_hand(samples, layers, head, gated=False) -> tuple[int, int]:
    """Multiply-accumulates of a model of `build` for one clip, and its head's share; gated: with a position bias."""
    d, t, inner, macs = 32, samples, 64, 0  # width, frames, width within a layer
    for i, (kernel, stride) in enumerate([(10, 5), *[(3, 2)] * 4, (2, 2), (2, 2)]):
        t = (t - kernel) // stride + 1
        macs += t * 16 * kernel * (16 if i else 1)
    layer = 4 * d * d + 2 * d * inner + 2 * t * d + 8 * d * gated
    macs += t * (16 * d + 16 * d * d // 4 + layers * layer)  # projection, position convolution, layers
    in_head = t * {"gru": 6 * d * d, "lstm": 8 * d * d, "attention": 2 * d, "mean": 0}[head] + 256 * (d + 3)
    return macs + in_head, in_head


def write(path, text="", encoding="utf-8") -> Path:
    """Writes a file, and the folders that it needs; returns its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))
    return Path(path)


def command(corpus, out, *flags) -> list[str]:
    """Flags of train.py: by default a short run with the smallest backbone."""
    flags = ["--data", corpus, "--backbone", "tiny", "--epochs", 2, "--batch-size", 4, "--out", out, *flags]
    return list(map(str, flags))


def fit(corpus, out, *flags) -> tuple[dict, list[dict]]:
    """Runs train.py; returns what it has written."""
    train.main(command(corpus, out, *flags))
    return read_run(out)


def speakers(clips) -> dict[str, set]:
    return {split: {clip.speaker for clip in clips if clip.split == split} for split in evaluate.SPLITS}


def uar(targets, logits) -> float:
    right = (logits.argmax(-1) == targets).double()
    return np.mean([right[targets == label].mean().item() for label in targets.unique()])


def lowest_threshold(targets, logits, tolerance) -> float:
    """From 1 down by 0.01, the last before early exit first loses more UAR than that: worked out clip by clip."""
    lowest = None
    for threshold in (step / 100 for step in range(100, -1, -1)):
        confident = (logits.softmax(-1).amax(-1) >= threshold).T.tolist()  # (N, exits)
        answers = [logits[clip.index(True) if any(clip) else -1, i] for i, clip in enumerate(confident)]
        if uar(targets, torch.stack(answers)) < uar(targets, logits[-1]) - tolerance:
            break
        lowest = threshold
    return lowest


def refuses(named, call, *args, **kwargs) -> None:
    """The call must raise an InputError, no other ValueError, in one sentence that matches `named`."""
    with pytest.raises(sdser.InputError, match=named) as refusal:
        call(*args, **kwargs)
    assert "\n" not in str(refusal.value)


def read_run(out) -> tuple[dict, list[dict]]:
    """What a training run has written: its results, and its log by epoch."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail), log  # Infinity, NaN: no JSON


def readable(path, read, *args) -> bool:
    """Whether the file could be read; fails unless the refusal is one sentence that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):
            read(*args, path)
    except (sdser.InputError, FileNotFoundError) as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        return False
    return True


@pytest.fixture
def refused(capsys):
    """Runs a script, which must end with status 2, and returns the last line of what it says."""

    def run(script, *flags) -> str:
        with pytest.raises(SystemExit) as end:
            script.main(list(map(str, flags)))
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """Each test has its seed and a folder for caches; nothing may ask the network."""
    torch.manual_seed(0)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def little_memory():
    """Two gigabytes beyond what is in use, by Linux's means; no damaged file of a second may need as much."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


layout = pytest.fixture(params=LAYOUTS)(lambda request: request.param)


@pytest.fixture
def more_speech():
    """Finds a folder of speech that does not come with the project, by its name; skips the test where it is absent."""

    def find(name) -> Path:
        folder = Path(os.environ.get("SDSER_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"), name)
        if not folder.is_dir():
            pytest.skip(f"no {folder}; SDSER_TEST_DATA names the folder that holds it")
        return folder

    return find


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A manifest of 36 short pieces of real speech: 6 speakers, 2 emotions, 3 clips each."""
    folder, clips = tmp_path_factory.mktemp("corpus"), evaluate.load_corpus(evaluate.DATA / "emodb")
    rows, speakers = ["path,label,speaker"], sorted({clip.speaker for clip in clips})[:6]
    for (i, speaker), label in product(enumerate(speakers), ("anger", "sadness")):
        found = [clip.path for clip in clips if (clip.speaker, clip.label) == (speaker, label)][:3]
        for n, path in enumerate(found):
            waveform = sdser.load_audio(path)[4000 : 10_000 + 1000 * n]
            name = f"{i}-{label}-{n}.wav"
            soundfile.write(folder / name, waveform.numpy(), 16_000)
            rows.append(f"{name},{label},s{i}")
    return write(folder / "all.csv", "\n".join(rows))


@pytest.fixture
def wav(tmp_path):
    """Writes a file of samples, 16 kHz unless told otherwise, and returns its path."""

    def write(samples, name="clip.wav", rate=16000, **kwargs):
        path = tmp_path / name
        soundfile.write(path, samples, rate, **kwargs)
        return path

    return write
