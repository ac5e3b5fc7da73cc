"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """As in ``1 shard`` and ``2 shards``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A share as in ``97.2 % [96.1, 98.0]``; a dash where there is none."""
    if value is None:
        return "–"
    bounds = "" if interval is None else f" [{', '.join(f'{100 * b:.1f}' for b in interval)}]"
    return f"{100 * value:.1f} %{bounds}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table; the first line is its head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
