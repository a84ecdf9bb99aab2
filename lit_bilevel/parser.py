"""The argument parser: errors of one line that name the nearest thing that exists, and help that can be read.

Left out: correcting by itself. A run with a guessed setting is worse than none.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

import lit_bilevel
from lit_bilevel.errors import UserError

TRAINER = "Customize every aspect of training via flags"
UNKNOWN_FLAG = re.compile(r"unrecognized arguments: -*([\w.]+)")
UNKNOWN_KEY = re.compile(r"does not accept option '([\w.]+)'|No action for key \"([\w.]+)\"")
UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
UNKNOWN_CLASS = re.compile(r"dot import path string: (\w+)\s*$")
UNKNOWN_COMMAND = re.compile(r"invalid choice: '([\w-]+)' \(choose from (.*?)\)")


NOTE = """\
What is set last wins: the environment (`{prefix}_{command}__DATA__BATCH_SIZE` is `--data.batch_size`), then every
`--config FILE` in turn, then the options. `--print_config` shows what they come to. A class is
named by its name (`--model.solver OneStep`) and its settings follow (`--model.solver.epsilon 0.01`);
`--model.solver.help OneStep` lists them, and `.help` does so for every other option that takes a class.
"""


class Help(DefaultHelpFormatter):
    """The help of a command without its list of all options in front, and without what `NOTE` says for all of them."""

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None) -> str:
        if prefix is not None:  # asked for the name of a command, not for its help
            return super()._format_usage(usage, actions, groups, prefix)
        return f"usage: {self._prog.replace(' [options]', '')} --config FILE [options]\n\n"

    def _format_action(self, action: Any) -> str:
        hidden = any(name.endswith(".help") for name in action.option_strings)
        return "" if hidden else super()._format_action(action)

    def _format_action_invocation(self, action: Any) -> str:
        lines = super()._format_action_invocation(action).splitlines()
        return "\n".join(line.removeprefix("ARG:   ") for line in lines if not line.lstrip().startswith("ENV:"))


class Parser(LightningArgumentParser):
    """Lightning's parser with short errors and a help that begins with this project's own settings."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings, formatter_class=Help)

    def format_help(self, formatter: Any = None) -> str:
        """The help; the many options of the `Trainer` come last."""
        groups = self._action_groups
        self._action_groups = sorted(groups, key=lambda group: group.title == TRAINER)
        try:
            return super().format_help(formatter)
        finally:
            self._action_groups = groups

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
    match = UNKNOWN_FLAG.search(message) or UNKNOWN_KEY.search(message)
    if match:
        return nearest(next(group for group in match.groups() if group), names)
    match = UNKNOWN_ARGUMENT.search(message)
    if match:
        home, _, name = match[1].rpartition(".")
        kind = getattr(importlib.import_module(home), name)
        return nearest(match[2], inspect.signature(kind).parameters, all_of_them=True)
    match = UNKNOWN_CLASS.search(message)
    if match:
        return nearest(match[1], lit_bilevel.__all__)
    match = UNKNOWN_COMMAND.search(message)
    if not match:
        return ""
    choices = re.findall(r"[\w-]+", match[2])
    return nearest(match[1], choices)


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
