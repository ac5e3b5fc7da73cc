"""One pass over the rows of a run: distributions, extremes, errors, and how sure right answers are.

INPUT ``rows/``, a batch at a time; OUTPUT ``RowFigures``, whose size does not depend on the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from trio.errors import UserError
from trio.job.comparing.compared import UNPRUNED
from trio.report.found_run import FoundRun, naming_the_damaged
from trio.report.histogram import Histogram

BATCH = 1 << 15
EXAMPLES = 3
"""Of each kind of error."""
EXTREMES = 5
KINDS = 40
"""Of errors, that examples are kept of."""
STAGES = 8
"""That means are drawn of; the last one and the count are those of all stages."""
MARGIN_EDGES = np.array([0, 0.1, 0.25, 0.5, 1, 2, 4, 8, np.inf])
"""Of the distance to the second-best candidate [nats]."""
CERTAINTY_EDGES = np.linspace(0, 1, 11)
"""Of the geometric mean of the answer tokens' probabilities."""
TEXTS = ("row", "prompt_number", "setting", "id", "prompt", "response", "error")
NUMBERS = (
    "visual_tokens", "visual_tokens_encoder", "retention", "prompt_tokens", "output_tokens",
    "latency_s", "logprob_mean", "margin", "score",
)  # fmt: skip
ORDERS = (
    ("lowest retention", "retention", False),
    ("highest retention", "retention", True),
    ("longest answers", "output_tokens", True),
    ("slowest", "latency_s", True),
)
"""Extremes: heading, column, and whether the largest come first."""
Key = tuple[int, int, int]
"""Row, number of the prompt, number of the setting."""


@dataclass(kw_only=True, slots=True)
class Sureness:
    """Of answers by how sure the model was: how many are right, or as the unpruned model's."""

    of: str
    """`margin` or `logprob_mean`."""
    n: dict[str, np.ndarray] = field(default_factory=dict)
    """By what is asked (`score`, `audit`, `compare`), rows of each bin, `[B]`."""
    hits: dict[str, np.ndarray] = field(default_factory=dict)
    """Sums of what each row is worth, 0 to 1, `[B]`."""

    @property
    def edges(self) -> np.ndarray:
        """Of the bins, `[B + 1]`."""
        return MARGIN_EDGES if self.of == "margin" else CERTAINTY_EDGES

    def add(self, name: str, sure: np.ndarray, worth: np.ndarray) -> None:
        """Add rows, `[R]`; those without one of the two are left out."""
        there = np.isfinite(sure) & np.isfinite(worth)
        bins = len(self.edges) - 1
        places = np.clip(np.searchsorted(self.edges, sure[there], "right") - 1, 0, bins - 1)
        for sums, weights in ((self.n, None), (self.hits, worth[there])):
            made = np.bincount(places, weights=weights, minlength=bins)
            sums[name] = sums.get(name, np.zeros(bins)) + made


@dataclass(kw_only=True, slots=True)
class SettingFigures:
    """Of the rows of one setting."""

    sureness: Sureness
    before: Histogram = field(default_factory=Histogram)
    """Visual tokens from the encoder."""
    after: Histogram = field(default_factory=Histogram)
    """Visual tokens after the last stage."""
    retention: Histogram = field(default_factory=lambda: Histogram(step=0.001))
    prompts: Histogram = field(default_factory=Histogram)
    """Tokens of prompts, with all visual tokens."""
    answers: Histogram = field(default_factory=Histogram)
    """Tokens of answers."""
    latency: Histogram = field(default_factory=lambda: Histogram(per_decade=100))
    """Seconds."""
    stage_sums: np.ndarray = field(default_factory=lambda: np.zeros(STAGES))
    stage_rows: np.ndarray = field(default_factory=lambda: np.zeros(STAGES))
    entered: float = 0.0
    """Sum of the visual tokens that enter the decoder."""
    entered_rows: int = 0

    @property
    def by_stage(self) -> list[float]:
        """Mean visual tokens: of the encoder, of what enters the decoder, after each stage."""
        if not self.before.n or not self.entered_rows:
            return []
        found = [self.before.mean or 0.0, self.entered / self.entered_rows]
        there = self.stage_rows > 0
        return found + (self.stage_sums[there] / self.stage_rows[there]).tolist()


