"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "sh")}
COMMANDS = [line.partition("#")[0] for block in BLOCKS["sh"] for line in block.splitlines()]


def test_the_example_for_other_projects_runs(tmp_path, monkeypatch, capsys):
    [example] = [block for block in BLOCKS["python"] if "save_pretrained" in block]
    assert len(example.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.count("Prediction(") == 2


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if "python train.py" in line or "python evaluate.py" in line]
)
def test_the_commands_flags_exist(command):
    script = re.search(r"python .*?(?=$|;|&&)", command.split("&& ")[-1])[0].replace("$i", "1")
    _, name, *flags = shlex.split(script)
    (train if name == "train.py" else evaluate).parse_args(flags)


def test_all_flags_that_are_named_exist():
    known = "".join(parser.__doc__ or "" for parser in (train, evaluate))
    source = known + Path(train.__file__).read_text() + Path(evaluate.__file__).read_text()
    for flag in re.findall(r"`(--[a-z-]+)", README):
        name = re.sub("^--no-", "--", flag)
        assert f'"{name}"' in source, flag
