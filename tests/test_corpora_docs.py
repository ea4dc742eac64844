"""The Python in docs/corpora.md, run on small copies of the real layouts; the clips are worked out by hand."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import train

DOC = (Path(__file__).parents[1] / "docs" / "corpora.md").read_text(encoding="utf-8")
BLOCKS = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for section in DOC.split("\n## ")[1:]
}
FOUR = {"anger", "happiness", "neutral", "sadness"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder; the corpora lie in its `path/to`, so that a block can run as it stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(section: str, changes: dict[str, str] | None = None) -> None:
    """Runs a section's block as its reader would, after changing what the text says may be changed."""
    [code] = BLOCKS[section]
    for old, new in (changes or {}).items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, section, "exec"), {"__name__": "__main__"})


def write(path: str, text: str = "", encoding: str = "utf-8") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))


def speakers(clips) -> dict[str, set]:
    return {split: {clip.speaker for clip in clips if clip.split == split} for split in ("train", "dev", "test")}


def test_every_block_is_run_by_a_test():
    assert DOC.count("```python") == len(BLOCKS) == 4 and all(len(blocks) == 1 for blocks in BLOCKS.values())
    tests = Path(__file__).read_text(encoding="utf-8")
    assert all(f'    run("{section}"' in tests for section in BLOCKS)


# -- IEMOCAP ----------------------------------------------------------------------------------------------------------

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"


def write_dialog(session: int, dialog: str, turns: dict[str, str]) -> None:
    """A dialogue's labels, with the raters' own lines (one with a Latin-1 byte) between them, and its clips."""
    root = f"path/to/IEMOCAP/Session{session}"
    text = HEADER
    for turn, label in turns.items():
        text += f"[6.2901 - 8.2357]\t{dialog}_{turn}\t{label}\t[2.5000, 2.5000, 2.5000]\n"
        text += "C-E2:\tAnger;\t()\nC-E3:\tNeutral; Sadness;\t(ang\tblas\u00e9)\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
        write(f"{root}/sentences/wav/{dialog}/{dialog}_{turn}.wav")
    write(f"{root}/dialog/EmoEvaluation/{dialog}.txt", text, "latin-1")
    # what must be left alone: macOS's shadow files, and each rater's own labels in subfolders
    shadow = f"\x00\x05\n[1.0 - 2.0]\t{dialog}_X000\tang\t[1, 1, 1]\n\xb0"
    write(f"{root}/dialog/EmoEvaluation/._{dialog}.txt", shadow, "latin-1")
    write(f"{root}/sentences/wav/{dialog}/._{dialog}_F000.wav", "\x00\x05")
    for other in ("Categorical", "Attribute", "Self-evaluation"):
        write(f"{root}/dialog/EmoEvaluation/{other}/{dialog}_e2_cat.txt", text, "latin-1")


@pytest.fixture
def iemocap() -> None:
    """Five sessions of nine turns, six of them with one of the four usual labels; Session 1 has four more turns."""
    for n in range(1, 6):
        turns = {"F000": "neu", "F001": "xxx", "M000": "ang", "M001": "oth", "M002": "sad", "F002": "hap"}
        write_dialog(n, f"Ses0{n}F_impro01", turns)
        write_dialog(n, f"Ses0{n}M_script01_1b", {"F000": "exc", "M000": "neu", "M001": "xxx"})
    write_dialog(1, "Ses01M_impro05a", {"M000": "fru", "M001": "fea", "F000": "sur", "F001": "dis"})


