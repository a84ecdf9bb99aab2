"""Shows progress, and keeps what libraries print in a file.

Left out: progress inside a run; it is in the run's `log.txt` and event files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


def say(text: str) -> None:
    """Show a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Send all that is printed to a file, native code too, and a traceback; show the place of the file on a failure."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.write(traceback.format_exc())
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            say(f"ended early; its output is in {path}")
            raise
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            for number in kept:
                os.close(number)
