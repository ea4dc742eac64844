"""Corpora by file name, manifests, splits by speaker, synthetic speech."""

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

import train
from train import Clip

NAMES = {
    "ravdess": {
        "Actor_12/03-01-06-01-02-01-12.wav": ("fear", "12"),
        "Actor_12/03-01-02-01-02-01-12.flac": ("calm", "12"),
        "Actor_01/03-01-08-01-02-01-01.wav": ("surprise", "01"),
    },
    "emodb": {
        "wav/03a01Fa.wav": ("happiness", "03"), "wav/16b10Lb.wav": ("boredom", "16"),
        "wav/08a02Wc.flac": ("anger", "08"),
        "wav/08a02Eb.wav": ("disgust", "08"), "wav/08a05Ab.wav": ("fear", "08"), "wav/08a05Tb.wav": ("sadness", "08"),
        "wav/08a05Nb.wav": ("neutral", "08"),
    },
    "crema-d": {"AudioWAV/1001_DFA_ANG_XX.wav": ("anger", "1001"), "AudioWAV/1091_WSI_SAD_HI.wav": ("sadness", "1091"),
                "AudioWAV/1040_ITH_SAD_X.wav": ("sadness", "1040")},
    "savee": {"AudioData/DC/a01.wav": ("anger", "DC"), "AudioData/KL/su15.wav": ("surprise", "KL"),
              "AudioData/JE/sa03.wav": ("sadness", "JE")},
    "savee-flat": {"DC_a01.wav": ("anger", "DC"), "JK_n30.wav": ("neutral", "JK")},
    "tess": {"OAF_angry/OAF_back_angry.wav": ("anger", "OAF"), "YAF_back_ps.wav": ("surprise", "YAF"),
             "OA_bite_neutral.wav": ("neutral", "OAF")},
    "demos": {"NP_f_28_col01f.wav": ("guilt", "f_28"), "PR_m_12_gio07b.wav": ("happiness", "m_12"),
              "PR_m_12_rab07b.wav": ("anger", "m_12")},
    "urdu": {"Angry/SM1_F10_A010.wav": ("anger", "SM1"), "SF2_F3_S07.wav": ("sadness", "SF2")},
}  # fmt: skip


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


@pytest.mark.parametrize("corpus", NAMES)
def test_known_file_names(tmp_path, corpus):
    clips = train.load_corpus(touch(tmp_path, *NAMES[corpus]))
    expected = {Clip(str(tmp_path / name), label, speaker) for name, (label, speaker) in NAMES[corpus].items()}
    assert set(clips) == expected and [clip.path for clip in clips] == sorted(clip.path for clip in clips)


def test_other_files_are_left_out_with_a_warning(tmp_path):
    speech, song = "03-01-06-01-02-01-12.wav", "03-02-06-01-02-01-12.wav"
    touch(tmp_path, speech, song, "._" + speech, ".Trash-1000/" + speech, "a/.ipynb_checkpoints/" + speech, "notes.txt")
    with pytest.warns(UserWarning, match=song):
        [clip] = train.load_corpus(tmp_path)
    assert clip.path == str(tmp_path / speech)


@pytest.mark.parametrize("names", [
    ["Actor_12/03-01-06-01-02-01-12.wav", "archive/Actor_12/03-01-06-01-02-01-12.wav"],
    ["AudioMP3/1001_DFA_ANG_XX.mp3", "AudioWAV/1001_DFA_ANG_XX.wav"],
])  # fmt: skip
def test_the_same_recording_twice_counts_once(tmp_path, names):
    with pytest.warns(UserWarning, match=names[1]):
        [clip] = train.load_corpus(touch(tmp_path, *names))
    assert clip.path == str(tmp_path / names[0])


@pytest.mark.parametrize("names", [["03a01Xa.wav"], ["hello.wav"], ["notes.txt"], [".git/03a01Fa.wav"], []])
def test_folders_that_are_no_corpus_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        train.load_corpus(touch(tmp_path, *names))
    with pytest.raises(FileNotFoundError, match=r"^iemocap: "):
        train.load_corpus("iemocap")


