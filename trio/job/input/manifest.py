"""The input as planned: numbered shards with sizes, row counts and row groups, pinned for a run.

INPUT paths, directories, patterns or URIs; OUTPUT a ``Manifest`` that is written once as
``manifest.parquet``. Planning reads Parquet footers, and makes an index of what is no Parquet; a
resume compares the pinned manifest with a listing (paths and sizes) and reads no byte of any shard.
A shard that was rewritten with the very same size is therefore not noticed.
"""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from trio.errors import UserError, first_line
from trio.job.input import listing
from trio.job.input.kinds import shard_index
from trio.job.input.kinds.found_shard import Found, shared_directory
from trio.job.input.kinds.saved_datasets import WHOLE, Part, data_set_files
from trio.job.input.kinds.shard_index import Index
from trio.job.input.kinds.shard_kinds import IMAGES, PARQUET, kind_of
from trio.job.storage import Location, bare, list_files, locate, parent
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
    # absolute local path or URI; of images the folder's with a name of their own
    size: int
    # bytes; of images the sum of their files'
    rows: int
    row_groups: tuple[int, ...]
    # rows of each row group
    unpacked: int = field(default=0, compare=False)
    # bytes without compression, as the footer says; only units are cut by it, which a run that goes
    # on has cut already, so the table does not hold it: 0 then
    index: str = field(default="", compare=False)
    # path or URI of its index; "" for Parquet, which needs none

    @property
    def kind(self) -> str:
        return kind_of(bare(self.path)) or PARQUET

    @property
    def parquet(self) -> str:
        """Path of the Parquet file in which its rows stand: its index, or itself."""
        return self.index or self.path

    @property
    def place(self) -> str:
        """What is there as long as the shard may be: of images their folder."""
        return parent(self.path).uri if self.kind == IMAGES else self.path


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
        return sum(max(shard.size, shard.unpacked) for shard in self.shards if shard.rows)

    def shared_directory(self) -> str | None:
        """What the paths begin with, up to a ``/``, if file names alone do not tell the shards
        apart; None if they do."""
        return shared_directory([shard.path for shard in self.shards])

    def indexed_in(self, directory: Location) -> Manifest:
        """The same, its indexes being there."""
        shards = [
            shard
            if shard.kind == PARQUET or not shard.rows
            else dataclasses.replace(
                shard, index=directory.join(shard_index.name_of(shard.number)).uri
            )
            for shard in self.shards
        ]
        return Manifest(shards=tuple(shards))

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

    def difference(self, found: Sequence[Found]) -> str | None:
        """What tells a listing of the input (see `expand`) from this one, None when nothing."""
        if len(self.shards) != len(found):
            return f"{counted(len(self.shards), 'shard')} then, {len(found)} now"
        for shard, one in zip(self.shards, found, strict=True):
            uri = one.location.uri
            if shard.path != uri and shard.kind == one.kind == IMAGES:
                return f"the images of {shard.place} are others now"
            if shard.path != uri:
                return f"shard {shard.number} was {shard.path}, is {uri}"
            if shard.size != one.size:
                return f"{shard.path} had {shard.size} bytes, has {one.size}"
        return None


def tell(text: str) -> None:
    """One line to whoever started the job."""
    print(text, file=sys.stderr, flush=True)


