"""What the README and docs/ tell people to type works; tests of the manifests are in test_corpora_docs.py."""

import os
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
QUICK = re.findall(r"```sh quick\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh(?: quick)?\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition("#")[0] for block in SHELL for line in block.splitlines()]
RUNS = re.findall(r'^ *run="(.*)"', TEXT, re.MULTILINE)  # flags of train.py that loops share
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "benchmark_edge.py": benchmark_edge}


def test_the_example_for_other_projects_runs(tmp_path, monkeypatch, capsys):
    """Beside `sdser.py` alone; then the one for long recordings, with its model."""
    example, windows = PYTHON
    assert len([line for line in example.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    names = {"sdser": sdser}
    exec(example, names)
    assert capsys.readouterr().out.count("Prediction(") == 1
    soundfile.write("long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 11 * 16_000 + 9), 16_000)
    exec(windows, names)
    assert re.fullmatch(r"(0|5|10) s: (angry|calm) \(0\.\d\d\)\n" * 3, capsys.readouterr().out)


def test_what_is_copied_imports_the_method_alone(tmp_path):
    """`sdser.py` in an empty folder; nothing of archives, downloads or manifests among its own imports."""
    shutil.copy(ROOT / "sdser.py", tmp_path)
    own = re.findall(r"^(?:import|from) (\w+)", (tmp_path / "sdser.py").read_text(), re.MULTILINE)
    assert not {
        "zipfile",
        "http",
        "socket",
        "csv",
        "hashlib",
        "torchaudio",
        "tqdm",
        *(s.__name__ for s in SCRIPTS.values()),
    } & set(own)
    done = subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Prediction(label=" in done.stdout, done.stderr


def test_scripts_import_what_is_below_them_alone():
    floors = [sdser, train, evaluate, benchmark_edge]
    for i, script in enumerate(floors):
        imports = re.findall(r"^ *import (\w+)$|^ *from (\w+) import", Path(script.__file__).read_text(), re.MULTILINE)
        above = {module.__name__ for module in floors[i:]}
        assert not above & {name for pair in imports for name in pair}


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.search(r"python [a-z_]+\.py|torchrun", line)])
def test_the_commands_flags_exist(command):
    name, flags = re.search(r"(\w+\.py)(.*?)(?=$|;|&&)", command).groups()
    for run in RUNS if "$run" in flags else [""]:
        values = dict(fold=1, seed=0, fraction=0.1)
        values["run"] = Template(run).substitute(values)
        SCRIPTS[name].parse_args(shlex.split(Template(flags).substitute(values)))


def test_all_flags_that_are_named_exist():
    source = "".join(Path(script.__file__).read_text() for script in SCRIPTS.values())
    for flag in re.findall(r"`(--[a-z-]+)", TEXT):
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
