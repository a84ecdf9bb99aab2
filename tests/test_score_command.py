"""`lit-bilevel score`: what it writes and says, refusals, kills, several processes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
from support import ranks
from support.files import read_jsonl

from lit_bilevel.__main__ import main
from lit_bilevel.scores.columns import COLUMNS, FEATURES
from lit_bilevel.scores.parts import PartFiles


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return folder


@pytest.fixture
def asked(small, tmp_path) -> list[str]:
    return [
        *("score", "--config=configs/quickstart.yaml", f"--output={tmp_path / 'scores.parquet'}"),
        *(f"--data.{name}={path}" for name, path in small.items()),
        *("--trainer.accelerator=cpu", "--data.eval_batch_size=8"),
    ]


def test_the_command_writes_the_columns_and_says_what_they_find(asked, tmp_path, small, capsys):
    assert main([*asked, "--model.policy.lora={r: 4, alpha: 4}"]) == 0
    output = capsys.readouterr()
    assert "AUROC" in output.out
    assert "density_ratio" in output.out
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["id", *COLUMNS]
    assert table["id"].to_pylist() == [row["id"] for row in read_jsonl(Path(small["pool"]))]
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob("*.partial"))
    assert not (tmp_path / "run").exists()
    plain = table
    assert main([*asked, "--features"]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["id", *dict.fromkeys((*COLUMNS, *FEATURES))]
    assert table.select(plain.column_names).equals(plain)  # an adapter that is not trained changes nothing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=scores.csv"], "must end in .parquet"),
        (["--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}"], "use `ddp`"),
        (["--data.max_length=4096"], None),
        (["--data.bach_size=3"], "did you mean"),
    ],
)
def test_what_cannot_be_is_refused(asked, flags, message, capsys):
    status = main([*asked, *flags])
    assert status == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


def test_a_pass_that_was_killed_goes_on_to_the_same_file(asked, tmp_path, monkeypatch):
    assert main(asked) == 0
    whole = (tmp_path / "scores.parquet").read_bytes()
    (tmp_path / "scores.parquet").unlink()
    write, done = PartFiles.write, []

    def until_killed(self, part, table):
        if len(done) == 2:
            raise KeyboardInterrupt
        write(self, part, table)
        done.append(part.number)

    monkeypatch.setattr(PartFiles, "write", until_killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(asked)
    assert len(list((tmp_path / "scores.parquet.parts").glob("*.npy"))) == 2
    assert not (tmp_path / "scores.parquet").exists()
    again: list[int] = []
    monkeypatch.setattr(
        PartFiles, "write", lambda self, part, table: again.append(part.number) or write(self, part, table)
    )
    assert main(asked) == 0
    assert not set(again) & set(done)
    assert (tmp_path / "scores.parquet").read_bytes() == whole


def test_parts_of_another_policy_do_not_count(asked, tmp_path, model, monkeypatch):
    assert main([*asked, f"--model.policy.path={model}"]) == 0
    expected = (tmp_path / "scores.parquet").read_bytes()
    write = PartFiles.write

    def killed(self, part, table):
        write(self, part, table)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartFiles, "write", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(asked)
    monkeypatch.setattr(PartFiles, "write", write)
    assert main([*asked, f"--model.policy.path={model}"]) == 0
    assert (tmp_path / "scores.parquet").read_bytes() == expected


@pytest.mark.parametrize(("processes", "known"), [(2, 0), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_several_processes_write_the_same_file(asked, tmp_path, processes, known, monkeypatch):
    """Of four parts three are known in the second case, so two processes have nothing to do."""
    assert main(asked) == 0
    expected = (tmp_path / "scores.parquet").read_bytes()
    if known:
        write, done = PartFiles.write, []

        def until_killed(self, part, table):
            if len(done) == known:
                raise KeyboardInterrupt
            write(self, part, table)
            done.append(part.number)

        monkeypatch.setattr(PartFiles, "write", until_killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main([*asked, f"--output={tmp_path / 'several.parquet'}"])
    flags = [
        *asked,
        "--trainer.strategy=ddp",
        f"--trainer.devices={processes}",
        f"--output={tmp_path / 'several.parquet'}",
    ]
    assert ranks.runs([flags], tmp_path / "logs", processes) == [0]
    assert (tmp_path / "several.parquet").read_bytes() == expected
