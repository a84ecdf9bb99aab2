"""The argument parser, whose errors are one line and name the nearest thing that exists.

Left out: correcting by itself. A run with a guessed setting is worse than none.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

import lit_bilevel
from lit_bilevel.errors import UserError

UNKNOWN_FLAG = re.compile(r"unrecognized arguments: -*([\w.]+)")
UNKNOWN_KEY = re.compile(r"does not accept option '([\w.]+)'|No action for key \"([\w.]+)\"")
UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
UNKNOWN_CLASS = re.compile(r"dot import path string: (\w+)\s*$")
UNKNOWN_COMMAND = re.compile(r"invalid choice: '(\w+)' \(choose from (.*?)\)")


class Parser(LightningArgumentParser):
    """Lightning's parser with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class, whose message is put into a longer one
            super().error(message, ex)
        source: Any = getattr(ex, "subcommand_parser", None) or self
        hint = suggestion(message, option_names(source))
        text = " ".join(message.split())
        program = source.prog.replace(" [options]", "")
        raise UserError(f"{text}{hint or f' (`{program} --help` lists the options)'}") from ex


def option_names(parser: Any) -> set[str]:
    """Names of all options of a parser and its commands, without dashes."""
    names = {name.lstrip("-") for name in parser._option_string_actions}
    for action in parser._actions:
        choices = action.choices if isinstance(action.choices, dict) else {}
        for command in choices.values():
            names |= option_names(command)
    return names


def suggestion(message: str, names: Iterable[str]) -> str:
    """What to add to an error about a name that does not exist; empty where there is nothing to say."""
    found = UNKNOWN_FLAG.search(message) or UNKNOWN_KEY.search(message)
    if found:
        return nearest(next(group for group in found.groups() if group), names)
    found = UNKNOWN_ARGUMENT.search(message)
    if found:
        home, _, name = found[1].rpartition(".")
        kind = getattr(importlib.import_module(home), name)
        return nearest(found[2], inspect.signature(kind).parameters, all_of_them=True)
    found = UNKNOWN_CLASS.search(message)
    if found:
        return nearest(found[1], lit_bilevel.__all__)
    found = UNKNOWN_COMMAND.search(message)
    return nearest(found[1], [*re.findall(r"\w+", found[2]), "select", "inspect", "diagnose"]) if found else ""


def nearest(name: str, names: Iterable[str], all_of_them: bool = False) -> str:
    """A question for the nearest name; where none is near, the names themselves if `all_of_them`."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # the right last part in the wrong group
        last = name.rpartition(".")[2]
        ends = {other.rpartition(".")[2]: other for other in known}
        close = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.8)]
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; the known names are: {', '.join(known)}" if all_of_them and known else ""
