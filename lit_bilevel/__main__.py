"""The console entry: quick answers first, heavy imports only for real work."""

from __future__ import annotations

import sys

from lit_bilevel.version import __version__

USAGE = """\
usage: lit-bilevel COMMAND [options]

Fine-tune a language model on data you do not trust, guided by a small trusted validation set.

commands:
  fit        learn data weights and the policy; writes the run folder
  validate   loss on the monitor part of the validation file
  test       loss on the test file, of a checkpoint
  predict    generate answers to the test prompts
  score      what one pass of a policy says of every pool row, before training
  select     keep the best-weighted rows of a pool, as a new file
  inspect    what a run found, on the terminal and as one HTML file
  diagnose   whether the validation set is large and clean enough to learn weights from

  lit-bilevel COMMAND --help     options of a command
  lit-bilevel --version

start here:
  lit-bilevel fit --config configs/curate.yaml --data.pool POOL --data.validation TRUSTED --model.policy.path MODEL
  lit-bilevel fit --config configs/quickstart.yaml      without data of your own: the embedded toy data, in a minute
"""


def main(args: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"lit-bilevel {__version__}\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if arguments[0] == "select":
        from lit_bilevel.commands.select import main as select

        return select(arguments)
    if arguments[0] == "score":
        from lit_bilevel.commands.score import main as score

        return score(arguments)
    if arguments[0] == "inspect":
        from lit_bilevel.commands.inspect import main as inspect

        return inspect(arguments)
    if arguments[0] == "diagnose":
        from lit_bilevel.comparison.diagnose import main as diagnose

        return diagnose(arguments)
    from lit_bilevel.cli import main as lightning

    return lightning(arguments)


if __name__ == "__main__":
    sys.exit(main())
