"""What the README and docs/ tell people to type works."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from string import Template
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
from conftest import refuses, speakers, write

import benchmark_edge
import evaluate
import sdser
import train
from evaluate import Clip

ROOT = Path(__file__).parents[1]
README, CORPORA = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/corpora.md"))
TEXT = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).splitlines()
COMMANDS = [line.partition("#")[0].strip() for line in LINES if re.search(r"python [a-z_]+\.py|torchrun", line)]
RUNS = re.findall(r'^ *run="(.*)"', TEXT, re.MULTILINE)  # flags of train.py that loops share
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "benchmark_edge.py": benchmark_edge}
BLOCKS = {section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
          for section in CORPORA.split("\n## ")[1:]}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder; the corpora lie in its `path/to`, so that a block can run as it stands."""
    monkeypatch.chdir(tmp_path)


def test_python_blocks_run():
    """The first in a folder that holds `sdser.py` alone, the others after it."""
    shutil.copy(ROOT / "sdser.py", ".")
    done = subprocess.run([sys.executable, "-c", PYTHON[0]], capture_output=True, text=True)
    assert done.returncode == 0 and "Prediction(" in done.stdout, done.stderr
    soundfile.write("long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 11 * 16_000 + 9), 16_000)
    exec("\n".join(PYTHON), {})


def test_the_lecture_prints_what_it_says(monkeypatch):
    """Its blocks in turn; the networks have not been fine-tuned, so their numbers differ, and only they."""
    monkeypatch.setattr("matplotlib.pyplot", Mock(subplots=lambda *_, **__: (Mock(), [Mock(), Mock()])), raising=False)
    os.symlink(evaluate.DATA, "data")
    labels = ["anger", "happiness", "neutral", "sadness"]
    clips = evaluate.load_corpus(evaluate.DATA / "emodb")[:8]  # with all labels
    rows = ["path,label,speaker,split", *(f"{clip.path},{clip.label},{clip.speaker},dev" for clip in clips)]
    for run in ("half", "out"):
        sdser.MultiExitSER(labels, train.HUBERT_SMALL, [1, 2, 6], "stats").save_pretrained(run)
        write(f"{run}/split.csv", "\n".join(rows))
    names, lecture = {}, (ROOT / "docs/lecture.md").read_text(encoding="utf-8")
    for code, printed in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", lecture, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        now, then = (re.sub(r"-?\d[^ :)}\n]*( -?\d[\d.,]*)*", "#", text) for text in (out.getvalue(), printed))
        assert now == then
    assert names["by_hand"].item() == pytest.approx(names["loss"].item(), abs=1e-6)


def test_modules_import_only_what_is_below_them():
    """sdser < evaluate < train, and evaluate < benchmark_edge."""
    both = ["sdser", "evaluate"]
    below = {"sdser": [], "evaluate": ["sdser"], "train": both, "benchmark_edge": both}
    for name, allowed in below.items():
        imported = re.findall(r"^ *(?:import|from) (\w+)", Path(ROOT, f"{name}.py").read_text(), re.MULTILINE)
        assert below.keys() & set(imported) <= set(allowed), name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_flags_exist(command):
    name, flags = re.search(r"(\w+\.py)(.*?)(?=$|;|&&|\|\|)", command).groups()
    for run in RUNS if "$run" in flags else [""]:
        values = dict(fold=1, seed=0, fraction=0.1, other="plain")
        values["run"] = Template(run).substitute(values)
        SCRIPTS[name].parse_args(shlex.split(Template(flags).substitute(values)))


def test_all_flags_that_are_named_exist_and_every_block_is_run():
    source = "".join(Path(script.__file__).read_text() for script in SCRIPTS.values())
    named = {re.sub("^--no-", "--", flag) for flag in re.findall(r"`(--[a-z-]+)", TEXT)}
    assert sorted(flag for flag in named if f'"{flag}"' not in source) == []
    tested = {*FOLDERS, *re.findall(r'run\("(.+?)"', Path(__file__).read_text(encoding="utf-8"))}
    assert CORPORA.count("```python") == len(BLOCKS) == 7 and tested == BLOCKS.keys()


# -- manifests: the Python in docs/corpora.md, on small copies of the real layouts, worked out by hand ----------------
def run(section: str, *changes: tuple[str, str]) -> list[Clip]:
    """Runs a section's block as its reader would, after changing what the text says may be changed."""
    [code] = BLOCKS[section]
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, section, "exec"), {"__name__": "__main__"})
    return evaluate.load_corpus(re.search(r'open\("(.+?)", "w"', code)[1])


