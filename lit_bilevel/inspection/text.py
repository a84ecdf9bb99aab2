"""Makes texts of rows fit to be shown: on one line, in a Markdown table, counted.

    short("two\\nlines", 8)        two lin…
    tally(["7", "7", "8"])       ["7  (×2)", "8"]
    arrow(-12)                     ▼ 12
    table_cell("a|b")              a&#124;b

Left out: HTML, which `page` escapes itself.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable

MARKUP = "\\`*_{}[]()+-!|~"


def short(string: str, characters: int = 70) -> str:
    """One line without control characters, cut."""
    line = "".join(c if c.isprintable() else " " for c in string)
    return line if len(line) <= characters else line[: characters - 1] + "…"


def table_cell(text: str, characters: int = 300) -> str:
    """Text that is safe in a Markdown table: nothing in it is markup."""
    cut = text if len(text) <= characters else text[:characters] + " …"
    escaped = "".join(f"&#{ord(c)};" if c in MARKUP else c for c in html.escape(cut))
    return "<br>".join(escaped.splitlines())


def tally(texts: Iterable[str]) -> list[str]:
    """Each different text once, with how often it came where that was more than once."""
    return [text if count == 1 else f"{text}  (×{count})" for text, count in Counter(texts).items()]


def arrow(places: int) -> str:
    """How far a row moved among all rows, as text."""
    return "0" if places == 0 else f"{'▲' if places > 0 else '▼'} {abs(places):,}"
