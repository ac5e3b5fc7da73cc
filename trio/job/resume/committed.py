"""What of a run is there already: a unit is done if and only if its file in ``rows/`` is there, or
``files.parquet`` names a larger one that holds it.

What it adds up to stands in its file in ``stats/``, written before, as what a page shows of it in
``gallery/``. Statistics without rows were left by a process that died between the two; the unit is
done again, which overwrites them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from trio.errors import UserError, first_line
from trio.job import storage
from trio.job.input.units import Unit
from trio.job.output.file_record import LargerFile, read_record
from trio.job.output.gallery import GALLERY
from trio.job.output.schema import RUN_KEY, row_key
from trio.job.output.sink import ROWS, STATS
from trio.job.output.totals import Totals, merge
from trio.job.storage import Location, read_bytes

THREADS = 16
BATCH = 1000
"""Files whose statistics are held at a time."""
ANOTHER = "put it back, or give another --output"
COLUMNS = ["unit", "setting", *(field.name for field in dataclasses.fields(Totals))]


def listed(output: Location) -> set[Unit]:
    """Units that have a file in ``rows/``, or are part of a larger one.

    Raises:
        UserError: a larger file is gone.
    """
    selector = pafs.FileSelector(output.join(ROWS).path, allow_not_found=True)
    infos = output.filesystem.get_file_info(selector)
    units = (Unit.of_name(info.base_name) for info in infos if info.is_file)
    done = {unit for unit in units if unit is not None}
    for file in _larger(output, ROWS):
        file.here(output)
        done.update(file.units)
    return done


def _larger(output: Location, folder: str) -> list[LargerFile]:
    return [file for file in read_record(output) if file.folder == folder]


def totals(output: Location, units: Collection[Unit], run_id: str) -> Totals:
    """What committed units add up to, in all settings; errors as of `by_setting`."""
    return merge(by_setting(output, units, run_id))


def by_setting(
    output: Location, units: Collection[Unit], run_id: str, settings: int = 1
) -> tuple[Totals, ...]:
    """What committed units add up to in each setting: one small file is read for each unit, or a
    larger one for many, and no row.

    Args:
        output: the run's directory.
        units: that are committed.
        run_id: the run's id.
        settings: how many there are.

    Raises:
        UserError: statistics are missing, damaged or of another run.
        OSError: the storage does not answer.
    """
    out = [Totals()] * settings
    for table in _statistics(output, units, run_id):
        for setting, before in enumerate(out):
            own = table.filter(pc.equal(table["setting"], setting))
            out[setting] = before + Totals.from_stats(own)
    return tuple(out)


def _statistics(output: Location, units: Collection[Unit], run_id: str) -> Iterator[pa.Table]:
    """Rows of ``stats/`` about units, those in larger files first."""
    left = set(units)
    for file in _larger(output, STATS):
        if left.intersection(file.units):
            table = _table(file.here(output), run_id, file.units, COLUMNS, ANOTHER)
            wanted = pa.array([unit.stem for unit in left.intersection(file.units)])
            yield table.filter(pc.is_in(table["unit"], wanted))
            left.difference_update(file.units)
    ordered = sorted(left)
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(ordered), BATCH):
            read = partial(unit_table, output, run_id, STATS, columns=COLUMNS)
            yield pa.concat_tables(pool.map(read, ordered[at : at + BATCH]))


def sweep(output: Location) -> None:
    """Remove the temporary files of killed writers; only while the lease is held."""
    for part in (output, output.join(ROWS), output.join(STATS), output.join(GALLERY)):
        storage.sweep(part)


def sweep_gallery(output: Location, done: Collection[Unit]) -> None:
    """Remove what is kept for a page of units that are not `done`; only while the lease is held.

    Raises:
        OSError: the storage does not answer.
    """
    selector = pafs.FileSelector(output.join(GALLERY).path, allow_not_found=True)
    for info in output.filesystem.get_file_info(selector):
        unit = Unit.of_name(info.base_name)
        if info.is_file and unit is not None and unit not in done:
            storage.remove(output.at(info.path))


def unit_table(
    output: Location, run_id: str, folder: str, unit: Unit, columns: Sequence[str] | None = None
) -> pa.Table:
    """A unit's own file in ``rows/`` or ``stats/``; all columns where none are named.

    Raises:
        UserError: it is missing, damaged, of another run or of other rows.
        OSError: the storage does not answer.
    """
    cure = f"remove {output.join(ROWS, unit.name).uri} and start again, which does its rows anew"
    return _table(output.join(folder, unit.name), run_id, (unit,), columns, cure)


def _table(
    place: Location,
    run_id: str,
    units: Sequence[Unit],
    columns: Sequence[str] | None,
    cure: str,
) -> pa.Table:
    """A file about all rows of the units, and about no others; errors as of `unit_table`."""
    try:
        # A storage that does not answer raises here: what has been read can only be damaged.
        data = read_bytes(place)
    except FileNotFoundError:
        data = b""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(columns, use_threads=False)
        if columns is not None:
            table = table.select(columns)
        run = file.schema_arrow.metadata[RUN_KEY].decode()
        if run != run_id or not _fits(table, units):
            raise ValueError("it is of another run or other rows")
    except (OSError, ValueError, pa.ArrowException, KeyError, TypeError) as error:
        problem = first_line(error) if data else "there is none"
        raise UserError(f"{place.uri} cannot be used ({problem}): {cure}") from error
    return table


def _fits(table: pa.Table, units: Sequence[Unit]) -> bool:
    """Whether rows, or statistics, are those of the units."""
    rows = sum(unit.stop - unit.start for unit in units)
    if "row" not in table.column_names:
        said = set(table["unit"].to_pylist()), sum(table["inputs"].to_pylist())
        return said == ({unit.stem for unit in units}, rows)
    (unit,) = units
    first, last = row_key(unit.shard, unit.start), row_key(unit.shard, unit.stop - 1)
    keys = pc.unique(table["row"])
    return len(keys) == rows and pc.min_max(keys).as_py() == {"min": first, "max": last}
