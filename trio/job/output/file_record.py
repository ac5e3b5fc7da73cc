"""``files.parquet``: which larger file holds which units, once their own files were put together.

One atomic write, and the commit point of a compaction: units that it names are done, though their
own files go. Until a larger file stands in its place it lies in the same folder below ``.larger/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import UserError, first_line
from trio.job.input.units import Unit
from trio.job.output.schema import RUN_KEY
from trio.job.output.sink import serialise
from trio.job.storage import Location, exists, read_bytes, write_atomic

FILES, HIDDEN = "files.parquet", ".larger"
SCHEMA = pa.schema([(name, pa.string()) for name in ("folder", "file", "unit")])


@dataclass(frozen=True, kw_only=True, slots=True)
class LargerFile:
    """One of them."""

    folder: str
    """`rows` or `stats`."""
    name: str
    units: tuple[Unit, ...]
    """In order."""

    def visible(self, output: Location) -> Location:
        """Where readers find it."""
        return output.join(self.folder, self.name)

    def hidden(self, output: Location) -> Location:
        """Where it lies before."""
        return output.join(HIDDEN, self.folder, self.name)

    def here(self, output: Location) -> Location:
        """Where it lies now.

        Raises:
            UserError: it is gone.
        """
        for place in (self.visible(output), self.hidden(output)):
            if exists(place):
                return place
        raise UserError(
            f"{self.visible(output).uri} is gone, and {FILES} says that it holds"
            f" {len(self.units)} units: put it back, or give another --output"
        )


def larger_name(number: int) -> str:
    """Of a larger file. In the order of names, in which object stores list, all of them come before
    the units' own."""
    return f"0-{number:05d}.parquet"


def write_record(output: Location, run_id: str, files: Iterable[LargerFile]) -> None:
    lines = [
        {"folder": file.folder, "file": file.name, "unit": unit.stem}
        for file in files
        for unit in file.units
    ]
    table = pa.Table.from_pylist(lines, SCHEMA).replace_schema_metadata({RUN_KEY: run_id.encode()})
    write_atomic(output.join(FILES), serialise(table))


def read_record(output: Location) -> Sequence[LargerFile]:
    """The larger files of a run; none where units have their own.

    Raises:
        UserError: the record is damaged.
        OSError: the storage does not answer.
    """
    try:
        data = read_bytes(output.join(FILES))
    except FileNotFoundError:
        return ()
    try:
        lines = pq.read_table(pa.BufferReader(data)).select(SCHEMA.names).to_pylist()
        grouped = groupby(lines, key=lambda line: (line["folder"], line["file"]))
        return [
            LargerFile(folder=folder, name=name, units=tuple(map(_unit, own)))
            for (folder, name), own in grouped
        ]
    except (OSError, ValueError, pa.ArrowException, KeyError) as error:
        raise UserError(
            f"{output.join(FILES).uri} cannot be used ({first_line(error)}): put it back, or give"
            " another --output"
        ) from error


def _unit(line: dict[str, str]) -> Unit:
    unit = Unit.of_name(f"{line['unit']}.parquet")
    if unit is None:
        raise ValueError(f"{line['unit']!r} is no unit")
    return unit
