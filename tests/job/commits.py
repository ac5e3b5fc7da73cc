"""Units committed as an engine would, for tests of what is made of them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from trio.job.input.units import Unit
from trio.job.output.schema import row_key
from trio.job.output.sink import Sink
from trio.job.output.totals import Totals, merge

NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
STATS: dict[str, Any] = {"actor": "a", "node": "n", "start": NOW, "end": NOW}


def answered(unit: Unit) -> list[dict[str, Any]]:
    base: dict[str, Any] = {
        "response": "x",
        "finish_reason": "stop",
        "actor": "a",
        "node": "n",
        "finished_at": NOW,
    }
    base |= {"prompt_number": 0, "setting": 0}
    keys = (row_key(unit.shard, row) for row in range(unit.start, unit.stop))
    return [{"row": key, "id": f"id{key}", **base} for key in keys]


def totals_of(*units: Unit) -> Totals:
    """Others for each unit; those of two no longer fit 64 bits."""
    return merge(
        Totals(
            rows=unit.stop - unit.start,
            inputs=unit.stop - unit.start,
            images=1 + unit.start,
            error_kinds={"image": 1, f"odd{unit.start}": 2},
            prefill_flops=6 * 10**18,
            decode_s=0.5,
            cuda_graphs={"on": 1} if unit.start else {"off: why": 1},
        )
        for unit in units
    )


def commit(out: Path | str, unit: Unit, run_id: str = "run1") -> None:
    sink = Sink(output=str(out), run_id=run_id, id_type=pa.string())
    sink.commit(unit, answered(unit), [STATS], [totals_of(unit)], print)
