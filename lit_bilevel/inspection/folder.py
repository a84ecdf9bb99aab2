"""The folder `inspection/` of a run: what `WeightInspector` saw, for any logger and for `lit-bilevel inspect`.

    settings.json     settings of the run that differ between runs, as in the tab HParams
    epochs.jsonl      one line an epoch: step, quantiles, mass of the sources, histogram, weights of sampled rows, and
                      with a truth file AUROC, precision and recall, kinds of the sampled rows; where the weights are
                      those of an earlier run, a line before (epoch -1, step 0)
    rows.jsonl        the rows at both ends of the weights now, with their texts
    rounds.jsonl      one line a refinement round: how many answers, how it was judged, what it took
    response_weights.jsonl    what each response that was trained on weighed at the end of its round, by each rule
    refined.jsonl     questions, offline answers and weights of some chosen rows; `responses.jsonl` has the new answers
    *.md              the tables as they are in TensorBoard

Left out: all N weights of every epoch; `weights.parquet` has those of the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_bilevel.files import replace_text


class Inspection:
    """The files of one run's folder; each is written beside its place and then moved there.

    Args:
        folder: `inspection/` in the run folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def epochs(self) -> list[dict[str, Any]]:
        """The epochs so far."""
        return read_lines(self.folder / "epochs.jsonl")

    def rounds(self) -> list[dict[str, Any]]:
        """The refinement rounds so far."""
        return read_lines(self.folder / "rounds.jsonl")

    def response_weights(self) -> list[dict[str, Any]]:
        """What responses weighed at the end of their round."""
        return read_lines(self.folder / "response_weights.jsonl")

    def add_epoch(self, record: Mapping[str, Any]) -> None:
        """Add an epoch; later ones of an interrupted run, which is repeated now, are dropped."""
        earlier = [known for known in self.epochs() if known["step"] < record["step"]]
        self.write("epochs.jsonl", [*earlier, record])

    def write(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of JSON lines."""
        self.write_text(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        replace_text(self.folder / name, text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines; empty where there is none."""
    return list(lines(path))


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after the other; a last line that is still being written is left out."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))
