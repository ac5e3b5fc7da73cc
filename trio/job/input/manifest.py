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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

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
        groups = table.column("row_groups").combine_chunks()
        counts = np.asarray(groups.flatten())
        ends = np.cumsum(groups.value_lengths().to_numpy(zero_copy_only=False))
        columns = [table.column(name).to_pylist() for name in ("shard", "path", "size", "rows")]
        alike: dict[bytes, tuple[int, ...]] = {}
        # Most shards are cut alike: one tuple serves them all, else these are most of the memory.
        shards = []
        for number, path, size, rows, start, end in zip(
            *columns, np.concatenate([[0], ends])[:-1], ends, strict=True
        ):
            mine = counts[int(start) : int(end)]
            key = mine.tobytes()
            if key not in alike:
                alike[key] = tuple(mine.tolist())
            shards.append(
                Shard(number=number, path=path, size=size, rows=rows, row_groups=alike[key])
            )
        return cls(shards=tuple(shards))

    def to_bytes(self, metadata: Mapping[bytes, bytes]) -> pa.Buffer:
        """The manifest as a small Parquet file: paths by what they share with the one before."""
        sink = pa.BufferOutputStream()
        pq.write_table(
            self.to_table().replace_schema_metadata(metadata),
            sink,
            compression="zstd",
            use_dictionary=["row_groups.list.element"],
            column_encoding={"path": "DELTA_BYTE_ARRAY"},
            store_schema=True,
        )
        return sink.getvalue()

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
        given = infos
        left: list[pafs.FileInfo] = []
        if [i.path for i in infos] != [location.path]:
            if output is not None and output.prefix == location.prefix:
                infos = [i for i in infos if not i.path.startswith(output.path.rstrip("/") + "/")]
            infos, left = listing.split(location, infos)
        note = f": {listing.left_out(left)}" if left else ""
        if not infos and (images := listing.images(given)):
            raise UserError(
                f"--input {uri}: no Parquet file there, but {counted(images, 'image')}; put them"
                " into one first, as trio/job/README.md shows under 'Columns'"
            )
        if not infos:
            raise UserError(
                f"--input {uri}: no Parquet file there{note}; give a .parquet file, a directory"
                " that holds some, a pattern in quotes, or an s3://, gs:// or hf:// URI"
            )
        if left:
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
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(_footer, [location for location, _ in found]))
    # Shards of one data set are alike in schema and often in row groups: kept once each.
    cuts: dict[tuple[int, ...], tuple[int, ...]] = {}
    kinds: dict[bytes, pa.Schema] = {}
    shards, schemas = [], []
    for number, ((location, size), footer) in enumerate(zip(found, footers, strict=True)):
        groups, unpacked, raw = footer
        groups = cuts.setdefault(groups, groups)
        shards.append(
            Shard(
                number=number, path=location.uri, size=size, rows=sum(groups), row_groups=groups,
                unpacked=unpacked,
            )
        )  # fmt: skip
        if raw not in kinds:
            kinds[raw] = pa.ipc.read_schema(pa.py_buffer(raw))
        schemas.append(kinds[raw])
    return Manifest(shards=tuple(shards)), schemas


def _footer(location: Location) -> tuple[tuple[int, ...], int, bytes]:
    """Rows of each row group, bytes without compression, and the Arrow schema as bytes."""
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            file = pq.ParquetFile(stream)
            meta = file.metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            unpacked = sum(group.total_byte_size for group in groups)
            schema = file.schema_arrow.serialize().to_pybytes()
            return tuple(group.num_rows for group in groups), unpacked, schema
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"{location.uri}: not a readable Parquet file ({reason})") from error
