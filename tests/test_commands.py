"""The table of commands: usage, dispatch, a mistyped name, completion."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess

import pytest

from lit_bilevel.__main__ import COMMANDS, LIGHTNING, main

OWN = [name for name, command in COMMANDS.items() if command.module != LIGHTNING]


def test_the_usage_lists_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", OWN)
def test_a_command_has_a_help_under_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lit-bilevel {name} ")
    assert importlib.import_module(COMMANDS[name].module).parser().prog == f"lit-bilevel {name}"


def test_a_mistyped_command_is_answered_with_the_nearest(capsys):
    assert main(["selct"]) == 2
    assert "did you mean `select`?" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab (the extra `completion`) is not installed")
def test_bash_completes_every_command_and_its_options(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--print_completion=shtab-bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    ask = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_lit_bilevel; echo "${COMPREPLY[@]}"'
    asked = {"va": "validate", "comp": "compare", "fit --data.batch": "--data.batch_size", "select --ke": "--keep"}
    for words, answer in asked.items():
        command = f"source {script}; COMP_WORDS=(lit-bilevel {words}); {ask}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert answer in done.stdout.split(), done.stderr
