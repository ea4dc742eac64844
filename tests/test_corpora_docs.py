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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder; the corpora lie in its `path/to`, so that a block can run as it stands."""
    monkeypatch.chdir(tmp_path)


def run(section: str, manifest: str, changes: dict[str, str] | None = None) -> list[train.Clip]:
    """Runs a section's block as its reader would, after changing what the text says may be changed."""
    [code] = BLOCKS[section]
    for old, new in (changes or {}).items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, section, "exec"), {"__name__": "__main__"})
    return train.load_corpus(manifest)


def write(path: str, text: str = "", encoding: str = "utf-8") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode(encoding))


def speakers(clips) -> dict[str, set]:
    return {split: {clip.speaker for clip in clips if clip.split == split} for split in train.SPLITS}


# -- IEMOCAP ----------------------------------------------------------------------------------------------------------
def write_dialog(dialog: str, turns: dict[str, str]) -> None:
    """A dialogue's labels, with the raters' own lines (one with a Latin-1 byte) between them."""
    session = f"path/to/IEMOCAP/Session{dialog[4]}"
    text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    for turn, label in turns.items():
        text += f"[6.2901 - 8.2357]\t{dialog}_{turn}\t{label}\t[2.5000, 2.5000, 2.5000]\n"
        text += "C-E2:\tAnger;\t()\nC-E3:\tNeutral; Sadness;\t(ang\tblas\u00e9)\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
    write(f"{session}/dialog/EmoEvaluation/{dialog}.txt", text, "latin-1")
    for left_alone in (f"._{dialog}.txt", f"Categorical/{dialog}_e2_cat.txt"):  # macOS's shadows, one rater's labels
        write(f"{session}/dialog/EmoEvaluation/{left_alone}", text.replace("_", "_X"), "latin-1")


def test_iemocap_holds_out_whole_sessions():
    for n in range(1, 6):
        turns = {"F000": "neu", "F001": "xxx", "M000": "ang", "M001": "oth", "M002": "sad", "F002": "hap"}
        write_dialog(f"Ses0{n}F_impro01", turns)
        write_dialog(f"Ses0{n}M_script01_1b", {"F000": "exc", "M000": "neu", "M001": "xxx"})
    write_dialog("Ses01M_impro05a", {"M000": "fru", "M001": "fea", "F000": "sur", "F001": "dis"})
    clips = run("IEMOCAP", "iemocap.csv")
    common = {"neutral": 10, "happiness": 10, "anger": 5, "sadness": 5}
    rare = {"frustration": 1, "fear": 1, "surprise": 1, "disgust": 1}
    assert Counter(clip.label for clip in clips) == common | rare
    path = "path/to/IEMOCAP/Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_F000.wav"
    assert train.Clip(path, "happiness", "Ses05") in clips

    four = [clip for clip in clips if clip.label in common]  # what --labels does
    folds = [speakers(train.split_clips(four, (fold, 5))) for fold in range(1, 6)]
    assert all([len(fold[split]) for split in train.SPLITS] == [3, 1, 1] for fold in folds)
    assert set.union(*(fold["test"] for fold in folds)) == {"Ses01", "Ses02", "Ses03", "Ses04", "Ses05"}


# -- EmoBox -----------------------------------------------------------------------------------------------------------
def write_lists(corpus: str, fold: int, labels: dict[str, str], **lists: list[tuple[str, str]]) -> None:
    """A fold's lists by name, of clips (file, label), with the fields that the block reads; and the map of labels."""
    folder = f"path/to/EmoBox/data/{corpus}"
    write(f"{folder}/label_map.json", json.dumps(labels))
    for name, clips in lists.items():
        lines = ""
        for wav, emo in clips:
            row = {"key": f"{corpus}-{Path(wav).stem}", "wav": f"downloads/{corpus}/{wav}", "emo": emo}
            lines += json.dumps(row) + "\n"
        write(f"{folder}/fold_{fold}/{corpus}_{name}_fold_{fold}.jsonl", lines)


def test_emobox_takes_dev_from_the_training_sessions():
    labels = {"neu": "Neutral", "hap": "Happy", "ang": "Angry", "sad": "Sad", "exc": "Happy"}
    turns = {}
    for n in range(1, 6):
        folder = f"Session{n}/sentences/wav/Ses0{n}F_impro04"
        turns[n] = [(f"{folder}/Ses0{n}F_impro04_F00{i}.wav", emo) for i, emo in enumerate(labels)]
    write_lists("iemocap", 1, labels, train=turns[5] + turns[4] + turns[3] + turns[2], test=turns[1])
    write_lists("iemocap", 2, labels, test=turns[2])
    clips = train.split_clips(run("EmoBox", "emobox.csv"))
    assert speakers(clips) == {"train": {"Ses03", "Ses04", "Ses05"}, "dev": {"Ses02"}, "test": {"Ses01"}}
    assert Counter(clip.label for clip in clips) == {"Happy": 10, "Neutral": 5, "Angry": 5, "Sad": 5}
    path = "path/to/EmoBox/downloads/iemocap/Session2/sentences/wav/Ses02F_impro04/Ses02F_impro04_F004.wav"
    assert train.Clip(path, "Happy", "Ses02", "dev") in clips