@pytest.mark.parametrize("absolute", [False, True])
def test_iemocap(iemocap, folder, absolute):
    root = f"{folder}/path/to/IEMOCAP" if absolute else "path/to/IEMOCAP"
    run("IEMOCAP", {"path/to/IEMOCAP": root})
    clips = train.load_corpus("iemocap.csv")
    assert Counter(clip.label for clip in clips) == {
        "neutral": 10, "happiness": 10, "anger": 5, "sadness": 5, "frustration": 1, "fear": 1, "surprise": 1,
        "disgust": 1,
    }  # fmt: skip
    assert Counter(clip.speaker for clip in clips) == {"Ses01": 10, "Ses02": 6, "Ses03": 6, "Ses04": 6, "Ses05": 6}
    assert all(Path(clip.path).is_file() and clip.split is None for clip in clips)
    found = {(clip.path, clip.label, clip.speaker) for clip in clips}
    wav = "sentences/wav"
    assert found >= {
        (f"{root}/Session1/{wav}/Ses01F_impro01/Ses01F_impro01_F000.wav", "neutral", "Ses01"),
        (f"{root}/Session1/{wav}/Ses01M_impro05a/Ses01M_impro05a_F001.wav", "disgust", "Ses01"),
        (f"{root}/Session3/{wav}/Ses03F_impro01/Ses03F_impro01_M000.wav", "anger", "Ses03"),
        (f"{root}/Session5/{wav}/Ses05M_script01_1b/Ses05M_script01_1b_F000.wav", "happiness", "Ses05"),
    }


def test_iemocap_folds_hold_out_whole_sessions(iemocap, capsys):
    run("IEMOCAP")
    assert capsys.readouterr().out.startswith("34 Counter(")
    clips = train.load_corpus("iemocap.csv")
    with pytest.raises(ValueError, match="disgust"):  # one clip of disgust cannot be in three splits
        train.split_clips(clips, (1, 5))
    four = [clip for clip in clips if clip.label in FOUR]  # what --labels does
    assert len(four) == 30
    tested = []
    for fold in range(1, 6):
        split = train.split_clips(four, (fold, 5))
        assert Counter(clip.split for clip in split) == {"train": 18, "dev": 6, "test": 6}
        assert [len(group) for group in speakers(split).values()] == [3, 1, 1]
        tested += speakers(split)["test"]
    assert sorted(tested) == ["Ses01", "Ses02", "Ses03", "Ses04", "Ses05"]


# -- EmoBox -----------------------------------------------------------------------------------------------------------


