"""What of a run is there already: a unit is done if and only if its file in ``rows/`` is there.

What it adds up to stands in its file in ``stats/``, written before. Statistics without rows were
left by a process that died between the two; the unit is done again, which overwrites them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from trio.errors import UserError, first_line
from trio.job import storage
from trio.job.input.units import Unit
from trio.job.output.schema import RUN_KEY
from trio.job.output.sink import ROWS, STATS
from trio.job.output.totals import Totals, merge
from trio.job.storage import Location, read_bytes

THREADS = 16
BATCH = 1000
"""Files whose statistics are held at a time."""
COLUMNS = ["unit", "setting", *(field.name for field in dataclasses.fields(Totals))]


def listed(output: Location) -> set[Unit]:
    """Units that have a file in ``rows/``."""
    selector = pafs.FileSelector(output.join(ROWS).path, allow_not_found=True)
    infos = output.filesystem.get_file_info(selector)
    units = (Unit.of_name(info.base_name) for info in infos if info.is_file)
    return {unit for unit in units if unit is not None}


def totals(output: Location, units: Collection[Unit], run_id: str) -> Totals:
    """What committed units add up to, in all settings; errors as of `by_setting`."""
    return merge(by_setting(output, units, run_id))


def by_setting(
    output: Location, units: Collection[Unit], run_id: str, settings: int = 1
) -> tuple[Totals, ...]:
    """What committed units add up to in each setting: one small file is read for each unit, and no
    row.

    Args:
        output: the run's directory.
        units: that are committed.
        run_id: the run's id.
        settings: how many there are.

    Raises:
        UserError: statistics are missing, damaged or of another run.
        OSError: the storage does not answer.
    """
    ordered, out = sorted(units), [Totals()] * settings
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(ordered), BATCH):
            parts = pool.map(partial(_statistics, output, run_id), ordered[at : at + BATCH])
            table = pa.concat_tables(parts)
            for setting, before in enumerate(out):
                own = table.filter(pc.equal(table["setting"], setting))
                out[setting] = before + Totals.from_stats(own)
    return tuple(out)


def sweep(output: Location) -> None:
    """Remove the temporary files of killed writers; only while the lease is held."""
    for part in (output, output.join(ROWS), output.join(STATS)):
        storage.sweep(part)


def _statistics(output: Location, run_id: str, unit: Unit) -> pa.Table:
    """A unit's rows, one for each setting, as a table."""
    stats, rows = (output.join(folder, unit.name) for folder in (STATS, ROWS))
    expected = {unit.stem}, unit.stop - unit.start
    try:
        # A storage that does not answer raises here: what has been read can only be damaged.
        data = read_bytes(stats)
    except FileNotFoundError:
        data = b""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(COLUMNS, use_threads=False).select(COLUMNS)
        run = file.schema_arrow.metadata[RUN_KEY].decode()
        said = set(table["unit"].to_pylist()), sum(table["inputs"].to_pylist())
        if run != run_id or said != expected:
            raise ValueError("it is of another run or other rows")
    except (OSError, ValueError, pa.ArrowException, KeyError, TypeError) as error:
        problem = first_line(error) if data else "there is none"
        raise UserError(
            f"{stats.uri} cannot be used ({problem}): remove {rows.uri} and start again, which does"
            " its rows anew"
        ) from error
    return table