def write_dialog(dialog: str, turns: dict[str, str]) -> None:
    """A dialogue's labels, with the raters' own lines (one with a Latin-1 byte) between them."""
    text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    for turn, label in turns.items():
        text += f"[6.2901 - 8.2357]\t{dialog}_{turn}\t{label}\t[2.5000, 2.5000, 2.5000]\n"
        text += "C-E2:\tAnger;\t()\nC-E3:\tNeutral; Sadness;\t(ang\tblas\u00e9)\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
    folder = f"path/to/IEMOCAP/Session{dialog[4]}/dialog/EmoEvaluation"
    write(f"{folder}/{dialog}.txt", text, "latin-1")
    for left_alone in (f"._{dialog}.txt", f"Categorical/{dialog}_e2_cat.txt"):  # macOS's shadows, one rater's labels
        write(f"{folder}/{left_alone}", text.replace("_", "_X"), "latin-1")


def test_iemocap_holds_out_whole_sessions():
    for n in range(1, 6):
        turns = {"F000": "neu", "F001": "xxx", "M000": "ang", "M001": "oth", "M002": "sad", "F002": "hap"}
        write_dialog(f"Ses0{n}F_impro01", turns)
        write_dialog(f"Ses0{n}M_script01_1b", {"F000": "exc", "M000": "neu", "M001": "xxx"})
    write_dialog("Ses01M_impro05a", {"M000": "fru", "M001": "fea", "F000": "sur", "F001": "dis"})
    clips = run("IEMOCAP")
    common = {"neutral": 10, "happiness": 10, "anger": 5, "sadness": 5}
    rare = {"frustration": 1, "fear": 1, "surprise": 1, "disgust": 1}
    assert Counter(clip.label for clip in clips) == common | rare
    path = "path/to/IEMOCAP/Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_F000.wav"
    assert Clip(path, "happiness", "Ses05") in clips
    four = [clip for clip in clips if clip.label in common]  # what --labels does
    folds = [speakers(evaluate.split_clips(four, (fold, 5))) for fold in range(1, 6)]
    assert all([len(fold[split]) for split in evaluate.SPLITS] == [3, 1, 1] for fold in folds)
    assert set.union(*(fold["test"] for fold in folds)) == {"Ses01", "Ses02", "Ses03", "Ses04", "Ses05"}


def write_lists(corpus: str, fold: int, labels: dict[str, str], **lists: list[tuple[str, str]]) -> None:
    """A fold's lists by name, of clips (file, label), with the fields that the block reads; and the map of labels."""
    folder = f"path/to/EmoBox/data/{corpus}"
    write(f"{folder}/label_map.json", json.dumps(labels))
    for name, clips in lists.items():
        rows = [dict(key=f"{corpus}-{Path(wav).stem}", wav=f"downloads/{corpus}/{wav}", emo=emo) for wav, emo in clips]
        write(f"{folder}/fold_{fold}/{corpus}_{name}_fold_{fold}.jsonl", "\n".join(map(json.dumps, rows)))


def test_emobox_takes_dev_from_the_training_sessions_or_every_fourth_clip_of_a_label():
    labels = {"neu": "Neutral", "hap": "Happy", "ang": "Angry", "sad": "Sad", "exc": "Happy"}
    turns = {}
    for n in range(1, 6):
        folder = f"Session{n}/sentences/wav/Ses0{n}F_impro04"
        turns[n] = [(f"{folder}/Ses0{n}F_impro04_F00{i}.wav", emo) for i, emo in enumerate(labels)]
    write_lists("iemocap", 1, labels, train=turns[5] + turns[4] + turns[3] + turns[2], test=turns[1])
    write_lists("iemocap", 2, labels, test=turns[2])
    clips = evaluate.split_clips(run("EmoBox"))
    assert speakers(clips) == {"train": {"Ses03", "Ses04", "Ses05"}, "dev": {"Ses02"}, "test": {"Ses01"}}
    assert Counter(clip.label for clip in clips) == {"Happy": 10, "Neutral": 5, "Angry": 5, "Sad": 5}
    assert Clip(f"path/to/EmoBox/downloads/iemocap/{turns[2][4][0]}", "Happy", "Ses02", "dev") in clips
    training = [(f"wav/03a0{n}Nc.wav", "neutral") for n in range(5)]
    training += [(f"wav/03a0{n}Wa.wav", "anger") for n in reversed(range(8))]
    test = [("wav/16a01Wa.wav", "anger"), ("wav/16a01Na.wav", "neutral")]
    labels = {"anger": "Angry", "Neutral": "Neutral"}  # the real map has no "neutral"
    write_lists("emodb", 2, labels, train=training, test=test)
    clips = evaluate.split_clips(run("EmoBox", (r'r"Ses\d\d"', 'r""'), ('"iemocap", 1', '"emodb", 2')))
    names = {split: {Path(clip.path).stem for clip in clips if clip.split == split} for split in evaluate.SPLITS}
    assert names["dev"] == {"03a00Wa", "03a04Wa", "03a00Nc", "03a04Nc"}
    assert names["test"] == {"16a01Wa", "16a01Na"}
    assert Counter(clip.label for clip in clips) == {"Angry": 9, "neutral": 6}
    assert {clip.speaker for clip in clips} == {None}


