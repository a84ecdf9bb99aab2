"""The wheel in a clean environment: everything that the commands need is inside, and one version is told everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.files import ROOT, read_jsonl

from lit_bilevel.resources import locate, locate_configs
from lit_bilevel.version import __version__


def test_the_version_is_written_once():
    line = re.compile(rf"version.*{re.escape(__version__)}")
    files = [path for pattern in ("lit_bilevel/**/*.py", "scripts/*", "*.toml") for path in ROOT.glob(pattern)]
    written = [path.relative_to(ROOT).as_posix() for path in files if path.is_file() and line.search(path.read_text())]
    assert written == ["lit_bilevel/version.py"]
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_own_files_are_found_from_anywhere(tmp_path, monkeypatch):
    names = [
        "configs/quickstart.yaml",
        "configs/strategies/ddp.yaml",
        "lit_bilevel/toy/pool.jsonl",
        "lit_bilevel/toy/model",
    ]
    assert [locate(name) for name in names] == names
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert Path(locate(name)).samefile(ROOT / name)
    for name in ("configs/none.yaml", "lit_bilevel/toy/none", "pool.jsonl", "elsewhere/configs/quickstart.yaml"):
        assert locate(name) == name
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("")
    assert locate(names[0]) == names[0]
    found = locate_configs(["fit", "--config", names[1], f"--config={names[1]}", "--data.pool", names[2]])
    assert found == ["fit", "--config", locate(names[1]), f"--config={locate(names[1])}", "--data.pool", names[2]]


def test_the_repository_holds_no_links():
    """A zip file or a checkout on Windows would not keep them."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is not a git repository")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "BORROW": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "wheel.sh"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where, version = done.stdout.splitlines()[:2]
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert version == f"lit-bilevel {__version__}"
    assert len(read_jsonl(tmp_path / "elsewhere" / "kept.jsonl")) == 2000
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert [path.name for path in (tmp_path / "dist").glob("*.tar.gz")] == [f"lit_bilevel-{__version__}.tar.gz"]
    assert wheel.name.startswith(f"lit_bilevel-{__version__}-")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    data = [p for pattern in ("toy/*.jsonl", "toy/model/*", "py.typed") for p in (ROOT / "lit_bilevel").glob(pattern)]
    wanted = {path.relative_to(ROOT).as_posix() for path in [*(ROOT / "lit_bilevel").rglob("*.py"), *data]}
    wanted |= {f"lit_bilevel/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert wanted <= names, wanted - names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]
