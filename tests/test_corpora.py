"""Corpora by file name, manifests, splits by speaker."""

import warnings
from collections import Counter

import pytest
from conftest import refuses, speakers, write

import evaluate
import train
from evaluate import Clip

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
    return [write(folder / name) for name in names] and folder


@pytest.mark.parametrize("corpus", NAMES)
def test_known_file_names(tmp_path, corpus):
    """Behind a link to a folder, as in trees of linked actors."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(touch(tmp_path / "elsewhere", *NAMES[corpus]))
    expected = [Clip(f"{tmp_path}/corpus/link/{name}", *NAMES[corpus][name]) for name in sorted(NAMES[corpus])]
    assert evaluate.load_corpus(tmp_path / "corpus") == expected


def test_other_files_and_second_copies_are_left_out_and_one_is_named(tmp_path):
    """And what holds nothing else is refused."""
    for i, names in enumerate([
        [SPEECH, SONG, f"._{SPEECH}", f".Trash-1000/{SPEECH}", f"a/.cache/{SPEECH}", "notes.txt", "folder.wav/a.txt"],
        [SPEECH, f"copy/{SPEECH}"], ["MP3/1001_DFA_ANG_XX.mp3", "WAV/1001_DFA_ANG_XX.wav"],
    ]):  # fmt: skip
        with pytest.warns(UserWarning, match=names[1]):
            [clip] = evaluate.load_corpus(touch(tmp_path / str(i), *names))
        assert clip.path == str(tmp_path / str(i) / names[0])
    for names in (["notes.txt"], [".git/03a01Fa.wav"], ["hello.wav"], ["03a01Xa.wav"]):
        refuses(f"^{tmp_path}/no", evaluate.load_corpus, touch(tmp_path / "no", *names))
    with pytest.raises(FileNotFoundError, match=r"^iemocap: "):
        evaluate.load_corpus("iemocap")


def test_manifest(tmp_path):
    text = 'label, Path ,SPEAKER, split,note,Sex\r\njoy,"a, b.wav",S1,train,x,f\r\nSorge,/abs/ü.wav,,dev,,\r\n\r\n'
    with pytest.warns(UserWarning, match="note, Sex") as warned:
        clips = evaluate.load_corpus(write(tmp_path / "list.csv", text, "utf-8-sig"))
    assert len(warned) == 1 and clips == [
        Clip(str(tmp_path / "a, b.wav"), "joy", "S1", "train", more={"note": "x", "Sex": "f"}),
        Clip("/abs/ü.wav", "Sorge", None, "dev", more={"note": "", "Sex": ""}),
    ]
    for name, delimiter in (("a.csv", "\t"), ("b.csv", ";"), ("c.tsv", ",")):  # the first line tells, not the ending
        text = "path,label,speaker\nx.wav,joy,s\n".replace(",", delimiter)
        assert evaluate.load_corpus(write(tmp_path / name, text)) == [Clip(str(tmp_path / "x.wav"), "joy", "s")]
    text = "path,label,speaker\na/001.wav,joy,s\nb/001.wav,joy,s\na/001.wav,joy,s\n"
    with pytest.warns(UserWarning, match=r"a/001\.wav"):  # one path counts once, two equal names do not
        clips = evaluate.load_corpus(write(tmp_path / "d.csv", text))
    assert [clip.path for clip in clips] == [str(tmp_path / "a/001.wav"), str(tmp_path / "b/001.wav")]


def test_a_manifests_names_have_one_spelling_and_its_sentences_any_quotation_marks(tmp_path):
    """Accents may be in one piece or, as a Mac stores them, in two; zero-width characters and nan count for nothing."""
    touch(tmp_path, "a\u0308.wav")
    names = ["nan", "NaN", "None", "<NA>", "\u200b", "Zo\u00eb", "Zoe\u0308\ufeff"]
    text = ['"Yes', '"No"', 'no "', '"', "", "", ""]
    rows = ["path\tlabel\tspeaker\ttext", f"\u00e4.wav\tF\u00e4\t{names[0]}\t{text[0]}"]
    rows += [f"{i}.wav\tFa\u0308\u200b\t{names[i]}\t{text[i]}" for i in range(1, 7)]
    with pytest.warns(UserWarning, match="text"):
        clips = evaluate.load_corpus(write(tmp_path / "a.tsv", "\n".join(rows)))
    assert clips[0].path == str(tmp_path / "a\u0308.wav") and {clip.label for clip in clips} == {"F\u00e4"}
    assert [clip.speaker for clip in clips] == [None] * 5 + ["Zo\u00eb"] * 2
    assert [clip.more["text"] for clip in clips] == text


@pytest.mark.parametrize(("text", "where"), [
    ("", ""), ("path,label\n", ""), ("x.wav,joy\ny.wav,joy\n", ""), ("path,label\nx.wav,j\xff\n", ""),
    ("path,label\nx.wav,joy\ny.wav\n", "line 3"), ("path,label\n,joy\n", "line 2"),
    ('path,label\nx.wav,"joy\ny.wav,"joy"\n', "line 2"), ("path,label\n<NA>,joy\n", "line 2"),
    ("path,label\nx.wav,joy\ny.wav,nan\xe2\x80\x8b\n", "line 3"),  # nan and, in UTF-8, a zero-width space
    ("path,label\nx.wav,joy\na, b.wav,joy\n", "line 3"), ("path,label,split\nx.wav,joy,eval\n", "line 2"),
    ("path,label\nx.wav,joy\nx.wav,grief\n", "line 3.*x.wav"),  # two labels
    ("path,label,split\nx.wav,joy,train\nx.wav,joy,test\n", "line 3.*x.wav"),
    *((f"path,label,{name}\nx.wav,joy,1\n", f"{name}.*segments") for name in ("start", "end", "Offset", "duration")),
])  # fmt: skip
def test_bad_manifests_are_refused_with_the_line(tmp_path, text, where):
    manifest = write(tmp_path / "a.csv", text, "latin-1")
    refuses(f"^{manifest}: .*{where}", evaluate.load_corpus, manifest)


@pytest.mark.parametrize(("old", "new", "named"), [
    ("2.wav,anger", "2.wav,Anger", "labels .*Anger, anger$"), ("2.wav,sadness,s", "2.wav,sadness,S", "speakers .*S0, "),
])  # fmt: skip
def test_names_that_differ_only_in_case_are_warned_of(corpus, tmp_path, old, new, named):
    text = corpus.read_text().replace(old, new).replace("\n", f"\n{corpus.parent}/")
    with pytest.warns(UserWarning, match=named):
        train.load_data(train.parse_args(["--data", str(write(tmp_path / "a.csv", text))]))


def made_up(count):
    """Clips of two labels, 10, 12 or 14 of each speaker."""
    return [Clip(f"{i}-{x}-{n}", x, f"s{i}") for i in range(count) for n in range(5 + i % 3) for x in "ab"]


def test_folds_share_no_speaker_miss_no_label_and_test_every_clip_once():
    folds = [evaluate.split_clips(made_up(10), (i, 5)) for i in range(1, 6)]
    for clips, following in zip(folds, folds[1:] + folds[:1]):
        groups = speakers(clips).values()
        assert sum(map(len, groups)) == len(set().union(*groups)) == 10
        for split in evaluate.SPLITS:
            assert {clip.label for clip in clips if clip.split == split} == {"a", "b"}
        assert [clip._replace(split=None) for clip in clips] == made_up(10)
        assert speakers(clips)["dev"] == speakers(following)["test"]
    tested = [{clip.path for clip in clips if clip.split == "test"} for clips in folds]
    assert set().union(*tested) == {clip.path for clip in made_up(10)} and sum(map(len, tested)) == len(made_up(10))
    assert max(map(len, tested)) <= 1.3 * min(map(len, tested))


OWN = [Clip(f"{split}-{label}", label, f"s{split}", split) for split in evaluate.SPLITS for label in "ab"]


def test_splits_that_cannot_be_are_refused_and_a_label_that_dev_or_test_lacks_is_warned_of():
    for clips, named in (
        (made_up(4), "4 speakers"), ([Clip("x.wav", "a", None)], "x.wav"), (OWN[:-2], "test"), (OWN[2:], "train"),
        ([*OWN, Clip("y", "a", "strain", "test")], "strain.*column speaker"),
        ([*OWN, Clip("y.wav", "a", "sy")], "y.wav"), ([*OWN, Clip("y", "rare", "sdev", "dev")], "train .*rare"),
    ):  # fmt: skip
        refuses(named, evaluate.split_clips, clips)
    # leave-one-speaker-out of EMO-DB: speaker 08 has no disgust
    emodb = [Clip(f"{i}{x}", x, f"{i:02}") for i in range(10) for x in "WLEAFTN" if (i, x) != (8, "E")]
    with warnings.catch_warnings(action="error"):
        for i in range(1, 9):
            evaluate.split_clips(emodb, (i, 10))
    for i, split in ((9, "dev"), (10, "test")):  # the speaker with the fewest clips is dealt last
        with pytest.warns(UserWarning, match=f"{split} .*lacks E"):
            evaluate.split_clips(emodb, (i, 10))
    with pytest.warns(UserWarning, match="test .*lacks b"):  # official splits
        evaluate.split_clips(OWN[:-1])


def test_real_corpora(more_speech):
    emodb = evaluate.split_clips(evaluate.load_corpus(evaluate.DATA / "emodb"))
    assert len(emodb) == 339 and len({clip.speaker for clip in emodb}) == 10
    assert {clip.label for clip in emodb} == {"anger", "happiness", "neutral", "sadness"}
    assert (speakers(emodb)["test"], speakers(emodb)["dev"]) == ({"08", "10"}, {"12", "14"})  # as in the study
    ravdess = evaluate.split_clips(evaluate.load_corpus(more_speech("ravdess")))
    assert len(ravdess) == 1440 and len({clip.speaker for clip in ravdess}) == 24
    others = dict.fromkeys(("calm", "happiness", "sadness", "anger", "fear", "disgust", "surprise"), 192)
    assert Counter(clip.label for clip in ravdess) == {"neutral": 96, **others}
