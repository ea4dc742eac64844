"""What the README and docs/ tell people to type works; tests of the manifests are in test_corpora_docs.py."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

import numpy as np
import pytest
import soundfile

import benchmark_edge
import evaluate
import sdser
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).splitlines()
COMMANDS = [line.partition("#")[0].strip() for line in LINES if re.search(r"python [a-z_]+\.py|torchrun", line)]
RUNS = re.findall(r'^ *run="(.*)"', TEXT, re.MULTILINE)  # flags of train.py that loops share
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "benchmark_edge.py": benchmark_edge}


def test_python_blocks_run(tmp_path, monkeypatch):
    """The first in a folder that holds `sdser.py` alone, the others after it."""
    shutil.copy(ROOT / "sdser.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Prediction(" in done.stdout, done.stderr
    monkeypatch.chdir(tmp_path)
    soundfile.write("long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 11 * 16_000 + 9), 16_000)
    names = {}
    for block in PYTHON:
        exec(block, names)


def test_scripts_import_only_what_is_below_them():
    floors = [sdser, *SCRIPTS.values()]
    for i, script in enumerate(floors):
        imported = re.findall(r"^ *(?:import|from) (\w+)", Path(script.__file__).read_text(), re.MULTILINE)
        assert not {module.__name__ for module in floors[i:]} & set(imported)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_flags_exist(command):
    name, flags = re.search(r"(\w+\.py)(.*?)(?=$|;|&&)", command).groups()
    for run in RUNS if "$run" in flags else [""]:
        values = dict(fold=1, seed=0, fraction=0.1)
        values["run"] = Template(run).substitute(values)
        SCRIPTS[name].parse_args(shlex.split(Template(flags).substitute(values)))


def test_all_flags_that_are_named_exist():
    source = "".join(Path(script.__file__).read_text() for script in SCRIPTS.values())
    named = {re.sub("^--no-", "--", flag) for flag in re.findall(r"`(--[a-z-]+)", TEXT)}
    assert sorted(flag for flag in named if f'"{flag}"' not in source) == []
