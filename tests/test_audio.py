"""Reading audio: what people really have, and what is refused."""

import builtins

import numpy as np
import pytest
import soundfile
import torch
from conftest import build, resamples

import sdser

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_formats(wav, ending):
    waveform = sdser.load_audio(wav(TONE, f"clip.{ending}"))
    assert waveform.dtype == torch.float32 and waveform.shape == (16_000,)
    if ending in ("wav", "flac", "aiff"):
        torch.testing.assert_close(waveform, torch.from_numpy(TONE).float(), atol=1e-4, rtol=0)


@resamples
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_any_rate_becomes_16_khz(wav, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    waveform = sdser.load_audio(wav(tone, rate=rate))
    assert len(waveform) == 16_000
    middle = slice(1000, -1000)  # away from the filter's edges
    torch.testing.assert_close(waveform[middle], torch.from_numpy(TONE).float()[middle], atol=5e-3, rtol=0)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_resampling_without_torchaudio_is_refused(wav, monkeypatch, error):
    """It is absent, or does not load beside another torch; files at 16 kHz do not need it."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torchaudio":
            raise error("no torchaudio here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    path = wav(TONE, rate=22_050)
    with pytest.raises(ValueError, match=rf"^{path}: .*torchaudio"):
        sdser.load_audio(path)
    assert len(sdser.load_audio(wav(TONE))) == 16_000


@resamples
def test_odd_rates_cost_no_more(wav):
    """A filter for exactly 11,127 Hz would take gigabytes; 25 Hz next to it is as good."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(11_127) / 11_127)
    waveform = sdser.load_audio(wav(tone, rate=11_127))
    torch.testing.assert_close(waveform[4000:8000], torch.from_numpy(TONE).float()[4000:8000], atol=0.2, rtol=0)
    assert abs(len(waveform) - 16_000) < 20


def test_channels_are_averaged(wav):
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 8)).astype(np.float32)
    waveform = sdser.load_audio(wav(channels, subtype="FLOAT"))
    torch.testing.assert_close(waveform, torch.from_numpy(channels.mean(1)))


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "aiff"])
@pytest.mark.parametrize("kept", [0, 1, 60, 0.5, -100])
def test_cut_files_are_refused(wav, ending, kept):
    path = wav(TONE, f"clip.{ending}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"^{path}: "):
        sdser.load_audio(path)


@pytest.mark.parametrize("samples", [np.zeros(0), np.ones(399), np.full(8000, np.nan), np.r_[np.ones(8000), np.inf]])
def test_unusable_samples_are_refused(wav, samples):
    path = wav(samples.astype(np.float32), subtype="FLOAT")
    with pytest.raises(ValueError, match=f"^{path}: "):
        sdser.load_audio(path)


def test_a_part_is_what_the_whole_holds_there(wav):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    for ending in ("wav", "flac"):
        path = wav(samples, f"clip.{ending}")
        whole = sdser.load_audio(path)
        for start in (0.0, 0.25, 0.5):
            part = sdser.load_audio(path, start, 0.5)
            assert torch.equal(part, whole[int(16_000 * start) :][:8000])
        assert torch.equal(sdser.load_audio(path, 0.0, 2.0), whole)


def test_clips_of_more_than_a_minute_are_refused(wav):
    path = wav(np.ones(8000 * 61, dtype=np.int16), rate=8000)
    with pytest.raises(ValueError, match=f"^{path}: "):
        build().classify([path])


def test_a_stream_of_unknown_length_is_not_cut(wav):
    path = wav(TONE)
    content = bytearray(path.read_bytes())
    for unknown in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):  # what programs write into a pipe
        content[40:44] = content[4:8] = unknown
        path.write_bytes(content)
        assert len(sdser.load_audio(path)) == 16_000


def test_what_is_no_audio_is_refused(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{path}: "):
            sdser.load_audio(path)
    (tmp_path / "text.wav").write_text("not audio at all " * 100)
    (tmp_path / "text.raw").write_text("headerless")
    (tmp_path / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    for name in ("text.wav", "text.raw", "phone.m4a"):
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: "):
            sdser.load_audio(tmp_path / name)


def test_silence_is_read_with_a_warning(wav):
    with pytest.warns(UserWarning, match="digital silence"):
        assert len(sdser.load_audio(wav(np.zeros(8000)))) == 8000


def test_tile_repeats_or_cuts():
    assert sdser.tile(torch.tensor([1.0, 2, 3]), 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert sdser.tile(torch.tensor([1.0, 2, 3]), 2).tolist() == [1, 2]


@resamples
def test_original_recordings_match_their_16_khz_twins(real_speech):
    """48 kHz mono and stereo and 22.05 kHz files, beside FLACs made from them by another program."""
    originals = sorted((real_speech / "ravdess-original").rglob("*.wav"))
    assert len(originals) == 6
    assert len({(f.samplerate, f.channels) for f in map(soundfile.SoundFile, originals)}) == 3
    for original in originals:
        ours = sdser.load_audio(original)
        twin = sdser.load_audio(real_speech / "ravdess" / original.parent.name / f"{original.stem}.flac")
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
