"""Corpora by file name, manifests, splits by speaker, downloads (from a server on this machine), synthetic speech."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import threading
import zipfile
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
    "crema-d": {"AudioWAV/1001_DFA_ANG_XX.wav": ("anger", "1001"), "AudioWAV/1091_WSI_SAD_HI.wav": ("sadness", "1091")},
    "savee": {"AudioData/DC/a01.wav": ("anger", "DC"), "AudioData/KL/su15.wav": ("surprise", "KL"),
              "AudioData/JE/sa03.wav": ("sadness", "JE")},
    "savee-flat": {"DC_a01.wav": ("anger", "DC"), "JK_n30.wav": ("neutral", "JK")},
    "tess": {"OAF_angry/OAF_back_angry.wav": ("anger", "OAF"), "YAF_back_ps.wav": ("surprise", "YAF")},
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
    expected = {(str(tmp_path / name), *meaning, None) for name, meaning in NAMES[corpus].items()}
    assert set(clips) == expected and clips == sorted(clips)


def test_other_files_are_left_out_with_a_warning(tmp_path):
    speech, song = "03-01-06-01-02-01-12.wav", "03-02-06-01-02-01-12.wav"
    with pytest.warns(UserWarning, match="1 of 2 audio files are not RAVDESS speech, left out"):
        [clip] = train.load_corpus(touch(tmp_path, speech, song, "._" + speech, "notes.txt"))
    assert clip.path.endswith(speech)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["03a01Xa.wav"], "unknown emotion 'X'; EMO-DB has W, L, E"),
        (["03-01-09-01-02-01-12.wav"], "unknown emotion '09'"),
        (["hello.wav"], "hello.wav is no file name of a known corpus"),
        (["notes.txt"], "holds no audio files"),
        ([], "holds no audio files"),
    ],
)
def test_folders_that_are_no_corpus(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        train.load_corpus(touch(tmp_path, *names))


def test_unknown_source():
    with pytest.raises(FileNotFoundError, match="iemocap: no such folder or manifest"):
        train.load_corpus("iemocap")


# -- manifests --------------------------------------------------------------------------------------------------------


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def test_csv(tmp_path):
    text = 'label,path,speaker,split,note\r\njoy,"a, b.wav",S1,train,x\r\nSorge,/abs/ü.wav,S2,devel,\r\n\r\n'
    manifest = write(tmp_path / "list.csv", text, "utf-8-sig")
    assert train.load_corpus(manifest) == [
        Clip(str(tmp_path / "a, b.wav"), "joy", "S1", "train"), Clip("/abs/ü.wav", "Sorge", "S2", "dev"),
    ]  # fmt: skip


def test_the_header_tells_the_delimiter_whatever_the_ending(tmp_path):
    for name, delimiter in (("a.csv", "\t"), ("b.csv", ";"), ("c.tsv", ",")):
        text = "path,label,speaker\nx.wav,joy,s\n".replace(",", delimiter)
        assert train.load_corpus(write(tmp_path / name, text)) == [Clip(str(tmp_path / "x.wav"), "joy", "s", None)]
    authors = write(tmp_path / "train.csv", "filename\temotion_class\na, b.wav\tjoy\n")
    assert train.load_corpus(authors) == [Clip(str(tmp_path / "a, b.wav"), "joy", None, None)]


@pytest.mark.parametrize("name", ["dev", "devel", "valid", "val", "validation"])
def test_names_of_dev(tmp_path, name):
    manifest = write(tmp_path / "list.csv", f"path,label,split\nx.wav,joy,{name}\n")
    assert train.load_corpus(manifest)[0].split == "dev"
    write(tmp_path / "folder" / f"{name}.csv", "path,label\nx.wav,joy\n")
    assert train.load_corpus(tmp_path / "folder")[0].split == "dev"


def test_tsv_without_speakers(tmp_path):
    manifest = write(tmp_path / "list.tsv", "path\tlabel\nx.wav\tjoy\n")
    assert train.load_corpus(manifest) == [Clip(str(tmp_path / "x.wav"), "joy", None, None)]


def test_jsonl(tmp_path):
    rows = [{"key": "1", "dataset": "emodb", "wav": "wav/1.wav", "sample_rate": 16000, "length": 1.9, "emo": "hap"}]
    manifest = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    assert train.load_corpus(manifest) == [Clip(str(tmp_path / "wav/1.wav"), "hap", None, None)]


def test_speakers_that_the_first_row_lacks_are_read(tmp_path):
    rows = [{"wav": "x.wav", "emo": "joy"}, {"wav": "y.wav", "emo": "joy", "speaker": "s1", "split": "train"}]
    manifest = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [(clip.speaker, clip.split) for clip in train.load_corpus(manifest)] == [(None, None), ("s1", "train")]


def test_numbers_serve_as_labels_and_speakers(tmp_path):
    manifest = write(tmp_path / "a.jsonl", '{"wav": "./a/../x.wav", "emo": 0, "speaker": 0, "split": "train"}\n')
    assert train.load_corpus(manifest) == [Clip(str(tmp_path / "x.wav"), "0", "0", "train")]


@pytest.mark.parametrize("header", ["emotion_class\tfilename", "label\tx", "x\tfilename"])
def test_tsv_of_two_columns_in_other_order(tmp_path, header):
    manifest = write(tmp_path / "list.tsv", f"{header}\njoy\tx.wav\n")
    assert train.load_corpus(manifest) == [Clip(str(tmp_path / "x.wav"), "joy", None, None)]


def test_folder_of_the_authors_lists(tmp_path):
    for name in ("train", "devel", "test"):
        write(tmp_path / f"{name}.tsv", f"filename\temotion_class\n{name}1.wav\tjoy\n{name}2.wav\tanger\n")
    clips = train.split_clips(train.load_corpus(tmp_path))
    assert [(clip.label, clip.split) for clip in clips] == [
        (label, split) for split in ("train", "dev", "test") for label in ("joy", "anger")
    ]
    assert clips[2].path == str(tmp_path / "devel1.wav")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "lists no clips"),
        ("a.csv", "path,label\n", "lists no clips"),
        ("a.csv", "path,emotional\nx.wav,joy\n", "must name the columns path, label .* it reads path, emotional"),
        ("a.csv", "x.wav,joy\ny.wav,joy\n", "must name the columns"),
        ("a.tsv", "x.wav\tjoy\ny.wav\tjoy\n", "must name the columns"),
        ("a.csv", "path,label\nx.wav,joy\ny.wav\n", "line 3: no label"),
        ("a.csv", "path,label\n,joy\n", "line 2: no path"),
        ("a.csv", "path,label,split\nx.wav,joy,eval\n", "line 2: unknown split 'eval'"),
        ("a.csv", "path,label\nx.wav,joy\na, b.wav,joy\n", "line 3: more fields than the first line names"),
        ("a.jsonl", '{"wav": "x.wav", "emo": "joy"}\n{"wav"\n', "not readable as a manifest"),
        ("a.jsonl", "[1]\n", "line 1: not an object"),
        ("a.jsonl", '{"wav": "x.wav", "emo": "joy"}\n[1]\n', "line 2: not an object"),
        ("a.csv", "path,label\nx.wav,j\xff\n", "not readable as a manifest"),
        ("a.txt", "path,label\nx.wav,joy\n", "give a folder, or a manifest ending in .csv, .tsv, .jsonl"),
    ],
)
def test_bad_manifests(tmp_path, name, text, message):
    manifest = write(tmp_path / name, text, "latin-1")
    with pytest.raises(ValueError, match=f"^{manifest}.*{message}"):
        train.load_corpus(manifest)


def test_two_manifests_for_a_split(tmp_path):
    for name in ("dev.csv", "devel.csv"):
        write(tmp_path / name, "path,label\nx.wav,joy\n")
    with pytest.raises(ValueError, match="both give the split dev"):
        train.load_corpus(tmp_path)


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


@pytest.mark.parametrize("fold", [None, (1, 3), (2, 5), (5, 5)])
def test_splits_share_no_speaker_and_miss_no_label(fold):
    clips = train.split_clips(made_up(10), fold)
    groups = [speakers_of(clips, split) for split in train.SPLITS]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    assert all({clip.label for clip in clips if clip.split == split} == {"a", "b"} for split in train.SPLITS)
    assert clips == train.split_clips(made_up(10), fold)  # no seed


def test_default_split_is_40_30_30():
    clips = train.split_clips(made_up(20))
    shares = {split: n / len(clips) for split, n in Counter(clip.split for clip in clips).items()}
    assert shares == pytest.approx({"train": 0.4, "dev": 0.3, "test": 0.3}, abs=0.04)


def test_folds_test_every_clip_once_in_balanced_groups():
    folds = [train.split_clips(made_up(10), (i, 5)) for i in range(1, 6)]
    tested = Counter(clip.path for clips in folds for clip in clips if clip.split == "test")
    assert set(tested.values()) == {1} and len(tested) == len(made_up(10))
    sizes = [sum(clip.split == "test" for clip in clips) for clips in folds]
    assert max(sizes) <= 1.3 * min(sizes)
    for clips, following in zip(folds, folds[1:] + folds[:1]):
        assert speakers_of(clips, "dev") == speakers_of(following, "test")


def test_labels_that_few_speakers_have_are_dealt_to_all_splits():
    clips = [Clip(f"{s}-{n}", "a", f"s{s}") for s in range(9) for n in range(20 - s)]
    clips += [Clip(f"{s}-rare", "rare", f"s{s}") for s in (0, 3, 4)]  # a greedy deal puts two of them together
    clips = train.split_clips(clips)
    assert all("rare" in {clip.label for clip in clips if clip.split == split} for split in train.SPLITS)


def test_a_manifests_own_splits_win():
    clips = [Clip(f"{split}-{label}", label, split, split) for split in train.SPLITS for label in "ab"]
    assert train.split_clips(clips) == clips
    with pytest.warns(UserWarning, match="--fold is ignored"):
        assert train.split_clips(clips, (1, 3)) == clips


OWN = [Clip(f"{split}-{label}", label, f"s{split}", split) for split in train.SPLITS for label in "ab"]


@pytest.mark.parametrize(
    ("clips", "fold", "message"),
    [
        (made_up(2), None, "2 speakers are too few for 3 groups"),
        (made_up(4), (1, 5), "4 speakers are too few for 5 groups"),
        ([Clip("x.wav", "a", None)], None, "x.wav: has neither speaker nor split"),
        ([*made_up(5), Clip("z", "rare", "s1")], None, "no way found to deal 5 speakers"),
        ([*OWN, Clip("y", "a", "strain", "test")], None, "speaker strain stands in two splits, train and test"),
        ([*OWN, Clip("train-a", "a", None, "test")], None, "train-a stands in two splits"),
        ([*OWN, Clip("y", "a", "sy")], None, "y: has no split while other clips have one"),
        ([*OWN, Clip("train-a", "b", "strain", "train")], None, "train-a has two labels, a and b"),
        (OWN[:-1], None, "the test split has no b"),
        (OWN[2:], None, "the train split has no a, b"),
    ],
)
def test_splits_that_cannot_be(clips, fold, message):
    with pytest.raises(ValueError, match=message):
        train.split_clips(clips, fold)


# -- downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Puts an archive on a server of this machine and points the download of EMO-DB at it."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        short_by = 0

        def log_message(self, *_):
            pass

        def copyfile(self, source, target):
            content = source.read()
            target.write(content[: len(content) - self.short_by])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(members, md5=None, clips=2, short_by=0, missing=False):
        Handler.short_by = short_by
        archive = folder / "corpus.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        md5 = hashlib.md5(archive.read_bytes()).hexdigest() if md5 == "right" else md5
        url = f"http://127.0.0.1:{server.server_port}/{'nothing' if missing else 'corpus.zip'}"
        monkeypatch.setitem(train.DOWNLOADS, "emodb", train.Download(url, md5, clips, "CC0 1.0"))

    yield serve
    server.shutdown()
    server.server_close()


WAVS = {"wav/03a01Fa.wav": b"RIFF", "wav/08a02Wc.wav": b"RIFF", "readme.txt": b"hello"}


def cached():
    return os.listdir(train.cache_folder()) if train.cache_folder().exists() else []


@pytest.mark.parametrize("md5", [None, "right"])
def test_download_once(served, md5, capsys):
    served(WAVS, md5)
    clips = train.load_corpus("emodb")
    assert [(clip.label, clip.speaker) for clip in clips] == [("happiness", "03"), ("anger", "08")]
    assert all(os.path.isfile(clip.path) for clip in clips)
    assert cached() == ["emodb"]
    assert "CC0" in capsys.readouterr().err
    served({}, missing=True)
    assert train.load_corpus("emodb") == clips  # from the cache


@pytest.mark.parametrize(
    ("members", "arguments", "message"),
    [
        (WAVS, dict(md5="0" * 32), "MD5 is .* instead of 0000"),
        (WAVS, dict(clips=535), "2 clips are in the archive instead of 535"),
        (WAVS, dict(short_by=50), "not a whole zip archive|download failed"),
        (WAVS, dict(missing=True), "the download failed"),
        (WAVS | {"../../evil.wav": b""}, {}, "would write outside its folder"),
        (WAVS | {"/etc/evil.wav": b""}, {}, "would write outside its folder"),
        (WAVS | {"..\\evil.wav": b""}, {}, "would write outside its folder"),
    ],
)
def test_bad_downloads_leave_nothing(served, members, arguments, message):
    served(members, **arguments)
    with pytest.raises(ValueError, match=rf"^http://127.0.0.1.*({message})"):
        train.load_corpus("emodb")
    assert cached() == []


def test_a_server_that_speaks_no_http(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/corpus.zip"
        monkeypatch.setitem(train.DOWNLOADS, "emodb", train.Download(url, None, 2, "CC0 1.0"))

        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"garbage\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ValueError, match="the download failed"):
            train.load_corpus("emodb")
    assert cached() == []


def test_zip_bombs_are_not_unpacked(served, monkeypatch):
    monkeypatch.setattr(train, "MAX_UNPACKED", 1000)
    served(WAVS | {"bomb.wav": b"0" * 1001})
    with pytest.raises(ValueError, match="would unpack to more than"):
        train.load_corpus("emodb")
    assert cached() == []


def test_published_checksum_and_counts():
    assert train.DOWNLOADS["ravdess"].md5 == "bc696df654c87fed845eb13823edef8a"
    assert (train.DOWNLOADS["ravdess"].clips, train.DOWNLOADS["emodb"].clips) == (1440, 535)


# -- real and synthetic speech ----------------------------------------------------------------------------------------


def test_real_corpora(real_speech):
    emodb = train.load_corpus(real_speech / "emodb")
    assert len(emodb) == 339 and len({clip.speaker for clip in emodb}) == 10
    assert Counter(clip.label for clip in emodb).keys() == {"anger", "happiness", "neutral", "sadness"}
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
