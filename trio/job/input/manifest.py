"""The input as planned: numbered shards with sizes, row counts and row groups, pinned for a run.

INPUT paths, directories, patterns or URIs; OUTPUT a ``Manifest`` that is written once as
``manifest.parquet``. Planning reads Parquet footers; a resume compares the pinned manifest with a
listing (paths and sizes) and reads no byte of any shard. A shard that was rewritten with the very
same size is therefore not noticed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import UserError, first_line
from trio.job.input import listing
from trio.job.storage import Location, bare, list_files, locate
from trio.tables import counted

FOOTER_THREADS = 16

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False, metadata={"unit": "bytes"}),
        pa.field("rows", pa.int64(), nullable=False, metadata={"unit": "rows"}),
        pa.field("row_groups", pa.list_(pa.int64()), metadata={"unit": "rows"}),
    ]
)
COMPACT = {
    "use_dictionary": ["row_groups.list.element"],
    "column_encoding": {"path": "DELTA_BYTE_ARRAY"},
}
"""How Parquet is to write it: paths by what they share with the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One input file."""

    number: int
    path: str
    # absolute local path or URI
    size: int
    # bytes
    rows: int
    row_groups: tuple[int, ...]
    # rows of each row group
    unpacked: int = field(default=0, compare=False)
    # bytes without compression, as the footer says; only units are cut by it, which a run that goes
    # on has cut already, so the table does not hold it: 0 then


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def unpacked(self) -> int:
        """Bytes that the rows take in memory, about."""
        return sum(max(shard.size, shard.unpacked) for shard in self.shards)

    def shared_directory(self) -> str | None:
        """What the paths begin with, up to a ``/``, if file names alone do not tell the shards
        apart; None if they do."""
        paths = [bare(shard.path) for shard in self.shards]
        if len({path.rpartition("/")[2] for path in paths}) == len(paths):
            return None
        # By characters, and cut at a "/" then: paths and URIs may come together.
        alike = os.path.commonprefix(paths)  # noqa: RUF071
        return alike[: alike.rfind("/") + 1]

    def to_table(self) -> pa.Table:
        rows = [
            {
                "shard": shard.number,
                "path": shard.path,
                "size": shard.size,
                "rows": shard.rows,
                "row_groups": shard.row_groups,
            }
            for shard in self.shards
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> Manifest:
        kept: dict[Any, Any] = {}
        shards = []
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                groups = _once(kept, tuple(row.pop("row_groups")))
                shards.append(Shard(number=row.pop("shard"), row_groups=groups, **row))
        return cls(shards=tuple(shards))

    def difference(self, found: Sequence[tuple[Location, int]]) -> str | None:
        """What tells a listing of the input (see `expand`) from this one, None when nothing."""
        if len(self.shards) != len(found):
            return f"{counted(len(self.shards), 'shard')} then, {len(found)} now"
        for shard, (location, size) in zip(self.shards, found, strict=True):
            if shard.path != location.uri:
                return f"shard {shard.number} was {shard.path}, is {location.uri}"
            if shard.size != size:
                return f"{shard.path} had {shard.size} bytes, has {size}"
        return None


def tell(text: str) -> None:
    """One line to whoever started the job."""
    print(text, file=sys.stderr, flush=True)


def expand(
    inputs: Sequence[str], output: Location | None = None, say: Callable[[str], None] = tell
) -> list[tuple[Location, int]]:
    """(location, bytes) of every shard that the inputs name, sorted by path within each input.

    What lies below ``output`` is no input: a run that goes on must find the listing it began with.
    Files that are left out and might hold rows are said.

    Raises:
        UserError: an input that names nothing, or one file named twice.
    """
    found: list[tuple[Location, int]] = []
    for uri in inputs:
        location = locate(uri)
        try:
            infos = list_files(location)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"--input {uri}: cannot be listed: {first_line(error)}") from error
        note = ""
        if [i.path for i in infos] != [location.path]:
            if output is not None and output.prefix == location.prefix:
                infos = [i for i in infos if not i.path.startswith(output.path.rstrip("/") + "/")]
            infos, left = listing.split(location, infos)
            note = f": {listing.left_out(left)}" if left else ""
        if not infos:
            raise UserError(
                f"--input {uri}: no Parquet file there{note}; give a .parquet file, a directory"
                " that holds some, a pattern in quotes, or an s3://, gs:// or hf:// URI; images"
                " are put into one first, as trio/job/README.md shows under 'Columns'"
            )
        if note:
            say(f"--input {uri}{note}")
        found += [(location.at(info.path), int(info.size)) for info in infos]
    counts = Counter(location.uri for location, _ in found)
    twice = sorted(uri for uri, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"--input names {twice[0]} twice; name each shard once")
    return found


def inspect(
    inputs: Sequence[str], output: Location | None = None, say: Callable[[str], None] = tell
) -> tuple[Manifest, list[pa.Schema]]:
    """Manifest of the input and the Arrow schema of each shard, from the footers.

    What lies below ``output`` is left out.

    Raises:
        UserError: nothing found, a file that is not Parquet, or no rows at all.
    """
    found = expand(inputs, output, say)
    kept: dict[Any, Any] = {}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        read = list(pool.map(partial(_footer, kept), range(len(found)), found))
    return Manifest(shards=tuple(shard for shard, _ in read)), [schema for _, schema in read]


def _footer(
    kept: dict[Any, Any], number: int, found: tuple[Location, int]
) -> tuple[Shard, pa.Schema]:
    """A shard and its schema."""
    location, size = found
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            file = pq.ParquetFile(stream)
            meta, schema = file.metadata, file.schema_arrow.remove_metadata()
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            shard = Shard(
                number=number,
                path=location.uri,
                size=size,
                rows=meta.num_rows,
                row_groups=_once(kept, tuple(group.num_rows for group in groups)),
                unpacked=sum(group.total_byte_size for group in groups),
            )
            return shard, _once(kept, schema)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"{location.uri}: not a readable Parquet file ({reason})") from error


def _once(kept: dict[Any, Any], value: Any) -> Any:
    """The first value that equals this one. Shards of one data set are alike in schema and often in
    row groups, which are most of what is known of them: they are in memory once."""
    return kept.setdefault(value, value)
