"""Files, uploads and arrays as people really have them: read whole, or refused with what would be right."""

import io
import subprocess
import sys
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import build, readable, refuses, resamples

import evaluate
import sdser


def tone(rate=16_000):  # one second of 440 Hz
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)


@pytest.mark.parametrize("ending", ["wav", "flac", "aiff", "au", "w64", "rf64", "mp3", "ogg", "opus"])
def test_formats(wav, ending, capfd, little_memory):
    """Each is read whole, as libsndfile alone does, and refused once its end is cut off; a damaged one may be both."""
    path = wav(tone(), f"clip.{ending}", **(dict(format="OGG", subtype="OPUS") if ending == "opus" else {}))
    assert evaluate.inspect_clips([evaluate.Clip(str(path), "joy", None)])[0].seconds == 1.0
    waveform, content = sdser.load_audio(path), path.read_bytes()
    assert waveform.dtype == torch.float32 and waveform.shape == (16_000,)
    torch.testing.assert_close(waveform, torch.from_numpy(soundfile.read(path, dtype="float32")[0]), atol=1e-6, rtol=0)
    assert capfd.readouterr().err == ""
    tolerance = 0.15 if ending in ("mp3", "ogg", "opus") else 1e-4
    torch.testing.assert_close(waveform[999:-999], torch.tensor(tone()[999:-999]).float(), atol=tolerance, rtol=0)
    for kept in (0, 0.01, 0.3, 0.5, 0.9):
        path.write_bytes(content[: int(kept * len(content))])
        refuses(str(path), sdser.load_audio, path)
    rng, read = np.random.default_rng(0), set()
    for _ in range(40):  # a few of the first hundred bytes changed; now and then also cut
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(100)] = rng.choice([0, 255, 127, 128, rng.integers(256)])
        path.write_bytes(damaged if rng.random() < 0.8 else damaged[: rng.integers(len(damaged))])
        read.add(readable(path, sdser.load_audio))
    assert read == {True, False}


@resamples
def test_any_rate_becomes_16_khz_and_long_clips_are_not_classified(wav):
    """A filter for exactly 11,127 Hz would take gigabytes; 25 Hz next to it is as good."""
    for rate, tolerance in ((8_000, 5e-3), (44_100, 5e-3), (192_000, 5e-3), (11_127, 0.2)):
        waveform = sdser.load_audio(wav(tone(rate), rate=rate))
        assert abs(len(waveform) - 16_000) < (20 if rate == 11_127 else 1)
        middle = waveform[4000:8000]  # away from the filter's edges
        torch.testing.assert_close(middle, torch.tensor(tone()[4000:8000]).float(), atol=tolerance, rtol=0)
    model, waveform = build(), 0.1 * torch.randn(16_000)
    [by_path] = model.classify(wav(waveform.numpy(), subtype="FLOAT", rate=8000))
    for rate, same in ((8000, True), (16_000, False)):
        [answer] = model.classify(waveform, sample_rate=rate)
        assert (answer.probabilities == pytest.approx(by_path.probabilities, abs=1e-6)) == same
    for rate in (0, -16_000, 48):  # the last one in kHz by mistake
        refuses("rate", model.classify, waveform, sample_rate=rate)
    with open(wav(np.ones(61 * 16_000, dtype=np.int16)), "rb") as file:
        refuses(str(file.name), model.classify, file)


@pytest.mark.parametrize(("ending", "subtype"), [("wav", "FLOAT"), ("flac", "PCM_24")])
def test_channels_are_averaged_and_a_part_is_what_the_whole_holds_there(wav, monkeypatch, ending, subtype):
    """Without torchaudio, which only resampling needs."""
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # importing it fails
    refuses("22.wav", sdser.load_audio, wav(tone(22_050), "22.wav", 22_050))
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (16_000, 8)).astype(np.float32)
    path = wav(channels, f"clip.{ending}", subtype=subtype)
    whole = sdser.load_audio(path)
    torch.testing.assert_close(whole, torch.from_numpy(channels.mean(1)), atol=1e-6, rtol=0)
    for start in (0.0, 0.25, 0.5):
        assert torch.equal(sdser.load_audio(path, start, 0.5), whole[int(16_000 * start) :][:8000])
    assert torch.equal(sdser.load_audio(path, 0.0, 2.0), whole)
    for other in (tone(), 0 * tone()):
        assert len(sdser.load_audio(wav(np.stack([tone(), other], 1), f"two.{ending}"))) == 16_000
    refuses(f"two.{ending}", sdser.load_audio, wav(np.stack([tone(), -tone()], 1), f"two.{ending}"))


@pytest.mark.parametrize(("samples", "rate"), [
    (np.zeros(0), 16_000), (np.ones(399), 16_000), (np.full(8000, np.nan), 16_000),
    (np.r_[np.ones(8000), np.inf], 16_000), (tone(), 999), (tone(), 2_000_000_000),
])  # fmt: skip
def test_unusable_samples_and_rates_that_no_device_has_are_refused(wav, samples, rate):
    """By the header where that tells, so that training clips are refused before the training."""
    path = wav(samples.astype(np.float32), rate=rate, subtype="FLOAT")
    refuses(str(path), sdser.load_audio, path)
    if np.isfinite(samples).all():
        refuses(str(path), evaluate.inspect_clips, [evaluate.Clip(str(path), "joy", None, "train")])