@dataclass(kw_only=True, slots=True)
class RowFigures:
    """Of all rows that are there."""

    rows: int = 0
    settings: Sequence[SettingFigures]
    error_examples: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """By kind, with the columns `TEXTS`."""
    extremes: dict[str, list[tuple[float, Mapping[str, Any]]]] = field(default_factory=dict)
    """By heading, the value and the row."""
    of_gallery: dict[Key, Mapping[str, Any]] = field(default_factory=dict)
    """Latency and number of stages of the rows that the gallery shows."""


def row_figures(
    found: FoundRun, shown: Collection[Key] = (), kinds: Collection[str] = ()
) -> RowFigures:
    """Read the rows of a run.

    Args:
        found: the run.
        shown: rows of the gallery.
        kinds: of errors, that examples are wanted of; empty: the first `KINDS`.

    Raises:
        UserError: a file is damaged, or has rows of a setting without a name.
        OSError: a file went meanwhile, or the storage does not answer.
    """
    with naming_the_damaged(found, found.rows):
        return _figures(found, shown, kinds)


def _figures(found: FoundRun, shown: Collection[Key], kinds: Collection[str]) -> RowFigures:
    dataset = _dataset(found)
    of = "margin" if "margin" in dataset.schema.names else "logprob_mean"
    made = RowFigures(settings=[SettingFigures(sureness=Sureness(of=of)) for _ in found.names])
    scan = _Scan(found, made, dataset.schema.names, shown, kinds)
    for batch in _complete(dataset, scan.columns, len(found.names)):
        scan.add(batch)
    scan.finish(dataset)
    return made


def _dataset(found: FoundRun) -> ds.Dataset:
    if not found.rows:
        return ds.dataset(pa.table({"row": pa.array([], pa.int64())}))
    return ds.dataset(list(found.rows), filesystem=found.output.filesystem, format="parquet")


def _batches(dataset: ds.Dataset, columns: Sequence[str], **options: Any) -> Iterator[pa.Table]:
    """Little is read ahead: rows may be wide."""
    for batch in dataset.to_batches(
        columns=list(columns), batch_size=BATCH, batch_readahead=2, fragment_readahead=1, **options
    ):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _complete(dataset: ds.Dataset, columns: Sequence[str], settings: int) -> Iterator[pa.Table]:
    """Batches that hold all settings of a prompt, which stand one after the other."""
    left: pa.Table | None = None
    for table in _batches(dataset, columns):
        table = table if left is None else pa.concat_tables([left, table]).combine_chunks()
        last = np.flatnonzero(table["setting"].to_numpy() == settings - 1)
        cut = int(last[-1]) + 1 if len(last) else 0
        left = table.slice(cut)
        if cut:
            yield table.slice(0, cut)
    if left is not None and left.num_rows:
        yield left