# -- manifests --------------------------------------------------------------------------------------------------------


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def test_csv(tmp_path):
    text = 'label, path ,speaker, split,note\r\njoy,"a, b.wav",S1,train,x\r\nSorge,/abs/ü.wav,S2,dev,\r\n\r\n'
    manifest = write(tmp_path / "list.csv", text, "utf-8-sig")
    assert train.load_corpus(manifest) == [
        Clip(str(tmp_path / "a, b.wav"), "joy", "S1", "train"), Clip("/abs/ü.wav", "Sorge", "S2", "dev"),
    ]  # fmt: skip


def test_the_header_tells_the_delimiter_whatever_the_ending(tmp_path):
    for name, delimiter in (("a.csv", "\t"), ("b.csv", ";"), ("c.tsv", ",")):
        text = "path,label,speaker\nx.wav,joy,s\n".replace(",", delimiter)
        assert train.load_corpus(write(tmp_path / name, text)) == [Clip(str(tmp_path / "x.wav"), "joy", "s", None)]


@pytest.mark.parametrize(("text", "line"), [
    ("", ""), ("path,label\n", ""), ("path,emotional\nx.wav,joy\n", ""), ("x.wav,joy\ny.wav,joy\n", ""),
    ("path,label\nx.wav,joy\ny.wav\n", "line 3"), ("path,label\n,joy\n", "line 2"),
    ("path,label,split\nx.wav,joy,eval\n", "train, dev or test"), ("path,label\nx.wav,joy\na, b.wav,joy\n", "line 3"),
    ("path,label\nx.wav,j\xff\n", ""),
])  # fmt: skip
def test_bad_manifests(tmp_path, text, line):
    manifest = write(tmp_path / "a.csv", text, "latin-1")
    with pytest.raises(ValueError, match=f"^{manifest}: .*{line}"):
        train.load_corpus(manifest)


def test_a_row_twice_counts_once(tmp_path):
    manifest = write(tmp_path / "a.csv", "path,label,speaker\nx.wav,joy,s\nx.wav,joy,s\n")
    with pytest.warns(UserWarning, match="x.wav"):
        assert train.load_corpus(manifest) == [Clip(str(tmp_path / "x.wav"), "joy", "s")]


# -- splits -----------------------------------------------------------------------------------------------------------


def made_up(speakers, labels=("a", "b"), clips=5):
    return [
        Clip(f"{s}-{label}-{n}", label, f"s{s}")
        for s in range(speakers)
        for label in labels
        for n in range(clips + s % 3)
    ]


def speakers_of(clips, split):
    return {clip.speaker for clip in clips if clip.split == split}


@pytest.mark.parametrize("fold", [(1, 3), (2, 5), (5, 5)])
def test_splits_share_no_speaker_and_miss_no_label(fold):
    clips = train.split_clips(made_up(10), fold)
    groups = [speakers_of(clips, split) for split in train.SPLITS]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    assert all({clip.label for clip in clips if clip.split == split} == {"a", "b"} for split in train.SPLITS)
    assert clips == train.split_clips(made_up(10), fold)  # no seed


def test_folds_test_every_clip_once_in_balanced_groups():
    folds = [train.split_clips(made_up(10), (i, 5)) for i in range(1, 6)]
    tested = Counter(clip.path for clips in folds for clip in clips if clip.split == "test")
    assert set(tested.values()) == {1} and len(tested) == len(made_up(10))
    sizes = [sum(clip.split == "test" for clip in clips) for clips in folds]
    assert max(sizes) <= 1.3 * min(sizes)
    for clips, following in zip(folds, folds[1:] + folds[:1]):
        assert speakers_of(clips, "dev") == speakers_of(following, "test")


def test_a_manifests_own_splits_win():
    clips = [Clip(f"{split}-{label}", label, split, split) for split in train.SPLITS for label in "ab"]
    assert train.split_clips(clips) == clips
    assert train.split_clips(clips, (1, 3)) == clips


OWN = [Clip(f"{split}-{label}", label, f"s{split}", split) for split in train.SPLITS for label in "ab"]


