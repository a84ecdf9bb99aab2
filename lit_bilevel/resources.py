"""Files that come with the package, by the names they have in its repository: `configs/…` and `lit_bilevel/toy/…`.

So the commands of the README run in any folder. Left out: any other name; a file that is really there goes first.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# inside of the package where a wheel was installed, beside it in the repository
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def locate(name: str) -> str:
    """The name as it is, or the path of the package's own file where nothing of that name is here."""
    if not Path(name).exists():
        for start, folder in (("configs/", CONFIGS), ("lit_bilevel/toy/", PACKAGE / "toy")):
            own = folder / name.removeprefix(start)
            if name.startswith(start) and own.exists():
                return str(own)
    return name


def locate_configs(arguments: list[str]) -> list[str]:
    """Command-line arguments whose `--config` names are located."""
    result = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, name = argument.partition("=")
        if flag in ("--config", "-c") and equals:
            argument = f"{flag}={locate(name)}"
        elif before in ("--config", "-c"):
            argument = locate(argument)
        result.append(argument)
    return result