class _Scan:
    """The pass."""

    def __init__(
        self,
        found: FoundRun,
        made: RowFigures,
        there: Sequence[str],
        shown: Collection[Key],
        kinds: Collection[str],
    ) -> None:
        self._made = made
        self._unpruned = found.names.index(UNPRUNED) if UNPRUNED in found.names else None
        self._compares = self._unpruned is not None and len(found.names) > 1
        wanted = ["row", "prompt_number", "setting", "error", "visual_tokens_stages", "audit_match"]
        wanted += [*NUMBERS, *(["response"] if self._compares else [])]
        self.columns = [name for name in wanted if name in there]
        self._shown = set(shown)
        self._shown_rows = np.array(sorted({key[0] for key in shown}), np.int64)
        self._kinds = frozenset(kinds)
        self._errors: dict[str, list[Key]] = {}
        self._shortest = np.inf
        self._best: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, table: pa.Table) -> None:
        self._made.rows += table.num_rows
        keys = np.stack(
            [
                table[name].to_numpy().astype(np.int64)
                for name in ("row", "prompt_number", "setting")
            ],
            axis=1,
        )
        if (most := int(keys[:, 2].max())) >= len(self._made.settings):
            raise UserError(
                f"rows/ has rows of setting {most}, but statistics and run.yaml name"
                f" {len(self._made.settings)}: put those of the run back from a copy"
            )
        numbers = {name: _numbers(table, name) for name in NUMBERS}
        stages, last, count = _stages(table)
        last = np.where(count > 0, last, numbers["visual_tokens_encoder"])
        for number, one in enumerate(self._made.settings):
            mine = keys[:, 2] == number
            if mine.any():
                _add_setting(
                    one, {n: v[mine] for n, v in numbers.items()}, stages[mine], last[mine]
                )
                for name, worth in self._worths(table, keys, numbers["score"], number):
                    one.sureness.add(name, _sure(one.sureness.of, numbers)[mine], worth[mine])
        self._note_errors(table, keys)
        lengths = numbers["output_tokens"]
        self._shortest = min(self._shortest, np.nanmin(lengths, initial=np.inf))
        # What keeps all is no extreme of pruning.
        pruned = keys[:, 2] != (-1 if self._unpruned is None else self._unpruned)
        numbers["retention"] = np.where(pruned, numbers["retention"], np.nan)
        for heading, column, largest in ORDERS:
            self._note_extremes(heading, numbers[column] * (-1 if largest else 1), keys)
        self._note_gallery(keys, numbers["latency_s"], count)

    def _worths(
        self, table: pa.Table, keys: np.ndarray, score: np.ndarray, number: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        """What there is to hold sureness against."""
        yield "score", score
        if "audit_match" in table.column_names:
            yield "audit", _numbers(table, "audit_match")
        if self._compares and number != self._unpruned:
            yield "compare", self._as_unpruned(table, keys)

    def _as_unpruned(self, table: pa.Table, keys: np.ndarray) -> np.ndarray:
        """Whether each answer is that of the unpruned model to the same prompt, `[R]`."""
        assert self._unpruned is not None
        places = np.arange(len(keys)) - keys[:, 2] + self._unpruned
        places = np.clip(places, 0, len(keys) - 1)
        fits = (keys[places][:, :2] == keys[:, :2]).all(axis=1)
        fits &= keys[places][:, 2] == self._unpruned
        responses = table["response"].combine_chunks()
        same = pc.equal(responses, responses.take(pa.array(places)))
        worth = same.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return np.where(fits, worth, np.nan)

    def _note_errors(self, table: pa.Table, keys: np.ndarray) -> None:
        failed = np.flatnonzero(pc.is_valid(table["error"]).to_numpy())
        if not len(failed):
            return
        texts = table["error"].take(pa.array(failed))
        kinds = pc.list_element(pc.split_pattern(texts, ":", max_splits=1), 0).to_pylist()
        for place, kind in zip(failed.tolist(), kinds, strict=True):
            if self._kinds and kind not in self._kinds:
                continue
            mine = self._errors.get(kind, [])
            if mine and mine[-1][:2] == _key(keys[place])[:2]:
                continue  # in another setting
            if len(mine) < EXAMPLES and (mine or len(self._errors) < KINDS):
                self._errors[kind] = [*mine, _key(keys[place])]

    def _note_extremes(self, heading: str, values: np.ndarray, keys: np.ndarray) -> None:
        """Smallest values; of equal ones the first rows."""
        there = np.flatnonzero(np.isfinite(values))
        if len(there) > EXTREMES:
            bound = np.partition(values[there], EXTREMES - 1)[EXTREMES - 1]
            there = there[values[there] <= bound]
            there = there[np.argsort(values[there], kind="stable")[:EXTREMES]]
        before, of_before = self._best.get(heading, (np.zeros(0), np.zeros((0, 3), np.int64)))
        both = np.concatenate([before, values[there]])
        of_both = np.concatenate([of_before, keys[there]])
        order = np.argsort(both, kind="stable")[:EXTREMES]
        self._best[heading] = both[order], of_both[order]

    def _note_gallery(self, keys: np.ndarray, latency: np.ndarray, stages: np.ndarray) -> None:
        if not self._shown:
            return
        for place in np.flatnonzero(np.isin(keys[:, 0], self._shown_rows)).tolist():
            key = _key(keys[place])
            if key in self._shown:
                seconds = float(latency[place])
                self._made.of_gallery[key] = {
                    "latency_s": seconds if np.isfinite(seconds) else None,
                    "stages": int(stages[place]),
                }

    def finish(self, dataset: ds.Dataset) -> None:
        """Fetch the texts of the few rows that are told of."""
        best = {h: (v, k) for h, (v, k) in self._best.items() if len(v) and self._varies(h)}
        wanted = {key for keys in self._errors.values() for key in keys}
        wanted |= {_key(key) for _, keys in best.values() for key in keys}
        found = _texts(dataset, wanted)
        for kind, keys in sorted(self._errors.items()):
            self._made.error_examples[kind] = [found[key] for key in keys if key in found]
        for heading, _, largest in ORDERS:
            if heading in best:
                values, places = best[heading]
                self._made.extremes[heading] = [
                    (float(-value if largest else value), found[_key(key)])
                    for value, key in zip(values, places, strict=True)
                    if _key(key) in found
                ]

    def _varies(self, heading: str) -> bool:
        """Whether rows differ in it: else none is an extreme."""
        column = next(column for name, column, _ in ORDERS if name == heading)
        if column == "output_tokens":
            return bool(-self._best[heading][0][0] > self._shortest)
        if column != "retention":
            return True
        low, high = (self._best[heading][0] for heading, name, _ in ORDERS if name == column)
        return bool(len(low)) and low[0] != -high[0]


def _add_setting(
    one: SettingFigures, numbers: Mapping[str, np.ndarray], stages: np.ndarray, last: np.ndarray
) -> None:
    one.before.add(numbers["visual_tokens"])
    one.after.add(last)
    one.retention.add(numbers["retention"])
    one.prompts.add(numbers["prompt_tokens"])
    one.answers.add(numbers["output_tokens"])
    one.latency.add(numbers["latency_s"])
    entered = numbers["visual_tokens_encoder"]
    there = np.isfinite(entered)
    one.entered += float(entered[there].sum())
    one.entered_rows += int(there.sum())
    there = np.isfinite(stages)
    one.stage_sums[: stages.shape[1]] += np.where(there, stages, 0).sum(axis=0)
    one.stage_rows[: stages.shape[1]] += there.sum(axis=0)


def _sure(of: str, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
    return numbers["margin"] if of == "margin" else np.exp(numbers["logprob_mean"])


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as floats, `[R]`; NaN where it is null or the run has none of that name."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), np.float64)


def _stages(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Visual tokens after each of the first stages, `[R, S]`, NaN where a row has fewer; after the
    last one of all, `[R]`, NaN where there is none; and the number of all, `[R]`."""
    last = np.full(table.num_rows, np.nan)
    if "visual_tokens_stages" not in table.column_names:
        return np.full((table.num_rows, 0), np.nan), last, np.zeros(table.num_rows, np.int64)
    cells = table["visual_tokens_stages"].combine_chunks()
    lengths = np.nan_to_num(pc.list_value_length(cells).to_numpy(zero_copy_only=False))
    lengths = lengths.astype(np.int64)
    out = np.full((table.num_rows, int(min(lengths.max(initial=0), STAGES))), np.nan)
    values = cells.flatten().to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    for place in range(out.shape[1]):
        there = lengths > place
        out[there, place] = values[starts[there] + place]
    there = lengths > 0
    last[there] = values[(starts + lengths - 1)[there]]
    return out, last, lengths


def _texts(dataset: ds.Dataset, wanted: Collection[Key]) -> dict[Key, Mapping[str, Any]]:
    if not wanted:
        return {}
    columns = [name for name in TEXTS if name in dataset.schema.names]
    rows = pa.array(sorted({key[0] for key in wanted}), pa.int64())
    found = {}
    for table in _batches(dataset, columns, filter=ds.field("row").isin(rows)):
        ids = as_text(table["id"])
        for row, name in zip(table.drop_columns("id").to_pylist(), ids, strict=True):
            row["id"] = name
            key = (row["row"], row["prompt_number"], row["setting"])
            if key in wanted:
                found[key] = row
    return found


def as_text(column: pa.ChunkedArray) -> list[str | None]:
    """Ids of any type as text: Python has no value for some of Arrow's times."""
    try:
        return list(column.cast(pa.string()).to_pylist())
    except pa.ArrowException:
        return [None if not cell.is_valid else str(cell) for cell in column]


def _key(key: np.ndarray) -> Key:
    row, prompt, setting = key.tolist()
    return row, prompt, setting