@resamples
def test_original_recordings_match_their_16_khz_twins(more_speech):
    """48 kHz mono and stereo and 22.05 kHz files, beside FLACs made from them by another program."""
    originals, twins = sorted(more_speech("ravdess-original").rglob("*.wav")), more_speech("ravdess")
    assert len(originals) == 6
    for original in originals:
        ours = sdser.load_audio(original)
        twin = sdser.load_audio(twins / original.parent.name / f"{original.stem}.flac")
        clip = evaluate.Clip(str(original), "joy", None)
        by_header, decoded = (evaluate.inspect_clips([clip], skip_bad=skip_bad) for skip_bad in (False, True))
        assert by_header == decoded, "else crops would differ"
        assert abs(len(ours) - len(twin)) <= 2
        both = torch.nn.utils.rnn.pad_sequence([ours, twin])
        assert torch.corrcoef(both.T)[0, 1] > 0.98


@resamples
def test_odd_files_are_read_whole_or_refused(more_speech):
    """By path and as file objects, by itself and through the first look."""
    odd = more_speech("odd")
    for name in ("gsm.wav", "ok.wav", "phone_plus44.wav"):
        whole, part = sdser.load_audio(odd / name), sdser.load_audio(odd / name, 0.5, 1.0)
        [clip] = evaluate.inspect_clips([evaluate.Clip(str(odd / name), "joy", None)])
        assert len(whole) / 16_000 == pytest.approx(2.0, abs=0.01) == clip.seconds
        with open(odd / name, "rb") as file:
            file.read(7)
            assert torch.equal(sdser.load_audio(file), whole), "it is read from the start"
        with subprocess.Popen(["cat", odd / name], stdout=subprocess.PIPE) as cat:
            assert torch.equal(sdser.load_audio(cat.stdout), whole), "a stream cannot be rewound"
        torch.testing.assert_close(part[1000:-1000], whole[9000 : 8000 + len(part) - 1000], atol=0.02, rtol=0)
    for name in ("vbr_loud_first_noheader.mp3", "cbr_noheader.mp3", "unfinalised_data0.wav"):
        refuses(f"{name}: .*ffmpeg", sdser.load_audio, odd / name)


def test_mp3s_and_flacs_that_declare_their_length_are_read_and_cut_and_an_ogg_may_lack_its_end_flag(wav, capfd):
    """As programs that write into a pipe leave them. An MP3 also behind a tag; libmpg123 has nothing to complain of."""
    content = (path := wav(0.5 * np.sin(np.arange(48_000) / 10), "clip.mp3")).read_bytes()
    title = b"TIT2\0\0\0\x0c\0\0\x03Information"  # looks like the mark of a length, and is none
    tag = b"ID3\x04\0\0\0\0\0" + bytes([len(title)]) + title
    whole = sdser.load_audio(io.BytesIO(tag + content))
    assert len(whole) == 48_000 and torch.equal(sdser.load_audio(path, 1.0, 0.5), whole[16_000:24_000])
    mark = max(content.find(b"Xing"), content.find(b"Info"))
    for name, undeclared in (("a.mp3", tag + content.replace(content[mark : mark + 4], b"none")), ("b.mp3", b"ID3")):
        (path.parent / name).write_bytes(undeclared)
        refuses(name, sdser.load_audio, path.parent / name)
    flac, ogg = (bytearray(wav(tone(), name).read_bytes()) for name in ("clip.flac", "clip.ogg"))
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])
    refuses("ffmpeg", sdser.load_audio, io.BytesIO(flac))
    page = ogg.rfind(b"OggS")  # the last
    ogg[page + 5] &= ~4
    ogg[page + 22 : page + 26] = bytes(4)
    checksum = int.from_bytes(ogg[page:]) << 32  # a remainder of polynomials
    while checksum >> 32:
        checksum ^= 0x104C11DB7 << checksum.bit_length() - 33
    ogg[page + 22 : page + 26] = checksum.to_bytes(4, "little")
    assert len(sdser.load_audio(io.BytesIO(ogg))) == 16_000
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("declared", [32_044, 32_160, 35_200, 0x7FFFF000, 0xFFFFFFFF])
def test_headers_may_promise_a_few_milliseconds_or_what_programs_write_into_a_pipe(wav, declared):
    content = bytearray((path := wav(tone())).read_bytes())
    content[4:8] = content[40:44] = declared.to_bytes(4, "little")
    path.write_bytes(content)
    assert readable(path, sdser.load_audio) == (declared != 35_200)
    assert declared == 35_200 or len(sdser.load_audio(path)) == 16_000


@pytest.mark.parametrize("clip", [
    torch.randn(2, 8000), (16_000, torch.randn(8000)), {"array": torch.randn(8000)}, [0.1, 0.2],
    torch.zeros(8000, dtype=torch.int16), b"RIFF", io.BytesIO(b""), io.BytesIO(b"no audio"), ".", "",
    "none.wav", io.BytesIO(b"\0\0\0\x20ftypM4A " + bytes(100)), np.array(["none.wav"]),
    Mock(read=AsyncMock()), *(type("Upload", (), {"read": bytes, "name": name}) for name in (None, 3)),
])  # fmt: skip
def test_what_is_no_clip_is_refused(clip):
    model = build()
    for clips in (clip, [clip]):
        with pytest.raises((sdser.InputError, FileNotFoundError)) as refusal:
            model.classify(clips)
        assert "\n" not in str(refusal.value)
