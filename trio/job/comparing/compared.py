"""Settings that one run asks each row with, as `--compare 1,1/3,fastv:1/9` names them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from trio.errors import UserError
from trio.pruning.method_registry import check_name
from trio.pruning.options import ENCODERS, Pruning
from trio.values import number, text

UNPRUNED, GIVEN = "unpruned", "given"
"""Name of the setting in which nothing is chosen; item that stands for what the other flags say."""
HOW = "write RETENTION, METHOD:RETENTION or given, as 1, 1/9, fastv:1/9 or visionzip+trio:1/9"
_RETENTION = number(above=0, most=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One of the settings."""

    name: str
    pruning: Pruning


def read_compared(value: Any) -> tuple[str, ...]:
    """The items of `--compare`, checked: text with commas, or a list."""
    items = value if isinstance(value, list | tuple) else text(value).split(",")
    found = tuple(str(item).strip() for item in items)
    # Of what the other flags say nothing is known yet: 1/3 and trio:1/3 may be the same.
    is_plain = [compared(item, Pruning(retention=0.5)).name == UNPRUNED for item in found]
    _check([UNPRUNED if p else item for p, item in zip(is_plain, found, strict=True)])
    return found


def compared(item: str, base: Pruning) -> Compared:
    """What an item stands for.

    Args:
        item: `[ENCODER+][METHOD:]RETENTION`; the retention 1 is the unpruned model. Or `given`.
        base: all else, and the method where the item names none.

    Raises:
        UserError: it is not written so.
    """
    if item == GIVEN:
        if base.retention is None and base.schedule is None and base.name != "none":
            return Compared(name=base.name, pruning=base)  # its default is not filled in yet
        how = base.schedule or _fraction(base.retention or 1.0)
        return Compared(name=f"{base.name} {how}" if base.active else UNPRUNED, pruning=base)
    chosen, colon, share = item.rpartition(":")
    try:
        retention = _RETENTION(share)
    except UserError as error:
        raise UserError(f"{item!r}: {error}; {HOW}") from error
    if retention == 1:
        if colon:
            raise UserError(f"{item!r}: at retention 1 nothing is chosen; write 1")
        nothing: dict[str, Any] = {"method": "none", "encoder": "none", "method_options": None}
        return Compared(
            name=UNPRUNED, pruning=replace(base, **nothing, retention=1.0, schedule=None)
        )
    choice: dict[str, Any] = _choice(item, chosen) if colon else {}
    pruning = replace(base, **choice, retention=retention, schedule=None)
    if not pruning.active:
        raise UserError(f"{item!r}: method none chooses nothing; {HOW}")
    return Compared(name=f"{pruning.name} {_fraction(retention)}", pruning=pruning)


def _fraction(retention: float) -> str:
    """As papers write it: 1/9, where it is such."""
    near = Fraction(retention).limit_denominator(64)
    return str(near) if abs(near - retention) < 1e-9 else f"{retention:.4g}"


def _choice(item: str, chosen: str) -> dict[str, Any]:
    """Encoder and method by name."""
    encoder, plus, method = chosen.partition("+")
    if not plus:
        encoder, method = (chosen, "none") if chosen in ENCODERS else ("none", chosen)
    if encoder not in ENCODERS or encoder == method == "none":
        raise UserError(f"{item!r}: encoders are {', '.join(ENCODERS)}; {HOW}")
    check_name(method)
    return {"encoder": encoder, "method": method, "method_options": None}


def settings_compared(items: Sequence[str], base: Pruning) -> tuple[Compared, ...]:
    """All settings, in the order of the items.

    Raises:
        UserError: one is none, one stands twice, or nothing is compared with the unpruned model.
    """
    found = tuple(compared(item, base) for item in items)
    _check([one.name for one in found])
    return found


def _check(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} stands twice among what is compared")
    if UNPRUNED not in names or len(names) < 2:
        raise UserError("compare 1 (the unpruned model) with at least one other, as in 1,1/9")
