"""What the README tells people to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest

import benchmark_edge
import evaluate
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {
    language: re.findall(rf"```{language}(?: quick)?\n(.*?)```", README, re.DOTALL) for language in ("python", "sh")
}
QUICK = re.findall(r"```sh quick\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("#")[0] for block in BLOCKS["sh"] for line in block.splitlines()]
RUNS = re.findall(r'^ *run="(.*)"', README, re.MULTILINE)  # flags of train.py that its loops share
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "benchmark_edge.py": benchmark_edge}


def test_the_example_for_other_projects_runs(tmp_path, monkeypatch, capsys):
    [example] = [block for block in BLOCKS["python"] if "save_pretrained" in block]
    assert len(example.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.count("Prediction(") == 2


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.search(r"python [a-z_]+\.py|torchrun", line)])
def test_the_commands_flags_exist(command):
    name, flags = re.search(r"(\w+\.py)(.*?)(?=$|;|&&)", command).groups()
    for run in RUNS if "$run" in flags else [""]:
        values = dict(fold=1, seed=0, fraction=0.1)
        values["run"] = Template(run).substitute(values)
        SCRIPTS[name].parse_args(shlex.split(Template(flags).substitute(values)))


def test_all_flags_that_are_named_exist():
    source = "".join(Path(script.__file__).read_text() for script in SCRIPTS.values())
    for flag in re.findall(r"`(--[a-z-]+)", README):
        name = re.sub("^--no-", "--", flag)
        assert f'"{name}"' in source, flag


@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("block", QUICK)
def test_quick_blocks_run(block, tmp_path):
    for script in ("sdser.py", *SCRIPTS):
        (tmp_path / script).symlink_to(ROOT / script)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_there_are_quick_blocks():
    assert QUICK