def test_msp_podcast_leaves_unknown_speakers_empty():
    """One clip of each letter in each set, the first two of unknown speakers."""
    lines = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for podcast, part in enumerate(["Train", "Development", "Test1", "Test2", "Test3"]):
        for n, letter in enumerate("ASHUFDCNOX"):
            speaker = "Unknown" if n < 2 else f"{podcast}{n}"
            lines.append(f"MSP-PODCAST_000{podcast}_{n}.wav,{letter},2.2,4.0,2.6,{speaker},Male,{part}")
    write("path/to/MSP-Podcast/Labels/labels_consensus.csv", "\r\n".join(lines) + "\r\n", "utf-8-sig")
    eight = ["anger", "sadness", "happiness", "surprise", "fear", "disgust", "contempt", "neutral"]
    assert evaluate.split_clips(run("MSP-Podcast")) == [
        Clip(f"path/to/MSP-Podcast/Audios/MSP-PODCAST_000{podcast}_{n}.wav", label, speaker, split)
        for podcast, split in enumerate(evaluate.SPLITS)
        for n, label, speaker in zip(range(8), eight, [None, None, *(f"{podcast}{n}" for n in range(2, 8))])
    ]


FOLDERS = {  # the label and speaker of each file; None for those to be left out
    "A folder for each label": {
        "folders/anger/anna_01.wav": ("anger", "anna"), "folders/anger/anna_02.WAV": ("anger", "anna"),
        "folders/anger/ben/01.wav": ("anger", "ben"), "folders/anger/cleo/day_1/01.flac": ("anger", "cleo"),
        "folders/neutral/anna_01.wav": ("neutral", "anna"), "folders/neutral/ben/01.wav": ("neutral", "ben"),
        "folders/neutral/cleo_1_2.mp3": ("neutral", "cleo"), "folders/anger/._anna_01.wav": None,
        "folders/anger/.trash/anna_07.wav": None, "folders/__MACOSX/anger/._anna_01.wav": None,
        "folders/.cache/anna_01.wav": None, "folders/anger/notes_1.txt": None, "folders/anna_readme.wav": None,
    },
    "A folder for each speaker": {
        "speakers/0001/Angry/train/0001_000351.wav": ("angry", "0001"), "speakers/0001/Angry/._0001_000351.wav": None,
        "speakers/0001/Angry/notes.txt": None, "speakers/0001/Happy/0001_1.wav": ("happy", "0001"),
        "speakers/0001/readme.wav": None, "speakers/bea/Amused/amused_1-28.wav": ("amused", "bea"),
    },
    "Several corpora together": {
        "EMO-DB/wav/03a01Wa.wav": ("anger", "EMO-DB-03"), "EMO-DB/wav/08a01Tb.wav": ("sadness", "EMO-DB-08"),
        "EMO-DB/wav/09a01Tb.wav": ("sadness", "EMO-DB-09"), "EMO-DB/wav/10a01Tb.wav": ("sadness", "EMO-DB-10"),
        "RAVDESS/Actor_03/03-01-05-01-01-01-03.wav": ("anger", "RAVDESS-03"),
    },
}  # fmt: skip


def test_folders():
    """Also those that do not tell speakers, or may be speakers."""
    for section, files in FOLDERS.items():
        for name in files:
            write(f"path/to/{name}")
        expected = [Clip(f"path/to/{name}", *found) for name, found in files.items() if found]
        assert sorted(clip._replace(more={}) for clip in run(section)) == sorted(expected)
    write("path/to/folders/anger/01.wav")
    refuses(r"anger/01\.wav", evaluate.split_clips, run("A folder for each label"))
    for name in ("anna/anger", "anna/joy", "ben/anger", "ben/joy"):
        write(f"path/to/swapped/{name}/01.wav")
    with pytest.raises(SystemExit, match="anger, joy"):
        run("A folder for each label", ("path/to/folders", "path/to/swapped"))


def test_segments_are_cut():
    write("path/to/list.csv", "path,start,end,label,speaker\nlong.wav,0.5,1.25,joy,anna\nlong.wav,2,3,anger,ben\n")
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000)
    soundfile.write("path/to/long.wav", samples, 8000, subtype="FLOAT")
    refuses(r"start.*docs/corpora\.md", evaluate.load_corpus, "path/to/list.csv")
    clips = run("Segments of long recordings")
    assert [(clip.label, clip.speaker) for clip in clips] == [("joy", "anna"), ("anger", "ben")]
    for clip, (first, last) in zip(clips, ((4000, 10_000), (16_000, 24_000)), strict=True):
        assert soundfile.read(clip.path)[0] == pytest.approx(samples[first:last], abs=1e-4)
