"""Corpora by file name, manifests, splits by speaker, synthetic speech."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import sdser
import train
from train import Clip

NAMES = {
    "ravdess": {"Actor_12/03-01-06-01-02-01-12.wav": ("fear", "12"), "03-01-02-01-02-01-01.flac": ("calm", "01")},
    "emo-db": {"wav/03a01Fa.wav": ("happiness", "03"), "wav/16b10Lb.wav": ("boredom", "16"),
               "wav/08a02Eb.wav": ("disgust", "08"), "wav/08a05Nb.wav": ("neutral", "08")},
    "crema-d": {"AudioWAV/1001_DFA_ANG_XX.wav": ("anger", "1001"), "AudioWAV/1040_ITH_SAD_X.wav": ("sadness", "1040")},
    "savee": {"AudioData/DC/a01.wav": ("anger", "DC"), "AudioData/KL/su15.wav": ("surprise", "KL")},
    "savee-flat": {"DC_a01.wav": ("anger", "DC"), "JK_n30.wav": ("neutral", "JK")},
    "tess": {"OAF_angry/OAF_back_angry.wav": ("anger", "OAF"), "YAF_back_ps.wav": ("surprise", "YAF"),
             "OA_bite_neutral.wav": ("neutral", "OAF")},
    "demos": {"NP_f_28_col01f.wav": ("guilt", "f_28"), "PR_m_12_gio07b.wav": ("happiness", "m_12")},
    "urdu": {"Angry/SM1_F10_A010.wav": ("anger", "SM1"), "SF2_F3_S07.wav": ("sadness", "SF2")},
}  # fmt: skip
SPEECH, SONG = "03-01-06-01-02-01-12.wav", "03-02-06-01-02-01-12.wav"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize("corpus", NAMES)
def test_known_file_names(tmp_path, corpus):
    clips = train.load_corpus(touch(tmp_path, *NAMES[corpus]))
    assert clips == [Clip(str(tmp_path / name), *NAMES[corpus][name]) for name in sorted(NAMES[corpus])]


@pytest.mark.parametrize("names", [
    [SPEECH, SONG, f"._{SPEECH}", f".Trash-1000/{SPEECH}", f"a/.cache/{SPEECH}", "notes.txt", "folder.wav/notes.txt"],
    [SPEECH, f"copy/{SPEECH}"], ["MP3/1001_DFA_ANG_XX.mp3", "WAV/1001_DFA_ANG_XX.wav"],
])  # fmt: skip
def test_other_files_and_second_copies_are_left_out_and_one_is_named(tmp_path, names):
    with pytest.warns(UserWarning, match=names[1]):
        [clip] = train.load_corpus(touch(tmp_path, *names))
    assert clip.path == str(tmp_path / names[0])


def test_links_to_folders_are_followed(tmp_path):
    """As in trees of linked actors."""
    touch(tmp_path / "elsewhere" / "Actor_12", SPEECH)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "Actor_12").symlink_to(tmp_path / "elsewhere" / "Actor_12")
    [clip] = train.load_corpus(tmp_path / "corpus")
    assert clip == Clip(str(tmp_path / "corpus" / "Actor_12" / SPEECH), "fear", "12")


@pytest.mark.parametrize("names", [["03a01Xa.wav"], ["hello.wav"], [".git/03a01Fa.wav"], []])
def test_what_is_no_corpus_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        train.load_corpus(touch(tmp_path, *names))
    with pytest.raises(FileNotFoundError, match=r"^iemocap: "):
        train.load_corpus("iemocap")


# -- manifests --------------------------------------------------------------------------------------------------------
def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_manifest(tmp_path):
    text = 'label, path ,speaker, split,note\r\njoy,"a, b.wav",S1,train,x\r\nSorge,/abs/ü.wav,,dev,\r\n\r\n'
    assert train.load_corpus(write(tmp_path / "list.csv", text, "utf-8-sig")) == [
        Clip(str(tmp_path / "a, b.wav"), "joy", "S1", "train", more={"note": "x"}),
        Clip("/abs/ü.wav", "Sorge", None, "dev", more={"note": ""}),
    ]
    for name, delimiter in (("a.csv", "\t"), ("b.csv", ";"), ("c.tsv", ",")):  # the first line tells, not the ending
        text = "path,label,speaker\nx.wav,joy,s\n".replace(",", delimiter)
        assert train.load_corpus(write(tmp_path / name, text)) == [Clip(str(tmp_path / "x.wav"), "joy", "s")]


@pytest.mark.parametrize(("text", "where"), [
    ("", ""), ("path,label\n", ""), ("x.wav,joy\ny.wav,joy\n", ""), ("path,label\nx.wav,j\xff\n", ""),
    ("path,label\nx.wav,joy\ny.wav\n", "line 3"), ("path,label\n,joy\n", "line 2"),
    ("path,label\nx.wav,joy\na, b.wav,joy\n", "line 3"), ("path,label,split\nx.wav,joy,eval\n", "line 2"),
    ("path,label\nx.wav,joy\nx.wav,grief\n", "line 3.*x.wav"),  # two labels
    ("path,label,split\nx.wav,joy,train\nx.wav,joy,test\n", "line 3.*x.wav"),
])  # fmt: skip
def test_bad_manifests_are_refused_with_the_line(tmp_path, text, where):
    manifest = write(tmp_path / "a.csv", text, "latin-1")
    with pytest.raises(ValueError, match=f"^{manifest}: .*{where}"):
        train.load_corpus(manifest)


def test_labels_that_differ_in_case_alone_are_warned_of(corpus, tmp_path):
    text = corpus.read_text().replace("2.wav,anger", "2.wav,Anger").replace("\n", f"\n{corpus.parent}/")
    with pytest.warns(UserWarning, match=r"Anger.*anger"):
        labels, _ = train.load_data(train.parse_args(["--data", str(write(tmp_path / "a.csv", text))]))
    assert labels == ["Anger", "anger", "sadness"]


def test_rows_with_one_path_count_once_and_equal_names_do_not(tmp_path):
    text = "path,label,speaker\na/001.wav,joy,s\nb/001.wav,joy,s\na/001.wav,joy,s\n"
    with pytest.warns(UserWarning, match=r"a/001\.wav"):
        clips = train.load_corpus(write(tmp_path / "a.csv", text))
    assert [clip.path for clip in clips] == [str(tmp_path / "a/001.wav"), str(tmp_path / "b/001.wav")]


# -- splits -----------------------------------------------------------------------------------------------------------
def made_up(speakers):
    clips = []
    for speaker in range(speakers):
        for n in range(5 + speaker % 3):
            clips += [Clip(f"{speaker}-{label}-{n}", label, f"s{speaker}") for label in "ab"]
    return clips


def speakers_of(clips, split):
    return {clip.speaker for clip in clips if clip.split == split}


def test_folds_share_no_speaker_miss_no_label_and_test_every_clip_once():
    folds, tested = [train.split_clips(made_up(10), (i, 5)) for i in range(1, 6)], Counter()
    for clips, following in zip(folds, folds[1:] + folds[:1]):
        groups = [speakers_of(clips, split) for split in train.SPLITS]
        assert sum(map(len, groups)) == len(set().union(*groups)) == 10
        for split in train.SPLITS:
            assert {clip.label for clip in clips if clip.split == split} == {"a", "b"}
        assert [clip._replace(split=None) for clip in clips] == made_up(10)
        assert speakers_of(clips, "dev") == speakers_of(following, "test")
        tested.update(clip.path for clip in clips if clip.split == "test")
    assert set(tested.values()) == {1} and len(tested) == len(made_up(10))
    sizes = [sum(clip.split == "test" for clip in clips) for clips in folds]
    assert max(sizes) <= 1.3 * min(sizes)


OWN = [Clip(f"{split}-{label}", label, f"s{split}", split) for split in train.SPLITS for label in "ab"]


@pytest.mark.parametrize(("clips", "named"), [
    (made_up(4), "4 speakers"), ([Clip("x.wav", "a", None)], "x.wav"), ([*made_up(5), Clip("z", "rare", "s1")], "rare"),
    ([*OWN, Clip("y", "a", "strain", "test")], "strain"), ([*OWN, Clip("y.wav", "a", "sy")], "y.wav"),
    (OWN[:-1], "test .*b"), (OWN[2:], "train .*a, b"),
])  # fmt: skip
def test_splits_that_cannot_be_are_refused(clips, named):
    with pytest.raises(ValueError, match=named):
        train.split_clips(clips)


# -- real and synthetic speech ----------------------------------------------------------------------------------------
def test_real_corpora(real_speech):
    emodb = train.split_clips(train.load_corpus(real_speech / "emodb"))
    assert len(emodb) == 339 and len({clip.speaker for clip in emodb}) == 10
    assert {clip.label for clip in emodb} == {"anger", "happiness", "neutral", "sadness"}
    assert speakers_of(emodb, "test") == {"08", "10"} and speakers_of(emodb, "dev") == {"12", "14"}  # as in the study
    ravdess = train.split_clips(train.load_corpus(real_speech / "ravdess"))
    assert len(ravdess) == 1440 and len({clip.speaker for clip in ravdess}) == 24
    others = ("calm", "happiness", "sadness", "anger", "fear", "disgust", "surprise")
    assert Counter(clip.label for clip in ravdess) == {"neutral": 96, **dict.fromkeys(others, 192)}


def test_synthetic_corpus_is_the_same_wherever_it_is_made(monkeypatch):
    make = partial(train.make_synthetic, speakers=3, clips=2)
    monkeypatch.setattr(train, "make_synthetic", make)
    clips = train.split_clips(train.load_corpus("synthetic"), (1, 3))
    assert len(clips) == 3 * 2 * 4 and {clip.label for clip in clips} == set(train.PROSODY)
    assert 0.9 < len(sdser.load_audio(clips[0].path)) / 16_000 < 1.7
    before, folder = {clip.path: Path(clip.path).read_bytes() for clip in clips}, make()
    shutil.rmtree(folder)
    assert make() == folder
    assert {path: Path(path).read_bytes() for path in before} == before
    monkeypatch.setitem(train.PROSODY, "fear", train.PROSODY["anger"])  # an edited voice is another corpus
    assert make() != folder
