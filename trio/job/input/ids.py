"""The user's ids, looked at once before a run: which come more than once, and how many are null.

A run goes by its own keys (shard and row), so ids that are not unique harm nothing here; whoever
joins the output with something else wants to know. Only the id column of the shards is read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from trio.errors import UserError, first_line
from trio.job.input.manifest import Manifest, Shard
from trio.job.storage import locate

MOST_ROWS = 64_000_000
# two arrays of eight bytes for each are in memory at the end
MOST_SECONDS = 300.0
# an object store answers one request for every row group
THREADS = 16
EXAMPLES = 5
LONG_ID = 256
# bytes; longer ones are hashed one by one
_SEED = 0x7210
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class IdReport:
    """What the scan found."""

    rows: int
    # looked at, from the first shard on
    complete: bool
    # False where a limit ended the scan before the last row
    duplicates: int
    # rows with an id that an earlier row has
    nulls: int
    # rows without an id
    examples: tuple[str, ...]
    # "id 'x': file.parquet row 7, as in file.parquet row 2"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> IdReport:
        values = json.loads(text)
        return cls(**values | {"examples": tuple(values["examples"])})

    @property
    def warning(self) -> str | None:
        """One line where there is something to warn of, else None."""
        said = []
        if self.duplicates:
            said.append(
                f"{self.duplicates} rows have an id that an earlier row has"
                f" ({'; '.join(self.examples)})"
            )
        if self.nulls:
            said.append(f"{self.nulls} rows have no id")
        if not said:
            return None
        part = "" if self.complete else f" (among the first {self.rows}, more were not looked at)"
        return f"ids: {'; '.join(said)}{part}. The output's column 'row' is unique all the same"


@dataclass(frozen=True, slots=True)
class _Column:
    """The ids of a shard: a number that stands for each, and which are null."""

    shard: Shard
    hashes: _Hashes
    null: npt.NDArray[np.bool_]


def scan(
    manifest: Manifest,
    column: str,
    *,
    limit: int | None = None,
    most_rows: int = MOST_ROWS,
    most_s: float = MOST_SECONDS,
) -> IdReport:
    """Look for ids that come more than once.

    Ids that are integers are compared as such, others by 64-bit hashes: among 64 million rows that
    are all different, the chance of a false report is below one in fifty.

    Args:
        manifest: the input.
        column: name of the id column.
        limit: rows of the run, from the first on; None for all.
        most_rows: stop there.
        most_s: stop after about so many seconds.

    Raises:
        UserError: a shard that cannot be read.
    """
    wanted = manifest.rows if limit is None else min(limit, manifest.rows)
    columns: list[_Column] = []
    rows, deadline = 0, time.monotonic() + most_s
    for found in _columns(manifest, column):
        take = min(len(found.hashes), min(wanted, most_rows) - rows)
        columns.append(_Column(found.shard, found.hashes[:take], found.null[:take]))
        rows += take
        if rows >= min(wanted, most_rows) or time.monotonic() > deadline:
            break
    present = [c.hashes[~c.null] for c in columns]
    everything = np.concatenate(present) if present else np.empty(0, np.uint64)
    given = len(everything)
    del present
    everything.sort()
    again = everything[1:] == everything[:-1]
    return IdReport(
        rows=rows,
        complete=rows == wanted,
        duplicates=int(np.count_nonzero(again)),
        nulls=rows - given,
        examples=tuple(_examples(columns, everything[1:][again], column)),
    )


def _columns(manifest: Manifest, name: str) -> Iterator[_Column]:
    """Columns in input order, read ahead by a few threads."""
    pool = ThreadPoolExecutor(THREADS)
    shards = iter(manifest.shards)
    ahead: list[Future[_Column]] = [
        pool.submit(_read, shard, name) for shard in islice(shards, 2 * THREADS)
    ]
    try:
        while ahead:
            found = ahead.pop(0).result()
            ahead += [pool.submit(_read, shard, name) for shard in islice(shards, 1)]
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def _read(shard: Shard, name: str) -> _Column:
    values = _values(shard, name)
    return _Column(shard, hashes(values), np.asarray(values.is_null()))


def _values(shard: Shard, name: str) -> pa.Array:
    location = locate(shard.path)
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            table = pq.ParquetFile(stream).read(columns=[name], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"{shard.path}: column {name!r} cannot be read ({reason})") from error
    found = table.column(name)
    if pt.is_dictionary(found.type):
        found = found.cast(found.type.value_type)
    return pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], found.type)


def hashes(values: pa.Array) -> _Hashes:
    """A 64-bit number for each value, the same for the same; integers stand for themselves."""
    if isinstance(values, pa.ExtensionArray):
        return hashes(values.storage)
    if pt.is_boolean(values.type):
        return hashes(values.cast(pa.uint8()))
    if pt.is_integer(values.type):
        numbers = np.asarray(pc.fill_null(values, 0))
        return numbers.astype(np.int64 if numbers.dtype.kind == "i" else np.uint64).view(np.uint64)
    if pt.is_null(values.type):
        return np.zeros(len(values), np.uint64)
    if pt.is_floating(values.type) or pt.is_decimal(values.type) or pt.is_temporal(values.type):
        values = values.view(pa.binary(values.type.bit_width // 8))
    text = pc.fill_null(values.cast(pa.large_binary()), b"")
    _, offsets, data = text.buffers()
    ends = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
    starts, lengths = ends[:-1], np.diff(ends)
    out: _Hashes = np.zeros(len(text), np.uint64)
    letters = np.frombuffer(data or b"", np.uint8)
    # A sum of letters times random numbers, one for each place in the text.
    weights = np.random.default_rng(_SEED).integers(0, 1 << 64, LONG_ID, dtype=np.uint64)
    rest = np.flatnonzero(lengths <= LONG_ID)
    for place, weight in enumerate(weights):
        rest = rest[lengths[rest] > place]
        if len(rest) == 0:
            break
        out[rest] += (letters[starts[rest] + place].astype(np.uint64) + np.uint64(1)) * weight
    for row in np.flatnonzero(lengths > LONG_ID).tolist():
        digest = hashlib.blake2b(text[row].as_py(), digest_size=8).digest()
        out[row] = int.from_bytes(digest, "little")
    return out


def _shown(value: pa.Scalar) -> str:
    try:
        return f"{value.as_py()!r:.100}"
    except ValueError:  # Python's times end at microseconds
        return str(value.value)


def _examples(columns: list[_Column], repeated: _Hashes, name: str) -> Iterator[str]:
    """The first few rows whose id an earlier row has, in input order."""
    if len(repeated) == 0:
        return
    first: dict[int, tuple[Shard, int]] = {}
    shown = 0
    for column in columns:
        at = np.searchsorted(repeated, column.hashes).clip(max=len(repeated) - 1)
        hits = np.flatnonzero((repeated[at] == column.hashes) & ~column.null)
        for row in hits.tolist():
            key = int(column.hashes[row])
            if key not in first:
                first[key] = (column.shard, row)
                continue
            shard, earlier = first[key]
            value = _shown(_values(column.shard, name)[row])
            yield (f"id {value}: {column.shard.path} row {row}, as in {shard.path} row {earlier}")
            shown += 1
            if shown == EXAMPLES:
                return