def expand(
    inputs: Sequence[str],
    output: Location | None = None,
    say: Callable[[str], None] = tell,
    part: Part = WHOLE,
) -> list[Found]:
    """Every shard that the inputs name, sorted by path within each input.

    What lies below ``output`` is no input: a run that goes on must find the listing it began with.
    Files that are left out and might hold rows are said.

    Args:
        inputs: paths or URIs.
        output: of the run.
        say: told what is left out.
        part: of data sets that have several.

    Raises:
        UserError: an input that names nothing, one file named twice, or a part of what has none.
    """
    found: list[Found] = []
    in_parts = False
    for uri in inputs:
        location, infos, parted = _files(uri, part)
        in_parts |= parted
        if [i.path for i in infos] == [location.path]:
            found += listing.named(location, infos[0])
            continue
        if output is not None and output.prefix == location.prefix:
            infos = [i for i in infos if not i.path.startswith(output.path.rstrip("/") + "/")]
        mine, note = listing.split(location, infos)
        if not mine:
            raise UserError(
                f"--input {uri}: no input there{note and f': {note}'}; give files of Parquet,"
                " WebDataset tars, JSONL or CSV, images, a directory that holds some, a pattern in"
                " quotes, or an s3://, gs:// or hf:// URI"
            )
        if note:
            say(f"--input {uri}: {note}")
        found += mine
    if part != WHOLE and not in_parts:
        raise UserError(f"{part}: no input here has such parts; leave it out")
    counts = Counter(path for one in found for path in one.paths)
    twice = sorted(path for path, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"--input names {twice[0]} twice; name each shard once")
    return found


def _files(uri: str, part: Part) -> tuple[Location, list[pafs.FileInfo], bool]:
    """What an input names, and whether the part of a data set was taken."""
    location = locate(uri)
    try:
        infos = list_files(location)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"--input {uri}: cannot be listed: {first_line(error)}") from error
    taken = data_set_files(uri, location, infos, part)
    return location, infos if taken is None else taken, taken is not None


def inspect(
    inputs: Sequence[str],
    output: Location | None = None,
    say: Callable[[str], None] = tell,
    part: Part = WHOLE,
    limit: int | None = None,
) -> tuple[Manifest, list[pa.Schema]]:
    """Manifest of the input and the Arrow schema of each shard: from the footers, or from indexes
    that are made here, in a temporary directory.

    Args:
        inputs: paths or URIs.
        output: what lies below it is left out.
        say: told what is left out, and what indexes took.
        part: of data sets that have several.
        limit: rows of the run. Behind it no shard is looked at but Parquet: they have no rows here.

    Raises:
        UserError: nothing found, or a file that is not what its name says.
    """
    found = expand(inputs, output, say, part)
    indexes = _indexes(found, say, limit)
    kept: dict[Any, Any] = {}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        read = list(pool.map(partial(_shard, kept, indexes), range(len(found)), found))
    # Shards without rows may lack columns, as a JSONL without lines does.
    some = next((schema for shard, schema in read if shard.rows), read[0][1])
    schemas = [schema if shard.rows else some for shard, schema in read]
    return Manifest(shards=tuple(shard for shard, _ in read)), schemas


def _indexes(
    found: Sequence[Found], say: Callable[[str], None], limit: int | None
) -> dict[int, Index]:
    """Of what is no Parquet, by number; gone when this process ends."""
    if all(one.kind == PARQUET for one in found):
        return {}
    try:
        directory = Path(tempfile.mkdtemp(prefix="trio-index-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        return shard_index.build(found, directory, say, limit)
    except OSError as error:
        place = tempfile.gettempdir()
        raise UserError(
            f"the index of the input cannot be written in {place} ({first_line(error)}); name"
            " another directory with the environment variable TMPDIR"
        ) from error


def _shard(
    kept: dict[Any, Any], indexes: dict[int, Index], number: int, found: Found
) -> tuple[Shard, pa.Schema]:
    """A shard and its schema."""
    if found.kind == PARQUET:
        return _footer(kept, number, found)
    index = indexes.get(number)
    shard = Shard(
        number=number,
        path=found.location.uri,
        size=found.size,
        rows=index.rows if index else 0,
        row_groups=_once(kept, index.row_groups) if index else (),
        index=str(index.path) if index else "",
    )
    return shard, _once(kept, index.schema if index else pa.schema([]))


def _footer(kept: dict[Any, Any], number: int, found: Found) -> tuple[Shard, pa.Schema]:
    location = found.location
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            file = pq.ParquetFile(stream)
            meta, schema = file.metadata, file.schema_arrow.remove_metadata()
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            shard = Shard(
                number=number,
                path=location.uri,
                size=found.size,
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
