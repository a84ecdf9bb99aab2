"""The parser and its help: mistyped names, the environment, configurations on top of each other."""

from __future__ import annotations

import pytest

from lit_bilevel.cli import main
from lit_bilevel.parser import nearest


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--data.batchsize=3"], "did you mean `data.batch_size`?"),
        (["--model.solver.init_args.epsilo=3"], "did you mean `epsilon`?"),
        (["--model.solver=OneStop"], "did you mean `OneStep`?"),
        (["--batch_size=3"], "did you mean `data.batch_size`?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(flags, hint, capsys):
    assert main(["fit", "--config=configs/quickstart.yaml", *flags]) == 2
    message = capsys.readouterr().err
    assert hint in message
    assert message.count("\n") == 1


def test_the_environment_sets_options(monkeypatch, capsys):
    monkeypatch.setenv("LIT_BILEVEL_FIT__DATA__EVAL_BATCH_SIZE", "9")
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/quickstart.yaml", "--print_config"])
    assert "eval_batch_size: 9" in capsys.readouterr().out


def test_nearest():
    assert nearest("fitt", ["fit", "test"]) == "; did you mean `fit`?"
    assert nearest("xyz", ["fit", "test"]) == ""
    assert nearest("xyz", ["fit", "test"], all_of_them=True) == "; the known names are: fit, test"


def test_the_help_of_a_command_begins_with_its_own_settings(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: lit-bilevel fit --config FILE [options]\n\nLearn data weights")
    assert shown.index("--model.solver SOLVER") < shown.index("--data.pool POOL") < shown.index("--trainer.max_epochs")
    assert "ENV:" not in shown
    assert "LIT_BILEVEL_FIT__DATA__BATCH_SIZE" in shown


def test_configs_compose_and_later_ones_win(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("data:\n  batch_size: 7\nmodel:\n  solver: Penalty\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/quickstart.yaml", f"--config={tmp_path / 'mine.yaml'}", "--print_config"])
    shown = capsys.readouterr().out
    assert "batch_size: 7" in shown
    assert "lit_bilevel.Penalty" in shown
    assert "lr: 0.7" in shown  # of the first file
