"""`lit-bilevel --print_completion=shtab-bash`: prints a script that completes every command and its options.

    lit-bilevel --print_completion=shtab-bash > ~/.local/share/bash-completion/completions/lit-bilevel

It needs the extra `completion`. jsonargparse makes the script of Lightning's commands; those with a parser of their own
are added to them for that. Left out: names of classes; the script has those that the parser lists.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import jsonargparse
from lightning.pytorch.cli import LightningArgumentParser

from lit_bilevel.cli import BilevelCLI, tell_errors


class Completing(BilevelCLI):
    """Knows the options of the other commands too, to print a script that completes them.

    Args:
        args: arguments that ask for the script.
        others: parsers of those commands, by their names.
    """

    def __init__(self, args: list[str], others: Mapping[str, argparse.ArgumentParser]):
        self._others = others
        super().__init__(args)

    def _add_subcommands(self, parser: LightningArgumentParser, **settings: Any) -> None:
        super()._add_subcommands(parser, **settings)
        commands: Any = parser._subcommands_action
        for name, own in self._others.items():
            mirror = jsonargparse.ArgumentParser(prog=own.prog, description=own.description)
            for action in own._actions:
                if not isinstance(action, argparse._HelpAction):
                    mirror._add_action(action)
            commands.add_subcommand(name, mirror, help=own.description)


def main(arguments: list[str], others: Mapping[str, argparse.ArgumentParser]) -> int:
    """Print the script; returns the exit status.

    Args:
        arguments: `--print_completion=SHELL`.
        others: parsers of the commands that are not Lightning's, by their names.
    """
    if importlib.util.find_spec("shtab") is not None:
        jsonargparse.set_parsing_settings(add_print_completion_argument=True)
    return tell_errors(functools.partial(Completing, arguments, others), "lit-bilevel", "")
