"""The console entry: answers `--help` and `--version` at once, and imports the heavy libraries only for real work.

One table has every command: usage, dispatch, shell completion and the answer to a mistyped command are made from it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import NamedTuple

from lit_bilevel.version import __version__


class Command(NamedTuple):
    """A command: the module whose `main(arguments)` runs it, and what it does in a few words.

    Modules other than `lit_bilevel.cli` have a `parser()` with the command's own options, too.
    """

    module: str
    what: str


LIGHTNING = "lit_bilevel.cli"
COMMANDS = {
    "fit": Command(LIGHTNING, "learn data weights and the policy; writes the run folder"),
    "validate": Command(LIGHTNING, "loss on the monitor part of the validation file"),
    "test": Command(LIGHTNING, "loss on the test file, of a checkpoint"),
    "predict": Command(LIGHTNING, "generate answers to the test prompts"),
    "score": Command("lit_bilevel.commands.score", "what one pass of a policy says of every pool row, before training"),
    "select": Command("lit_bilevel.commands.select", "keep the best-weighted rows of a pool, as a new file"),
    "inspect": Command("lit_bilevel.commands.inspect", "what a run found, on the terminal and as one HTML file"),
    "compare": Command("lit_bilevel.comparison.command", "methods and seeds on the same data, as one table"),
    "diagnose": Command(
        "lit_bilevel.comparison.diagnose",
        "whether the validation set is large and clean enough to learn weights from",
    ),
}
COMPLETION = "--print_completion"
USAGE = """\
usage: lit-bilevel COMMAND [options]

Fine-tune a language model on data you do not trust, guided by a small trusted validation set.

commands:
{commands}

  lit-bilevel COMMAND --help     options of a command
  lit-bilevel --version

start here:
  lit-bilevel fit --config configs/curate.yaml --data.pool POOL --data.validation TRUSTED --model.policy.path MODEL
  lit-bilevel fit --config configs/quickstart.yaml      without data of your own: the embedded toy data, in a minute
"""


def main(args: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = sys.argv[1:] if args is None else args
    first = arguments[0] if arguments else "help"
    if first == "--version":
        sys.stdout.write(f"lit-bilevel {__version__}\n")
        return 0
    if first in ("-h", "--help", "help"):
        sys.stdout.write(USAGE.format(commands="\n".join(f"  {name:<10} {c.what}" for name, c in COMMANDS.items())))
        return 0
    if first in COMMANDS:
        return importlib.import_module(COMMANDS[first].module).main(arguments)
    if first.partition("=")[0] == COMPLETION:
        own = {name: command.module for name, command in COMMANDS.items() if command.module != LIGHTNING}
        parsers = {name: importlib.import_module(module).parser() for name, module in own.items()}
        return importlib.import_module("lit_bilevel.commands.completion").main(arguments, parsers)
    close = difflib.get_close_matches(first, COMMANDS, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(COMMANDS)}."
    sys.stderr.write(f"lit-bilevel: the first argument {first!r} is no command; {hint}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
