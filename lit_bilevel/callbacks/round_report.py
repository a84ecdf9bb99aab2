"""Reports a refinement round: a line, figures for the loggers, a table of rows, a file for `lit-bilevel inspect`.

    refine/finished, usable, used    shares of the responses: ended by themselves, with content, trained on
    refine/agreement                 mean share of the other answers to the question that say the same
    refine/new_right, old_right      estimated from the monitor's questions, where the round was judged
    refine/tokens_per_second, share_of_time    of generation with scoring; share of the run since it was started

Left out: whether answers are right; nothing that trains knows. `lit-bilevel inspect` tells, given a truth file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_bilevel.callbacks.progress import say
from lit_bilevel.callbacks.run import is_rehearsal, run_folder
from lit_bilevel.data.responses import is_usable
from lit_bilevel.inspection.folder import Inspection
from lit_bilevel.inspection.text import table_cell, tally
from lit_bilevel.module import LitBilevel
from lit_bilevel.refinement.responses_file import text_of
from lit_bilevel.refinement.trust import Verdict
from lit_bilevel.training.trainer import data_of
from lit_bilevel.types import Response

Responses = Mapping[int, Sequence[Response]]


@dataclass(frozen=True)
class Round:
    """A round that is over.

    Args:
        number: from 1.
        responses: of the chosen rows, used or not.
        used: those of the rows that are trained on.
        verdict: how it was judged, or `None` where it was not.
        tokens: generated, those for the monitor's questions included.
        seconds: that generating and scoring took.
        share_of_time: of the run's time so far that all rounds took.
        keep_unfinished: whether responses count that did not end by themselves.
    """

    number: int
    responses: Responses
    used: Responses
    verdict: Verdict | None
    tokens: int
    seconds: float
    share_of_time: float
    keep_unfinished: bool

    @property
    def left_out(self) -> bool:
        """Whether rows keep the answers that they had."""
        return self.verdict is not None and self.verdict.least is None

    def shares(self) -> dict[str, float]:
        """What loggers are given."""
        every = [response for group in self.responses.values() for response in group]
        count = max(1, len(every))
        shares = {
            "refine/finished": sum(response.finished for response in every) / count,
            "refine/usable": sum(is_usable(response, self.keep_unfinished) for response in every) / count,
            "refine/used": sum(len(group) for group in self.used.values()) / count,
            "refine/agreement": sum(response.agreement for response in every) / count,
            "refine/length": sum(len(response.token_ids) for response in every) / count,
            "refine/rows": float(len(self.used)),
            "refine/tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "refine/share_of_time": self.share_of_time,
        }
        if self.verdict is not None:
            shares |= {"refine/new_right": self.verdict.new_right, "refine/old_right": self.verdict.old_right}
        return shares

    def line(self) -> str:
        """What the run's log says."""
        shares, rows = self.shares(), len(self.responses)
        count = sum(map(len, self.responses.values()))
        kept = rows - len(self.used)
        if self.left_out:
            outcome = "left out, all rows keep the answers they have"
        else:
            outcome = f"{shares['refine/used']:.0%} used for training, {kept} rows keep their offline pair"
        judged = f"; {self.verdict.reason}" if self.verdict is not None else ""
        return (
            f"refinement round {self.number}: {count} responses to {rows} rows, {shares['refine/finished']:.0%} ended"
            f" by themselves, {shares['refine/usable']:.0%} usable; {outcome}{judged};"
            f" {shares['refine/tokens_per_second']:.0f} tokens/s, {self.share_of_time:.0%} of the run's time so far"
        )

    def report(self, trainer: Trainer, module: LitBilevel, rows_shown: int) -> None:
        """Say, log and write; on the first process."""
        say(self.line())
        shares, step = self.shares(), trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(shares, step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("refine/responses", self.markdown(trainer, module, rows_shown), step)
        if not is_rehearsal(trainer):
            verdict = None if self.verdict is None else asdict(self.verdict)
            record: dict[str, Any] = {
                "round": self.number,
                "step": step,
                "seconds": self.seconds,
                "tokens": self.tokens,
            }
            record |= {"verdict": verdict, **{name.removeprefix("refine/"): value for name, value in shares.items()}}
            files = Inspection(run_folder(trainer) / "inspection")
            weights, pool = module.weights.table().cpu(), data_of(trainer).sets["pool"]
            texts = pool.select_columns(["id", "row", "prompt", "response"])
            shown = [texts[row] | {"weight": float(weights[row])} for row in self.choose_rows(rows_shown)]
            files.write("refined.jsonl", shown)
            files.write("rounds.jsonl", [*(known for known in files.rounds() if known["round"] < self.number), record])

    def choose_rows(self, count: int) -> list[int]:
        """So many of the rows, those with new answers that count first."""
        return sorted(self.responses, key=lambda row: (row not in self.used, row))[:count]

    def markdown(self, trainer: Trainer, module: LitBilevel, rows_shown: int) -> str:
        """Some rows with their old and new answers."""
        header = ["id", "question", "offline answer", "its weight", "new answers (agreement)", "counts now"]
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        weights, pool = module.weights.table().cpu(), data_of(trainer).sets["pool"]
        for row in self.choose_rows(rows_shown):
            record = pool[row]
            texts = [(text_of(r, module.tokenizer), r.agreement) for r in self.responses[row]]
            new = "\n".join(tally(f"{text} ({share:.2f})" for text, share in texts))
            now = "as before" if self.left_out else "new" if row in self.used else "offline"
            cells = [table_cell(text) for text in (record["id"], record["prompt"], record["response"])]
            lines.append(f"| {' | '.join(cells)} | {weights[row]:.3g} | {table_cell(new)} | {now} |")
        return "\n".join(lines)
