"""The README's own code runs, its commands run as they are written, and the files it names exist."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.files import ROOT, TOY, read_jsonl, write_jsonl

FOLDERS = ("lit_bilevel", "configs", "scripts", "tests", ".assets/results")
README = (ROOT / "README.md").read_text()
PARTS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, flags=re.S | re.M))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in FOLDERS)]
BLOCKS = [
    (part, number, block)
    for part, text in PARTS.items()
    for number, block in enumerate(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.S | re.M))
    if block.startswith("lit-bilevel") and not block.startswith("lit-bilevel compare")
]
LIMITS = {  # of every run, by the environment, so that the commands stay as they are
    "TRAINER__MAX_STEPS": "12",
    "TRAINER__ACCELERATOR": "cpu",
    "DATA__EVAL_BATCH_SIZE": "128",
}


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")  # of the few rows
def test_the_python_example_runs(small, tmp_path, monkeypatch):
    """As it is, on fewer rows."""
    monkeypatch.chdir(tmp_path)  # it makes a run folder
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert (ROOT / "lit_bilevel/toy/pool.jsonl").exists()
    code = code.replace("lit_bilevel/toy/pool.jsonl", small["pool"]).replace(
        "lit_bilevel/toy/validation.jsonl", small["validation"]
    )
    assert small["pool"] in code
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    weights = namespace["weights"]
    assert len(weights) == 90
    assert abs(float(weights.mean()) - 1) < 1e-9
    assert float(weights.std()) > 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    text = (ROOT / document).read_text()
    folders = r"(?<![\w/])((?:scripts|configs|lit_bilevel|tests)/[\w/.]+\.(?:sh|py|yaml|md))"
    for path in re.findall(folders, text.replace("./", "")):
        assert (ROOT / path).exists() or "NAME" in path, path
    for name in re.findall(r"`(\w+\.yaml)`", text):
        assert list((ROOT / "configs").rglob(name)) or name in ("config.yaml", "variants.yaml"), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_somewhere(document):
    """To files beside it, without a place that only one machine has, and to headings that are there."""
    text, home = (ROOT / document).read_text(), (ROOT / document).parent
    for target in re.findall(r"\]\((.*?)\)", text):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        assert not name.startswith("/"), target
        assert (home / name).exists(), target
        if heading:
            lines = re.findall(r"^#+ (.*)$", (home / name).read_text(), flags=re.M)
            assert heading in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines], target


def test_docstrings_cite_sections_that_are_there():
    headings = re.findall(r"^##+ ([\d.]+?)\.? ", (ROOT / "lit_bilevel" / "README.md").read_text(), flags=re.M)
    files = [*(ROOT / "lit_bilevel").rglob("*.py"), *(ROOT / "tests").glob("test_*.py")]
    text = "\n".join(path.read_text() for path in files)
    cited = set(re.findall(r"lit_bilevel/README\.md (\d[\d.]*\d|\d)", text))
    assert cited
    assert cited <= set(headings)
    assert not re.search(r"\bMETHOD sec" r"tion", text)


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 200


def test_the_first_commands_install():
    block = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.S | re.M)[0]
    script, install = block.splitlines()
    assert os.access(ROOT / script.split()[0], os.X_OK)
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0, path
    (extra,) = re.findall(r"\[(\w+)\]", install)
    assert f"{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_the_columns_are_those_of_the_formats_that_are_known():
    from lit_bilevel.data.formats import FORMATS

    for known in FORMATS:
        for column in known.required:
            assert f"`{column}`" in PARTS["Your own data"], column
    table = (ROOT / "configs" / "README.md").read_text().partition("| format |")[2]
    named = re.findall(r"^\| `(\w+)` \| `", table, flags=re.M)
    assert sorted(named) == sorted(known.name for known in FORMATS)


def commands(block: str) -> list[str]:
    """The commands of a block, continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def new_users_folder(folder: Path) -> dict[str, str]:
    """A folder with a user's files in it, and an environment where the commands are installed."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    scripts = {
        "lit-bilevel": f'exec {sys.executable} -m lit_bilevel "$@"',
        "python": f'exec {sys.executable} "$@"',
        "tensorboard": 'test "$1" = --logdir && ls "$2"/events.*',  # the real one does not end
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    pool = [{"instruction": r["prompt"], "output": r["response"]} for r in read_jsonl(TOY / "pool.jsonl")[:200]]
    write_jsonl(folder / "pool.jsonl", pool)
    trusted = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in read_jsonl(TOY / "validation.jsonl")[:60]
    ]
    write_jsonl(folder / "trusted.jsonl", trusted)
    shutil.copy(TOY / "test.jsonl", folder / "held_out.jsonl")
    shutil.copytree(TOY / "model", folder / "my_model")
    limits = {f"LIT_BILEVEL_{command}__{k}": v for command in ("FIT", "TEST", "PREDICT") for k, v in LIMITS.items()}
    path = f"{programs}:{os.environ['PATH']}"
    return {**os.environ, **limits, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(commands: list[str], folder: Path) -> None:
    environment = new_users_folder(folder)
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(("part", "number", "block"), BLOCKS, ids=[f"{part}-{number}" for part, number, _ in BLOCKS])
def test_commands_run_as_written_in_a_fresh_folder(tmp_path, part, number, block):
    run(commands(block), tmp_path)
    if part == "Your own data":
        assert len(read_jsonl(tmp_path / "selected.jsonl")) == 120
        assert read_jsonl(tmp_path / "selected.jsonl")[0].keys() == {"instruction", "output"}
        assert json.loads((tmp_path / "runs/mine/metrics.json").read_text())["test/loss"] > 0
        assert len(read_jsonl(tmp_path / "runs/mine/predictions.jsonl")) == len(read_jsonl(TOY / "test.jsonl"))
    if part == "Self-refining generation":
        for run_folder in ("refined", "refine"):
            assert (tmp_path / "runs" / run_folder / "weights.parquet").exists()
    if part == "Does it help on my data?":
        assert (tmp_path / "scores.parquet").exists()
        assert (tmp_path / "runs/diagnosis/diagnosis.md").exists()


def test_the_blocks_that_are_run_are_all_there_are():
    """A new block is run, too, or it is named here with the reason."""
    ran = [block for _, _, block in BLOCKS]
    every = re.findall(r"^```\w*\n(.*?)^```$", README, flags=re.S | re.M)
    # the installation, the diagram, a comparison with placeholders (see tests/test_compare.py), and Python, which runs
    others = ("./scripts/quickstart.sh", " pool ──►", "lit-bilevel compare --config", "from lightning")
    left_out = [block for block in every if block not in ran]
    assert len(ran) == 4
    assert [other for block in left_out for other in others if block.startswith(other)] == list(others)


def test_the_picture_is_drawn_from_a_comparison(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import pyarrow
    import pyarrow.parquet

    truth = read_jsonl(TOY / "truth.jsonl")
    run_folder = tmp_path / "curate" / "seed0"
    run_folder.mkdir(parents=True)
    columns = {"id": [row["id"] for row in truth], "weight": [2.0 - 2.0 * row["corrupted"] for row in truth]}
    pyarrow.parquet.write_table(pyarrow.table(columns), run_folder / "weights.parquet")
    methods = ("validation_only", "mixing", "curate", "oracle")
    lines = ["method,seed,test_loss", *(f"{name},0,0.{number}" for number, name in enumerate(methods, start=1))]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path), "--output", str(tmp_path / "picture.png")])
    runpy.run_path(str(ROOT / "scripts" / "picture.py"), run_name="__main__")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
