"""Reading audio: what people really have, and what is refused."""

import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import build, resamples

import sdser
import train


def tone(rate=16_000):  # one second of 440 Hz
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)


FORMATS = {
    "wav": {}, "flac": {}, "aiff": {}, "mp3": {}, "ogg": dict(format="OGG", subtype="VORBIS"),
    "opus": dict(format="OGG", subtype="OPUS"),
}  # fmt: skip


@pytest.mark.parametrize("ending", FORMATS)
def test_formats(wav, ending, capfd):
    """Each is read whole, as libsndfile alone does, and refused once its end is cut off."""
    path = wav(tone(), f"clip.{ending}", **FORMATS[ending])
    assert train.look_at([train.Clip(str(path), "joy", None)])[0].seconds == 1.0
    waveform, content = sdser.load_audio(path), path.read_bytes()
    assert waveform.dtype == torch.float32 and waveform.shape == (16_000,)
    torch.testing.assert_close(waveform, torch.from_numpy(soundfile.read(path, dtype="float32")[0]), atol=1e-6, rtol=0)
    assert capfd.readouterr().err == ""
    tolerance = 1e-4 if ending in ("wav", "flac", "aiff") else 0.15
    torch.testing.assert_close(waveform[999:-999], torch.tensor(tone()[999:-999]).float(), atol=tolerance, rtol=0)
    for kept in (0, 0.01, 0.3, 0.5, 0.9):
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(ValueError, match=str(path)):
            sdser.load_audio(path)


@resamples
@pytest.mark.parametrize(("rate", "tolerance"), [(8_000, 5e-3), (44_100, 5e-3), (192_000, 5e-3), (11_127, 0.2)])
def test_any_rate_becomes_16_khz(wav, rate, tolerance):
    """A filter for exactly 11,127 Hz would take gigabytes; 25 Hz next to it is as good."""
    waveform = sdser.load_audio(wav(tone(rate), rate=rate))
    assert abs(len(waveform) - 16_000) < (20 if rate == 11_127 else 1)
    middle = slice(4000, 8000)  # away from the filter's edges
    torch.testing.assert_close(waveform[middle], torch.from_numpy(tone()).float()[middle], atol=tolerance, rtol=0)


def test_only_resampling_needs_torchaudio(wav, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # importing it fails
    path = wav(tone(22_050), rate=22_050)
    with pytest.raises(ValueError, match=str(path)):
        sdser.load_audio(path)
    assert len(sdser.load_audio(wav(tone()))) == 16_000


def test_channels_are_averaged(wav):
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 8)).astype(np.float32)
    waveform = sdser.load_audio(wav(channels, subtype="FLOAT"))
    torch.testing.assert_close(waveform, torch.from_numpy(channels.mean(1)))


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_part_is_what_the_whole_holds_there(wav, ending):
    path = wav(np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32), f"clip.{ending}")
    whole = sdser.load_audio(path)
    for start in (0.0, 0.25, 0.5):
        assert torch.equal(sdser.load_audio(path, start, 0.5), whole[int(16_000 * start) :][:8000])
    assert torch.equal(sdser.load_audio(path, 0.0, 2.0), whole)


@pytest.mark.parametrize(("samples", "rate"), [
    (np.zeros(0), 16_000), (np.ones(399), 16_000), (np.full(8000, np.nan), 16_000),
    (np.r_[np.ones(8000), np.inf], 16_000), (tone(), 999), (tone(), 2_000_000_000),
])  # fmt: skip
def test_unusable_samples_and_rates_that_no_device_has_are_refused(wav, samples, rate):
    path = wav(samples.astype(np.float32), rate=rate, subtype="FLOAT")
    with pytest.raises(ValueError, match=str(path)):
        sdser.load_audio(path)


def test_silence_is_classified_with_a_warning(wav):
    path = wav(np.zeros(8000))
    with pytest.warns(UserWarning, match=str(path)):
        [prediction] = build().classify([path])
    assert 0 < prediction.confidence <= 1


@resamples
def test_original_recordings_match_their_16_khz_twins(real_speech):
    """48 kHz mono and stereo and 22.05 kHz files, beside FLACs made from them by another program."""
    originals = sorted((real_speech / "ravdess-original").rglob("*.wav"))
    assert len(originals) == 6
    for original in originals:
        ours = sdser.load_audio(original)
        twin = sdser.load_audio(real_speech / "ravdess" / original.parent.name / f"{original.stem}.flac")
        clip = train.Clip(str(original), "joy", None)
        assert train.look_at([clip], skip_bad=True) == train.look_at([clip]), "else crops would differ"
        size = min(len(ours), len(twin))
        assert abs(len(ours) - len(twin)) <= 2
        assert torch.corrcoef(torch.stack([ours[:size], twin[:size]]))[0, 1] > 0.98


@torch.no_grad()
def test_masking_is_exact_on_real_speech(real_speech):
    """Six clips of 1.4 to 9 s through the small model: batched equals alone."""
    clips = [sdser.load_audio(path) for path in sorted((real_speech / "emodb").rglob("*.flac"))[:60:10]]
    model = sdser.MultiExitSER(["a", "b"], "small").eval()
    waveforms = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=float("nan"))
    together = model(waveforms, torch.tensor([len(clip) for clip in clips]))
    for i, clip in enumerate(clips):
        for a, b in zip(together, model(clip[None])):
            torch.testing.assert_close(a.logits[i], b.logits[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(a.embedding[i], b.embedding[0], atol=1e-5, rtol=0)