def test_emobox_without_speakers_takes_every_fourth_clip_of_a_label():
    training = [(f"wav/03a0{n}Nc.wav", "neutral") for n in range(5)]
    training += [(f"wav/03a0{n}Wa.wav", "anger") for n in reversed(range(8))]
    test = [("wav/16a01Wa.wav", "anger"), ("wav/16a01Na.wav", "neutral")]
    labels = {"anger": "Angry", "Neutral": "Neutral"}  # the real map has no "neutral"
    write_lists("emodb", 2, labels, train=training, test=test)
    changes = {r'r"Ses\d\d"': 'r""', '"iemocap", 1': '"emodb", 2'}
    clips = train.split_clips(run("EmoBox", "emobox.csv", changes))
    split = {Path(clip.path).stem: clip.split for clip in clips}
    assert {name for name in split if split[name] == "dev"} == {"03a00Wa", "03a04Wa", "03a00Nc", "03a04Nc"}
    assert {name for name in split if split[name] == "test"} == {"16a01Wa", "16a01Na"}
    assert Counter(clip.label for clip in clips) == {"Angry": 9, "neutral": 6}
    assert {clip.speaker for clip in clips} == {None}


# -- MSP-Podcast ------------------------------------------------------------------------------------------------------
def test_msp_podcast_leaves_unknown_speakers_empty():
    """One clip of each letter in each set, the first two of unknown speakers."""
    lines = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for podcast, part in enumerate(["Train", "Development", "Test1", "Test2", "Test3"]):
        for n, letter in enumerate("ASHUFDCNOX"):
            speaker = "Unknown" if n < 2 else f"{podcast}{n}"
            lines.append(f"MSP-PODCAST_000{podcast}_{n}.wav,{letter},2.2,4.0,2.6,{speaker},Male,{part}")
    write("path/to/MSP-Podcast/Labels/labels_consensus.csv", "\r\n".join(lines) + "\r\n", "utf-8-sig")
    clips = train.split_clips(run("MSP-Podcast", "msp-podcast.csv"))
    eight = ["anger", "sadness", "happiness", "surprise", "fear", "disgust", "contempt", "neutral"]
    for podcast, split in enumerate(train.SPLITS):
        found = [clip for clip in clips if clip.split == split]
        assert [clip.label for clip in found] == eight
        assert [clip.speaker for clip in found] == [None, None, *(f"{podcast}{n}" for n in range(2, 8))]
    assert len(clips) == 24
    assert clips[0] == train.Clip("path/to/MSP-Podcast/Audios/MSP-PODCAST_0000_0.wav", "anger", None, "train")


# -- a folder for each label ------------------------------------------------------------------------------------------
def test_a_folder_for_each_label():
    expected = {
        "anger/anna_01.wav": "anna", "anger/anna_02.WAV": "anna", "anger/ben/01.wav": "ben",
        "anger/cleo/day_1/01.flac": "cleo", "neutral/anna_01.wav": "anna", "neutral/ben/01.wav": "ben",
        "neutral/cleo_1_2.mp3": "cleo",
    }  # fmt: skip
    hidden = ("anger/._anna_01.wav", "anger/.trash/anna_07.wav", "__MACOSX/anger/._anna_01.wav", ".cache/anna_01.wav")
    for name in (*expected, *hidden, "anger/notes_1.txt", "anna_readme.wav"):
        write(f"path/to/folders/{name}")
    clips = run("A folder for each label", "folders.csv")
    assert sorted(clips, key=str) == sorted(
        [train.Clip(f"path/to/folders/{name}", name.partition("/")[0], who) for name, who in expected.items()], key=str
    )

    write("path/to/folders/anger/01.wav")  # does not tell who speaks
    with pytest.raises(ValueError, match=r"anger/01\.wav"):
        train.split_clips(run("A folder for each label", "folders.csv"))


def test_several_corpora_together():
    names = ["EMO-DB/wav/03a01Wa.wav", "EMO-DB/wav/08a01Tb.wav", "RAVDESS/Actor_03/03-01-05-01-01-01-03.wav"]
    for name in names:
        write(f"path/to/{name}")
    clips = run("Several corpora together", "joined.csv")
    assert [(clip.path, clip.label, clip.speaker) for clip in clips] == [
        (f"path/to/{names[0]}", "anger", "EMO-DB-03"), (f"path/to/{names[1]}", "sadness", "EMO-DB-08"),
        (f"path/to/{names[2]}", "anger", "RAVDESS-03"),
    ]  # fmt: skip


def test_every_block_has_been_run():
    assert DOC.count("```python") == len(BLOCKS) == 5
    assert all(f'run("{section}"' in Path(__file__).read_text(encoding="utf-8") for section in BLOCKS)
