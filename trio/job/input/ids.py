"""The user's ids, looked at once before a run: which come more than once, and how many are null.

A run goes by its own keys (shard and row), so ids that are not unique harm nothing here; whoever
joins the output with something else wants to know. Only the id column of the shards is read.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc

from trio.errors import UserError, first_line
from trio.job.input.answers import is_bytes, is_text
from trio.job.input.manifest import Manifest, Shard
from trio.job.input.shard_rows import ShardUnreadable, column_of

MOST_ROWS = 10_000_000
# their ids are in memory, and a table of those that differ: about 250 bytes for each
MOST_SECONDS = 300.0
# an object store answers one request for every row group
THREADS = 16
EXAMPLES = 5


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
    # some of the ids that come more than once

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
                f" ({', '.join(self.examples)})"
            )
        if self.nulls:
            said.append(f"{self.nulls} rows have no id")
        if not said:
            return None
        part = "" if self.complete else f" (among the first {self.rows}, more were not looked at)"
        return f"ids: {'; '.join(said)}{part}. The output's column 'row' is unique all the same"


def scan(
    manifest: Manifest,
    column: str,
    *,
    limit: int | None = None,
    most_rows: int = MOST_ROWS,
    most_s: float = MOST_SECONDS,
) -> IdReport:
    """Look for ids that come more than once.

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
    most, deadline = min(wanted, most_rows), time.monotonic() + most_s
    ends = accumulate(shard.rows for shard in manifest.shards)
    shards = [
        s for s, end in zip(manifest.shards, ends, strict=True) if s.rows and end - s.rows < most
    ]
    tables = [pa.table({"id": pa.nulls(0)})]
    pool = ThreadPoolExecutor(THREADS)
    try:
        for table in pool.map(partial(_read, column), shards):
            tables.append(table)
            if time.monotonic() > deadline:
                break
    finally:
        pool.shutdown(cancel_futures=True)
    ids = pa.concat_tables(tables, promote_options="permissive").column("id").slice(0, most)
    counts = pc.value_counts(ids.drop_null())
    again = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    return IdReport(
        rows=len(ids),
        complete=len(ids) == wanted,
        duplicates=len(ids) - ids.null_count - len(counts),
        nulls=ids.null_count,
        examples=tuple(map(_shown, again[:EXAMPLES])),
    )


def _read(name: str, shard: Shard) -> pa.Table:
    """The ids of a shard, in a type that Arrow counts."""
    try:
        ids = column_of(shard, name)
    except (OSError, ShardUnreadable, pa.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"{shard.path}: column {name!r} cannot be read ({reason})") from error
    if isinstance(ids.type, pa.BaseExtensionType):
        ids = ids.cast(ids.type.storage_type)
    elif pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    elif pa.types.is_decimal(ids.type) and ids.type.bit_width < 128:
        ids = ids.cast(pa.decimal128(ids.type.precision, ids.type.scale))
    if is_text(ids.type) and not pa.types.is_null(ids.type):
        ids = ids.cast(pa.large_string())
    elif is_bytes(ids.type):
        ids = ids.cast(pa.large_binary())
    return pa.table({"id": ids})


def _shown(value: pa.Scalar) -> str:
    try:
        return f"{value.as_py()!r:.100}"
    except (ValueError, OverflowError):  # Python's times end at microseconds and in 9999
        return f"{getattr(value, 'value', value)!s:.100}"
