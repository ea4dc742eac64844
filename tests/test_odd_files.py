"""Files, uploads and arrays as people really have them: read whole, or refused with what would be right."""

import io

import numpy as np
import pytest
import torch
from conftest import build, resamples

import sdser
import train


@resamples
def test_odd_files_are_read_whole_or_refused(real_speech, capfd):
    """By path and as file objects, by itself and through the first look."""
    odd = real_speech / "odd"
    seconds = {"gsm.wav": 2.0, "ok.wav": 2.0, "phone_plus44.wav": 2.0}
    for name, expected in seconds.items():
        whole, part = sdser.load_audio(odd / name), sdser.load_audio(odd / name, 0.5, 1.0)
        assert len(whole) / 16_000 == pytest.approx(expected, abs=0.01)
        with open(odd / name, "rb") as file:
            assert torch.equal(sdser.load_audio(file), whole)
        torch.testing.assert_close(part[1000:-1000], whole[9000 : 8000 + len(part) - 1000], atol=0.02, rtol=0)
    looked = train.look_at([train.Clip(str(odd / name), "joy", None) for name in seconds])
    assert [clip.seconds for clip in looked] == pytest.approx(list(seconds.values()), abs=0.01)
    for name in ("vbr_loud_first_noheader.mp3", "cbr_noheader.mp3", "unfinalised_data0.wav"):
        with pytest.raises(ValueError, match=f"{name}: .*ffmpeg"):
            sdser.load_audio(odd / name)


def test_mp3s_that_declare_their_length_are_read_and_cut(wav, capfd):
    """Also behind a tag; libmpg123 has nothing to complain of."""
    path = wav(0.5 * np.sin(np.arange(48_000) / 10), "clip.mp3")
    content = path.read_bytes()
    title = b"TIT2\0\0\0\x0c\0\0\x03Information"  # looks like the mark of a length, and is none
    tag = b"ID3\x04\0\0\0\0\0" + bytes([len(title)]) + title
    whole = sdser.load_audio(io.BytesIO(tag + content))
    assert len(whole) == 48_000 and torch.equal(sdser.load_audio(path, 1.0, 0.5), whole[16_000:24_000])
    mark = max(content.find(b"Xing"), content.find(b"Info"))
    for name, undeclared in (("a.mp3", tag + content.replace(content[mark : mark + 4], b"none")), ("b.mp3", b"ID3")):
        (path.parent / name).write_bytes(undeclared)
        with pytest.raises(ValueError, match=name):
            sdser.load_audio(path.parent / name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("declared", "sound"), [
    (32_044, True), (32_160, True), (35_200, False), (0x7FFFF000, True), (0xFFFFFFFF, True),
])  # fmt: skip
def test_headers_may_promise_a_few_milliseconds_or_what_programs_write_into_a_pipe(wav, declared, sound):
    path = wav(0.1 * np.sin(np.arange(16_000)))
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = declared.to_bytes(4, "little")
    path.write_bytes(content)
    if sound:
        assert len(sdser.load_audio(path)) == 16_000
    else:
        with pytest.raises(ValueError, match=f"^{path}: "):
            sdser.load_audio(path)


@resamples
def test_classify_takes_uploads_and_other_rates(wav):
    model, waveform = build(), 0.1 * torch.randn(16_000)
    path = wav(waveform.numpy(), subtype="FLOAT", rate=8000)
    upload = io.BytesIO(path.read_bytes())
    by_path, by_array = model.classify(path)[0], model.classify(waveform, sample_rate=8000)[0]
    for answer in (*model.classify([upload]), by_array):
        assert answer.probabilities == pytest.approx(by_path.probabilities, abs=1e-6)
    assert model.classify(waveform)[0].probabilities != pytest.approx(by_path.probabilities, abs=1e-6)
    path = wav(np.ones(61 * 16_000, dtype=np.int16))
    with open(path, "rb") as file, pytest.raises(ValueError, match=str(path)):  # too long, by its own name
        model.classify(file)


@pytest.mark.parametrize("clip", [
    torch.randn(2, 8000), (16_000, torch.randn(8000)), {"array": torch.randn(8000)}, [0.1, 0.2],
    torch.zeros(8000, dtype=torch.int16), b"RIFF", io.BytesIO(b""), io.BytesIO(b"no audio"), ".", "",
    "none.wav", io.BytesIO(b"\0\0\0\x20ftypM4A " + bytes(100)),
])  # fmt: skip
def test_what_is_no_clip_is_refused(clip):
    model = build()
    for clips in (clip, [clip]):
        with pytest.raises((ValueError, FileNotFoundError)) as refusal:
            model.classify(clips)
        assert "\n" not in str(refusal.value)
