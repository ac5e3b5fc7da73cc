"""The input as planned: numbered shards with sizes, row counts and row groups, pinned for a run.

INPUT paths, directories, patterns or URIs; OUTPUT a ``Manifest`` that is written once as
``manifest.parquet`` and compared on resume. Reads Parquet footers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import UserError
from trio.pipeline.storage import Location, list_files, locate

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def to_table(self) -> pa.Table:
        return pa.Table.from_pydict(
            {
                "shard": [shard.number for shard in self.shards],
                "path": [shard.path for shard in self.shards],
                "size": [shard.size for shard in self.shards],
                "rows": [shard.rows for shard in self.shards],
                "row_groups": [list(shard.row_groups) for shard in self.shards],
            },
            schema=SCHEMA,
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Manifest:
        shards = [
            Shard(
                number=row["shard"],
                path=row["path"],
                size=row["size"],
                rows=row["rows"],
                row_groups=tuple(row["row_groups"]),
            )
            for row in table.to_pylist()
        ]
        return cls(shards=tuple(shards))

    def difference(self, other: Manifest) -> str | None:
        """What tells another listing of the input from this one, None when nothing does."""
        if len(self.shards) != len(other.shards):
            return f"{len(self.shards)} shards then, {len(other.shards)} now"
        for mine, theirs in zip(self.shards, other.shards, strict=True):
            if mine.path != theirs.path:
                return f"shard {mine.number} was {mine.path}, is {theirs.path}"
            if mine != theirs:
                return (
                    f"{mine.path} had {mine.rows} rows in {mine.size} bytes,"
                    f" has {theirs.rows} in {theirs.size}"
                )
        return None


def expand(inputs: Sequence[str], output: Location | None = None) -> list[tuple[Location, int]]:
    """(location, bytes) of every shard that the inputs name, sorted by path within each input.

    What lies below ``output`` is no input: a run that goes on must find the listing it began with.

    Raises:
        UserError: an input that names nothing, or one file named twice.
    """
    found: list[tuple[Location, int]] = []
    for uri in inputs:
        location = locate(uri)
        try:
            infos = list_files(location)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--input {uri}: cannot be listed: {error}") from error
        if [i.path for i in infos] != [location.path]:
            infos = [i for i in infos if i.path.endswith((".parquet", ".pq"))]
            if output is not None and output.prefix == location.prefix:
                infos = [i for i in infos if not i.path.startswith(output.path.rstrip("/") + "/")]
        if not infos:
            raise UserError(
                f"--input {uri}: no Parquet file there; give a .parquet file, a directory that"
                " holds some, a pattern in quotes, or an s3://, gs:// or hf:// URI"
            )
        found += [(location.at(info.path), int(info.size)) for info in infos]
    counts = Counter(location.uri for location, _ in found)
    twice = sorted(uri for uri, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"--input names {twice[0]} twice; name each shard once")
    return found


def inspect(
    inputs: Sequence[str], output: Location | None = None
) -> tuple[Manifest, list[pa.Schema]]:
    """Manifest of the input and the Arrow schema of each shard, from the footers.

    What lies below ``output`` is left out.

    Raises:
        UserError: nothing found, a file that is not Parquet, or no rows at all.
    """
    found = expand(inputs, output)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(_footer, [location for location, _ in found]))
    shards = [
        Shard(number=number, path=location.uri, size=size, rows=sum(groups), row_groups=groups)
        for number, ((location, size), (groups, _)) in enumerate(zip(found, footers, strict=True))
    ]
    return Manifest(shards=tuple(shards)), [schema for _, schema in footers]


def _footer(location: Location) -> tuple[tuple[int, ...], pa.Schema]:
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            file = pq.ParquetFile(stream)
            meta = file.metadata
            groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
            return groups, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{location.uri}: not a readable Parquet file ({first})") from error
