"""What the statistics of the committed units add up to, and how the rate went.

INPUT ``stats/``; OUTPUT ``UnitFigures``. A unit's figures are a few hundred bytes, so all are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from trio.job.output.totals import COUNTS, Totals, from_pairs, merge
from trio.report.found_run import FoundRun, naming_the_damaged

FEWEST, MOST = 6, 120
"""Points of a rate over time; between them two units each, as these end in bursts."""
LINES = 7
"""Engines that are drawn by themselves; the others come together."""
OTHERS = "other engines"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRate:
    """Images that an engine answered over time."""

    name: str
    rate: np.ndarray
    """Images per second between two of `UnitFigures.edges`, `[T]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLine:
    """An engine's share of the work."""

    name: str
    node: str
    rows: int
    images: int
    busy_s: float
    """In encoder, prefill and decode."""
    waiting_s: float
    """For images, or without rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFigures:
    """Of the units that are there."""

    totals: Totals
    by_setting: Sequence[Totals]
    """Of all settings that have a name or statistics."""
    began: float | None
    """When the first unit was begun [s since 1970, UTC]; None where there is none."""
    ended: float | None
    edges: np.ndarray
    """Moments [s since 1970, UTC], `[T + 1]`."""
    rates: Sequence[EngineRate]
    engines: Sequence[EngineLine]
    """The ones with most images first, at most `4 * LINES`."""
    engine_count: int


def unit_figures(found: FoundRun) -> UnitFigures:
    """Read the statistics of a run.

    Raises:
        UserError: a file is damaged.
        OSError: a file went meanwhile, or the storage does not answer.
    """
    with naming_the_damaged(found, found.stats):
        table = _table(found)
    settings = max(len(found.names), (pc.max(table["setting"]).as_py() or 0) + 1)
    by_setting = [
        _totals(table.filter(pc.equal(table["setting"], number)) if table.num_rows else table)
        for number in range(settings)
    ]
    began, ended = _seconds(table, "start"), _seconds(table, "end")
    edges, rates = _rates(table, began, ended)
    engines = _engines(table)
    return UnitFigures(
        totals=merge(by_setting),
        by_setting=by_setting,
        began=float(began.min()) if len(began) else None,
        ended=float(ended.max()) if len(ended) else None,
        edges=edges,
        rates=rates,
        engines=engines[: 4 * LINES],
        engine_count=len(engines),
    )


def _table(found: FoundRun) -> pa.Table:
    """Of committed units; what an older version did not write is left out."""
    if not found.stats:
        return pa.table({name: [] for name in ("unit", "setting", "actor", "node", "start", "end")})
    dataset = ds.dataset(list(found.stats), filesystem=found.output.filesystem, format="parquet")
    wanted = ["unit", "setting", "actor", "node", "start", "end"]
    wanted += [field.name for field in fields(Totals)]
    table = dataset.to_table(columns=[name for name in wanted if name in dataset.schema.names])
    return table.filter(pc.is_in(table["unit"], pa.array(sorted(found.units), pa.string())))


def _totals(table: pa.Table) -> Totals:
    """Sums of Python's numbers: FLOPs of 10⁶ rows and more pass 64 bits."""
    if not table.num_rows:
        return Totals()
    sums = {
        field.name: sum(one or 0 for one in table[field.name].to_pylist())
        for field in fields(Totals)
        if field.name not in COUNTS and field.name in table.column_names
    }
    kinds: Counter[str] = Counter()
    for cell in _cells(table, "error_kinds"):
        kinds.update(from_pairs(cell))
    graphs = Counter(state for state in _cells(table, "cuda_graphs") if state)
    return Totals(error_kinds=kinds, cuda_graphs=graphs, **sums)


def _cells(table: pa.Table, name: str) -> list[Any]:
    return list(table[name].to_pylist()) if name in table.column_names else []


def _seconds(table: pa.Table, name: str) -> np.ndarray:
    if not table.num_rows:
        return np.zeros(0)
    return np.asarray(table[name].cast(pa.int64()).to_numpy() / 1e6)


def _rates(
    table: pa.Table, began: np.ndarray, ended: np.ndarray
) -> tuple[np.ndarray, list[EngineRate]]:
    """An engine's images are spread evenly over the time since the units before. Which of them came
    when is not known, and units end in bursts: those that end within a point are taken together."""
    if not len(began) or ended.max() <= began.min():
        return np.zeros(0), []
    points = min(MOST, max(FEWEST, len(began) // 2))
    edges = np.linspace(began.min(), ended.max(), points + 1)
    width = edges[1] - edges[0]
    images = table["images"].to_numpy() if "images" in table.column_names else np.zeros(len(began))
    coded = pc.dictionary_encode(table["actor"].combine_chunks())
    actors, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    order = np.argsort(-np.bincount(actors, weights=images), kind="stable")
    parts = [(names[place], actors == place) for place in order[:LINES]]
    if len(order) > LINES:
        parts.append((OTHERS, np.isin(actors, order[LINES:])))
    rates = []
    for name, mine in parts:
        done = np.zeros(len(edges))
        for place in _bursts(np.flatnonzero(mine), ended, width):
            begin, end = began[place].min(), ended[place].max()
            past = (edges - begin) / max(end - begin, 1e-6)
            done += np.clip(past, 0, 1) * images[place].sum()
        rates.append(EngineRate(name=name, rate=np.diff(done) / width))
    return edges, rates


def _bursts(places: np.ndarray, ended: np.ndarray, width: float) -> Iterator[np.ndarray]:
    """Parts of `places` in order of `ended`, each within `width` from its first."""
    places = places[np.argsort(ended[places], kind="stable")]
    moments, start = ended[places], 0
    while start < len(places):
        stop = int(np.searchsorted(moments, moments[start] + width, side="right"))
        yield places[start:stop]
        start = stop


def _engines(table: pa.Table) -> list[EngineLine]:
    if not table.num_rows:
        return []
    sums = ("rows", "images", "encode_s", "prefill_s", "decode_s", "preprocess_wait_s", "idle_s")
    for name in set(sums) - set(table.column_names):
        table = table.append_column(name, pa.array([0] * table.num_rows, pa.int64()))
    grouped = table.group_by("actor").aggregate(
        [(name, "sum") for name in sums] + [("node", "max")]
    )
    lines = [
        EngineLine(
            name=row["actor"],
            node=row["node_max"],
            rows=row["rows_sum"],
            images=row["images_sum"],
            busy_s=row["encode_s_sum"] + row["prefill_s_sum"] + row["decode_s_sum"],
            waiting_s=row["preprocess_wait_s_sum"] + row["idle_s_sum"],
        )
        for row in grouped.to_pylist()
    ]
    return sorted(lines, key=lambda line: (-line.images, line.name))
