"""The one exception for mistakes that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong setting, file or combination; the message says the fact, the cause and the remedy."""


def gathered(title: str, problems: list[str], limit: int = 20) -> UserError:
    """One error for many problems, with the first `limit` of them listed."""
    if len(problems) == 1:
        return UserError(f"{title}: {problems[0]}")
    shown = "".join(f"\n  {problem}" for problem in problems[:limit])
    more = f"\n  … and {len(problems) - limit} more" if len(problems) > limit else ""
    return UserError(f"{title}: {len(problems)} problems{shown}{more}")