def write_list(corpus: str, name: str, clips: list[tuple[str, str, str]], fold: int = 1, **more) -> None:
    """One list of EmoBox: clips of (key, wav, emo), in the real fields; beside it the same as JSON and a shadow."""
    same = {"type": "raw", "sample_rate": 16000, "num_frame": 70312.0, "task": "category", "length": 4.4, "channel": 1}
    rows = [
        {"key": f"{corpus}-{key}", "dataset": corpus, "wav": f"downloads/{corpus}/{wav}", "emo": emo} | same | more
        for key, wav, emo in clips
    ]
    stem = f"path/to/EmoBox/data/{corpus}/fold_{fold}/{corpus}_{name}_fold_{fold}"
    write(f"{stem}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(f"{stem}.json", json.dumps({row["key"]: row for row in rows}))
    write(f"path/to/EmoBox/data/{corpus}/fold_{fold}/._{corpus}_{name}_fold_{fold}.jsonl", "\x00\x05\n")


def write_map(corpus: str, labels: dict[str, str], name: str = "label_map.json") -> None:
    write(f"path/to/EmoBox/data/{corpus}/{name}", json.dumps(labels))
    write(f"path/to/EmoBox/data/{corpus}/._{name}", "\x00\x05")


def iemocap_turns(session: int) -> list[tuple[str, str, str]]:
    keys = {f"Ses0{session}F_impro04_F00{n}": emo for n, emo in enumerate(["neu", "hap", "exc", "ang", "sad"])}
    folder = f"Session{session}/sentences/wav/Ses0{session}F_impro04"
    return [(key, f"{folder}/{key}.wav", emo) for key, emo in keys.items()]


def test_emobox_takes_dev_from_the_training_sessions():
    write_map("iemocap", {"neu": "Neutral", "hap": "Happy", "ang": "Angry", "sad": "Sad", "exc": "Happy"})
    write_list("iemocap", "train", [turn for session in (5, 4, 3, 2) for turn in iemocap_turns(session)])
    write_list("iemocap", "test", iemocap_turns(1))
    write_list("iemocap", "test", iemocap_turns(2), fold=2)
    write("path/to/EmoBox/data/iemocap/iemocap.jsonl", '{"key": "iemocap-all", "wav": "all.wav", "emo": "neu"}\n')
    run("EmoBox")
    clips = train.split_clips(train.load_corpus("emobox.csv"))
    assert speakers(clips) == {"train": {"Ses03", "Ses04", "Ses05"}, "dev": {"Ses02"}, "test": {"Ses01"}}
    assert Counter(clip.label for clip in clips) == {"Happy": 10, "Neutral": 5, "Angry": 5, "Sad": 5}
    [clip] = [clip for clip in clips if "Ses02F_impro04_F002" in clip.path]
    path = "path/to/EmoBox/downloads/iemocap/Session2/sentences/wav/Ses02F_impro04/Ses02F_impro04_F002.wav"
    assert clip == train.Clip(path, "Happy", "Ses02", "dev")


UNKNOWN = {r'r"Ses\d\d"': 'r""'}


def test_emobox_without_speakers_takes_every_fourth_clip_of_a_label():
    anger = [(f"03a0{n}Wa", f"wav/03a0{n}Wa.wav", "anger") for n in range(8)]
    neutral = [(f"03a0{n}Nc", f"wav/03a0{n}Nc.wav", "neutral") for n in range(5)]
    write_map("emodb", {"anger": "Angry", "Neutral": "Neutral"})  # the real map has no "neutral"
    write_list("emodb", "train", [*neutral, *reversed(anger)], fold=2)
    test = [("16a01Wa", "wav/16a01Wa.wav", "anger"), ("16a01Na", "wav/16a01Na.wav", "neutral")]
    write_list("emodb", "test", test, fold=2)
    other = '{"key": "emodb-03a02Wb", "audio": "downloads/emodb/wav/03a02Wb.wav", "label": "anger"}\n'
    write("path/to/EmoBox/data/emodb/fold_2/emodb_train_fold2.jsonl", other)  # lies beside the lists, in other fields
    run("EmoBox", UNKNOWN | {'"iemocap", 1': '"emodb", 2'})
    clips = train.split_clips(train.load_corpus("emobox.csv"))
    split = {Path(clip.path).stem: clip.split for clip in clips}
    assert {name for name in split if split[name] == "dev"} == {"03a00Wa", "03a04Wa", "03a00Nc", "03a04Nc"}
    assert {name for name in split if split[name] == "test"} == {"16a01Wa", "16a01Na"}
    assert Counter(clip.label for clip in clips) == {"Angry": 9, "neutral": 6} and len(split) == 15
    assert {clip.speaker for clip in clips} == {None}


def test_emobox_parts_of_a_long_file_are_refused():
    parts = [(f"m000{n}-angry", "pavoque-angry.flac", "angry") for n in range(8)]
    write_list("pavoque", "train", parts[:7], start_time=0.0, end_time=4.46)
    write_list("pavoque", "test", parts[7:], start_time=4.46, end_time=6.2)
    run("EmoBox", UNKNOWN | {'"iemocap", 1': '"pavoque", 1'})
    with pytest.raises(ValueError, match=r"pavoque-angry\.flac"):
        train.split_clips(train.load_corpus("emobox.csv"))


# -- MSP-Podcast ------------------------------------------------------------------------------------------------------

EIGHT = {"A": "anger", "S": "sadness", "H": "happiness", "U": "surprise", "F": "fear", "D": "disgust", "C": "contempt",
         "N": "neutral"}  # fmt: skip


def write_podcast(more: list[tuple[str, str, str]] = (), dev: str = "Development") -> None:
    """One clip of each letter in each set, the first two of unknown speakers; `more` clips: letter, speaker, set."""
    rows = []
    for podcast, part in enumerate(["Train", dev, "Test1", "Test2", "Test3"]):
        letters = enumerate("ASHUFDCNOX")
        rows += [(letter, "Unknown" if n < 2 else f"{100 * podcast + n}", part) for n, letter in letters]
    lines = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for n, (letter, speaker, part) in enumerate([*rows, *more]):
        lines.append(f"MSP-PODCAST_0001_{n:04}.wav,{letter},2.2,4.0,2.6,{speaker},Male,{part}")
    write("path/to/MSP-Podcast/Labels/labels_consensus.csv", "\r\n".join(lines) + "\r\n", "utf-8-sig")


@pytest.mark.parametrize("dev", ["Development", "Validation"])
def test_msp_podcast(capsys, dev):
    write_podcast(dev=dev)
    run("MSP-Podcast")
    assert capsys.readouterr().out.startswith("24 Counter(")
    clips = train.split_clips(train.load_corpus("msp-podcast.csv"))
    for podcast, split in enumerate(["train", "dev", "test"]):
        found = [clip for clip in clips if clip.split == split]
        assert [clip.label for clip in found] == list(EIGHT.values())
        assert [clip.speaker for clip in found] == [None, None, *(f"{100 * podcast + n}" for n in range(2, 8))]
    assert clips[0] == train.Clip("path/to/MSP-Podcast/Audios/MSP-PODCAST_0001_0000.wav", "anger", None, "train")
    assert clips[-1] == train.Clip("path/to/MSP-Podcast/Audios/MSP-PODCAST_0001_0027.wav", "neutral", "207", "test")


# -- a folder for each label ------------------------------------------------------------------------------------------


def write_folders(*names: str) -> None:
    for name in names:
        write(f"path/to/folders/{name}")


def test_folders(capsys):
    write_folders(
        "anger/anna_01.wav", "anger/anna_02.WAV", "anger/ben/01.wav", "anger/cleo/day_1/01.flac",
        "neutral/anna_01.wav", "neutral/ben/01.wav", "neutral/cleo_1_2.mp3",
        "anger/._anna_01.wav", "anger/ben/._01.wav", "anger/.trash/anna_07.wav",
        "__MACOSX/anger/._anna_01.wav", ".cache/anna_01.wav",
        "anger/notes_1.txt", "anna_readme.wav",
    )  # fmt: skip
    run("A folder for each label")
    assert capsys.readouterr().out == (
        "7 Counter({'anger': 4, 'neutral': 3}) Counter({'anna': 3, 'ben': 2, 'cleo': 2})\n"
    )
    clips = train.load_corpus("folders.csv")
    found = {(clip.path.removeprefix("path/to/folders/"), clip.label, clip.speaker) for clip in clips}
    assert found == {
        ("anger/anna_01.wav", "anger", "anna"), ("anger/anna_02.WAV", "anger", "anna"),
        ("anger/ben/01.wav", "anger", "ben"), ("anger/cleo/day_1/01.flac", "anger", "cleo"),
        ("neutral/anna_01.wav", "neutral", "anna"), ("neutral/ben/01.wav", "neutral", "ben"),
        ("neutral/cleo_1_2.mp3", "neutral", "cleo"),
    }  # fmt: skip
    tested = [speakers(train.split_clips(clips, (fold, 3)))["test"] for fold in (1, 2, 3)]
    assert sorted(map(sorted, tested)) == [["anna"], ["ben"], ["cleo"]]


def test_folders_whose_names_do_not_tell_the_speaker_are_refused():
    write_folders("anger/anna_01.wav", "anger/ben_01.wav", "anger/01.wav")
    run("A folder for each label")
    clips = train.load_corpus("folders.csv")
    assert [clip.speaker for clip in clips] == [None, "anna", "ben"]
    with pytest.raises(ValueError, match=r"anger/01\.wav"):
        train.split_clips(clips, (1, 3))
