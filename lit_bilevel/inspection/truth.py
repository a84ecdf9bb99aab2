"""Scores learned weights against a truth file: AUROC of clean rows against each kind of corruption.

A truth file (`id`, `corrupted` or `harmful`, `kind`) scores and never trains; no step of a run sees it.
Left out: thresholds. A ranking does not depend on where somebody would cut it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lit_bilevel.errors import UserError


def read_truth(path: str, ids: Sequence[str]) -> list[str]:
    """The kind of corruption of every row, "" where it is clean.

    Args:
        path: a jsonl file with `id`, `corrupted` or `harmful`, and optionally `kind`.
        ids: ids of the pool rows, in the order of the weight table.

    Raises:
        UserError: if the file is missing, has a line that cannot be read, or lacks a row of the pool.
    """
    if not Path(path).is_file():
        raise UserError(f"the truth file {path} does not exist; check `data.truth`.")
    kinds: dict[str, str] = {}
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                key, kind = _judge(line, f"{path} line {number}")
                kinds[key] = kind
    missing = [key for key in ids if key not in kinds]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} rows of the pool, the first is id {missing[0]!r}; give the truth of this"
            " pool, or none (`--data.truth null`)."
        )
    return [kinds[key] for key in ids]


def _judge(line: str, place: str) -> tuple[str, str]:
    """Id and kind of a line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error}); the truth file has one object a line.") from error
    if not isinstance(record, dict) or "id" not in record:
        raise UserError(f"{place}: `id` is missing; the truth of a row is joined to the pool by it, so add it.")
    flag = record.get("corrupted", record.get("harmful"))
    if flag is None:
        raise UserError(f"{place}: neither `corrupted` nor `harmful` is there; add one of them.")
    if flag not in (0, 1):  # so are true and false
        raise UserError(
            f"{place}: {flag!r} says neither that the row is corrupted nor that it is not; write true or false."
        )
    return str(record["id"]), str(record.get("kind") or "corrupted") if flag else ""


def aurocs(weight_N: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Probability that a clean row outweighs a corrupted one: over `all` corrupted rows, and for each kind.

    Args:
        weight_N: [N] weights of the pool.
        kinds: kind of every row, "" for clean ones.

    Returns:
        AUROC by name, ties counted half; empty where there are no clean or no corrupted rows.
    """
    corrupted = torch.tensor([bool(kind) for kind in kinds])
    if corrupted.all() or not corrupted.any():
        return {}
    ranks = weight_N.unique(return_inverse=True)[1].double()  # AUROC looks at order alone, so ranks lose nothing
    ranks = ranks / ranks.max().clamp_min(1)
    result = {"all": float(binary_auroc(ranks, (~corrupted).long()))}
    for kind in sorted({kind for kind in kinds if kind}):
        chosen = torch.tensor([other in ("", kind) for other in kinds])
        result[kind] = float(binary_auroc(ranks[chosen], (~corrupted[chosen]).long()))
    return result


def flat(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores under the names they are logged by: `auroc/all`, `auroc/<kind>`."""
    return {f"auroc/{name}": value for name, value in scores.items()}
