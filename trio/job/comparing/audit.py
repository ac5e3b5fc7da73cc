"""Some rows are asked unpruned as well: how often the answer stays the same, without labels.

Rows are chosen by a hash of seed and row, so a run that goes on chooses the same ones. Part of them
is asked unpruned twice, in another batch: that they differ then is no fault of pruning.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trio.engine.request import Result
from trio.job.images.policy import RowError
from trio.job.output.summary import share
from trio.tables import percent
from trio.vqa.intervals import Interval, finite_share_interval, share_interval

REPEATED = 0.25
"""Of the audited rows."""
COLUMNS = (
    "audit_response", "audit_match", "audit_overlap", "audit_top1", "audit_kl",
    "audit_repeat_match", "audit_error",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Which rows are audited."""

    rate: float
    seed: int

    def chooses(self, row: int) -> bool:
        """row: key of an input row."""
        return _uniform(self.seed, "audit", row) < self.rate

    def repeats(self, row: int) -> bool:
        """Of a row that is audited."""
        return _uniform(self.seed, "repeat", row) < REPEATED


def _uniform(seed: int, what: str, row: int) -> float:
    digest = hashlib.blake2b(f"{seed} {what} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def columns_of(
    pruned: Result,
    unpruned: Result | RowError,
    again: Result | RowError | None,
    forced: Result | RowError | None,
    said: tuple[str, str | None],
) -> dict[str, Any]:
    """What `rows/` says of an audited row.

    Args:
        pruned: the answer.
        unpruned: that of the unpruned model.
        again: its answer in another batch, where it was asked twice.
        forced: how likely the unpruned model finds the tokens of the pruned answer.
        said: the text of both answers; None where there is no unpruned one.
    """
    mine, other = said
    if other is None:
        reason = unpruned if isinstance(unpruned, RowError) else getattr(unpruned, "error", None)
        return {"audit_error": f"not auditable: {reason}"}
    assert isinstance(unpruned, Result)
    return {
        "audit_response": other,
        "audit_match": mine == other,
        "audit_overlap": overlap(pruned.token_ids, unpruned.token_ids),
        "audit_top1": _top1(forced),
        "audit_kl": _divergence(unpruned, pruned),
        "audit_repeat_match": _same(unpruned, again),
    }


def overlap(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Tokens in common, whatever their order, over those of the longer answer."""
    longer = max(len(first), len(second))
    return (Counter(first) & Counter(second)).total() / longer if longer else None


def _top1(forced: Result | RowError | None) -> float | None:
    if not isinstance(forced, Result) or not forced.candidate_is_top:
        return None
    (own,) = forced.candidate_is_top
    return sum(own) / len(own)


def _divergence(unpruned: Result, pruned: Result) -> float | None:
    """KL(unpruned || pruned) of the first token's distribution, in nats."""
    before, after = unpruned.first_logprobs, pruned.first_logprobs
    if before is None or after is None:
        return None
    before, after = before.double(), after.double()
    return max(0.0, float((before.exp() * (before - after)).nan_to_num().sum()))


def _same(unpruned: Result, again: Result | RowError | None) -> bool | None:
    if not isinstance(again, Result) or again.finish_reason == "error":
        return None
    mine, other = (one.token_ids or one.candidate_logprobs for one in (unpruned, again))
    return mine == other if unpruned.token_ids else _best(mine) == _best(other)


def _best(logprobs: Sequence[Any]) -> int:
    sums = [sum(own) for own in logprobs]
    return sums.index(max(sums))


def audit_summary(
    rows: Sequence[Mapping[str, Any]], rate: float, seconds: float, *, of_rows: int
) -> dict[str, Any]:
    """What an audit found.

    Args:
        rows: that were chosen, with `picture` and `COLUMNS`.
        rate: of rows that are audited.
        seconds: that engines spent on it.
        of_rows: rows of the run that were answered.

    Returns:
        `agreement`: the share of answers that stay the same, with an interval for the share over
        all answered rows (pictures as clusters, finite population); `noise_floor`: that of the
        unpruned model with itself; means of the other columns; counts.
    """
    audited = [row for row in rows if row["audit_match"] is not None]
    twice = [row for row in audited if row["audit_repeat_match"] is not None]
    return {
        "rate": rate,
        "rows": len(audited),
        "of_rows": of_rows,
        "not_auditable": sum(row["audit_error"] is not None for row in rows),
        "seconds": seconds,
        "agreement": _agreement(audited, of_rows),
        "noise_floor": _noise_floor(twice),
        **{name: _mean(audited, f"audit_{name}") for name in ("overlap", "top1", "kl")},
    }


def _agreement(audited: Sequence[Mapping[str, Any]], population: int) -> dict[str, Any] | None:
    if not audited:
        return None
    same = np.array([row["audit_match"] for row in audited], np.float64)
    bounds = finite_share_interval(same, _pictures(audited), population=population)
    return _share(same, bounds) | {"changed": int((1 - same).sum())}


def _noise_floor(twice: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not twice:
        return None
    same = np.array([row["audit_repeat_match"] for row in twice], np.float64)
    return _share(same, share_interval(same, _pictures(twice)))


def _share(same: np.ndarray, bounds: Interval) -> dict[str, Any]:
    return {"value": float(same.mean()), "interval": list(bounds), "rows": len(same)}


def _pictures(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["picture"] or f"row {n}" for n, row in enumerate(rows)])


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    found = [row[column] for row in rows if row[column] is not None]
    return sum(found) / len(found) if found else None


def described(audit: Mapping[str, Any]) -> str:
    """In a few lines."""
    lines = [f"audit: {audit['rows']} rows, {audit['seconds']:.1f} s"]
    if audit["not_auditable"]:
        lines[0] += f"; {audit['not_auditable']} not auditable (unpruned they do not fit)"
    if (found := audit["agreement"]) is not None:
        floor = audit["noise_floor"]
        beside = "none was asked twice"
        if floor is not None:
            beside = f"{percent(floor['value'], floor['interval'])} of {floor['rows']}"
        same = percent(found["value"], found["interval"])
        lines.append(f"answers as unpruned: {same}; unpruned twice: {beside}")
        means = {
            "tokens in common": share(audit["overlap"]),
            "the unpruned model's own next token": share(audit["top1"]),
            "KL of the first token": None if audit["kl"] is None else f"{audit['kl']:.4f} nats",
        }
        lines.append("; ".join(f"{name} {value}" for name, value in means.items() if value))
    return "\n".join(lines)