@pytest.mark.parametrize(("clips", "named"), [
    (made_up(4), "4 speakers"), ([Clip("x.wav", "a", None)], "x.wav"), ([*made_up(5), Clip("z", "rare", "s1")], "rare"),
    ([*OWN, Clip("y", "a", "strain", "test")], "strain"), ([*OWN, Clip("train-a", "a", None, "test")], "train-a"),
    ([*OWN, Clip("y", "a", "sy")], "y: "), ([*OWN, Clip("train-a", "b", "strain", "train")], "train-a"),
    (OWN[:-1], "the test split has no b"), (OWN[2:], "the train split has no a, b"),
])  # fmt: skip
def test_splits_that_cannot_be_name_what_is_wrong(clips, named):
    with pytest.raises(ValueError, match=named):
        train.split_clips(clips)


# -- real and synthetic speech ----------------------------------------------------------------------------------------


def test_real_corpora(real_speech):
    emodb = train.split_clips(train.load_corpus(real_speech / "emodb"))
    assert len(emodb) == 339 and len({clip.speaker for clip in emodb}) == 10
    assert Counter(clip.label for clip in emodb).keys() == {"anger", "happiness", "neutral", "sadness"}
    assert speakers_of(emodb, "test") == {"08", "10"} and speakers_of(emodb, "dev") == {"12", "14"}  # as in the study
    ravdess = train.split_clips(train.load_corpus(real_speech / "ravdess"))
    assert len(ravdess) == 1440 and len({clip.speaker for clip in ravdess}) == 24
    assert Counter(clip.label for clip in ravdess) == {"neutral": 96} | dict.fromkeys(
        ("calm", "happiness", "sadness", "anger", "fear", "disgust", "surprise"), 192
    )


def test_synthetic_corpus_is_made_once_and_the_same_everywhere(monkeypatch):
    folder = train.make_synthetic(speakers=3, clips=2)
    clips = train.read_folder(folder)
    assert len(clips) == 3 * 4 * 2 and len({clip.speaker for clip in clips}) == 3
    before = {clip.path: Path(clip.path).read_bytes() for clip in clips}
    times = {path: os.stat(path).st_mtime_ns for path in before}
    assert train.make_synthetic(speakers=3, clips=2) == folder
    assert times == {path: os.stat(path).st_mtime_ns for path in before}
    shutil.rmtree(folder)
    assert train.make_synthetic(speakers=3, clips=2) == folder
    assert {path: Path(path).read_bytes() for path in before} == before
    monkeypatch.setitem(train.PROSODY, "fear", train.PROSODY["anger"])  # an edited voice is another corpus
    assert train.make_synthetic(speakers=3, clips=2) != folder


def pitch(wave):
    """Median fundamental frequency, Hz, from the autocorrelation of 64 ms frames."""
    found = []
    for frame in np.lib.stride_tricks.sliding_window_view(wave, 1024)[::512]:
        if np.abs(frame).max() > 0.1:
            correlation = np.correlate(frame, frame, "full")[1023:]
            found.append(16000 / (40 + correlation[40:230].argmax()))
    return np.median(found)


def test_synthetic_voices_follow_speaker_and_emotion():
    rng = np.random.default_rng(0)
    voices = {
        (speaker, label): np.mean([pitch(train.synthesize(train.PROSODY[label], hertz, 1.0, rng)) for _ in range(8)])
        for speaker, hertz in (("low", 100), ("high", 180))
        for label in ("fear", "sadness")
    }
    for speaker in ("low", "high"):
        assert voices[speaker, "fear"] > 1.2 * voices[speaker, "sadness"]
    # absolute pitch does not tell: a high voice's sadness lies above a low voice's fear
    assert voices["high", "sadness"] > voices["low", "fear"]


def test_synthetic_is_a_source_of_a_dozen_speakers(monkeypatch):
    monkeypatch.setattr(train, "make_synthetic", partial(train.make_synthetic, clips=1))
    clips = train.split_clips(train.load_corpus("synthetic"))
    assert len({clip.speaker for clip in clips}) == 12 and set(Counter(clip.label for clip in clips)) == set(
        train.PROSODY
    )
    info = soundfile.info(clips[0].path)
    assert (info.samplerate, info.channels) == (16000, 1) and 0.9 < info.duration < 1.7
