"""Larger files of what units wrote one by one, made when all rows are there.

1. Rows and statistics are copied, in order, into files below ``.larger/``, where no reader looks.
2. ``files.parquet`` names the units that each of them holds: one atomic write. What happened before
   is done anew after a crash, what comes now is gone on with.
3. The units' own files go, then the larger file moves to its place: for one file after the other,
   on object stores for all of a folder together.

So each row is visible once or, between the two halves of 3, not at all; never twice. Object stores
move by a copy within the store, which shows the object when it is whole, and list names in order,
in pages: a larger file comes first in that order, so a listing that has met it meets none of its
units' files, which were gone before. A reader whose listing is older finds files gone, which is an
error of its own, and no row twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from trio.errors import UserError, first_line
from trio.job import storage
from trio.job.input.units import Unit
from trio.job.output.file_record import HIDDEN, LargerFile, larger_name, read_record, write_record
from trio.job.output.sink import ROWS, STATS
from trio.job.resume.committed import THREADS, unit_table
from trio.job.storage import Location

ROW_GROUPS = 4
"""Of a larger file, at least."""
MAX_ROW_GROUP_BYTES = 16 << 20
"""As stored. One row group is held at a time."""


def compact(
    output: Location,
    run_id: str,
    units: Collection[Unit],
    file_bytes: int,
    *,
    check: Callable[[], object] = lambda: None,
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Put the files of a run's units together; or go on with that.

    Args:
        output: the run's directory, whose lease is held.
        run_id: the run's id.
        units: all of the run; all of them are committed.
        file_bytes: that a larger file has at least, but for the last. 0: what has not begun does
            not begin.
        check: called again and again; raises where the run is to end.
        say: takes a line if there is much to do.

    Raises:
        UserError: a unit's file is damaged or of another run, or a larger file is gone.
        OSError: the storage does not answer.
    """
    files = read_record(output)
    if not files and file_bytes:
        files = _written(output, run_id, sorted(units), file_bytes, check, say)
    for folder in (ROWS, STATS):
        mine = [file for file in files if file.folder == folder]
        names = _left(output, folder, mine)
        for file in mine:
            check()
            _put_in_place(output, file, names)
    storage.remove_directory(output.join(HIDDEN))


def _sizes(output: Location, folder: str) -> dict[str, int]:
    """Bytes of each file in a folder, by name."""
    selector = pafs.FileSelector(output.join(folder).path, allow_not_found=True)
    infos = output.filesystem.get_file_info(selector)
    return {info.base_name: info.size for info in infos if info.is_file}


def _written(
    output: Location,
    run_id: str,
    units: Sequence[Unit],
    file_bytes: int,
    check: Callable[[], object],
    say: Callable[[str], object],
) -> Sequence[LargerFile]:
    """Steps 1 and 2; nothing where the files would hardly become fewer."""
    sizes = {folder: _sizes(output, folder) for folder in (ROWS, STATS)}
    whole = sum(sizes[ROWS].get(unit.name, 0) for unit in units)
    if len(units) <= -(-whole // file_bytes):
        return ()
    say(f"putting {len(units)} files together")
    storage.remove_directory(output.join(HIDDEN))
    files = [
        file
        for folder in (ROWS, STATS)
        for file in _joined(output, run_id, folder, units, sizes[folder], file_bytes, check)
    ]
    check()
    write_record(output, run_id, files)
    return files


def _joined(
    output: Location,
    run_id: str,
    folder: str,
    units: Sequence[Unit],
    sizes: Mapping[str, int],
    file_bytes: int,
    check: Callable[[], object],
) -> Iterator[LargerFile]:
    """Step 1 for one folder."""
    group_bytes = min(file_bytes // ROW_GROUPS, MAX_ROW_GROUP_BYTES)
    with ThreadPoolExecutor(THREADS) as pool:
        read = partial(unit_table, output, run_id, folder)
        groups = (
            (own, _together(output, folder, pool.map(read, own)))
            for own in _groups(units, sizes, group_bytes)
        )
        for number, first in enumerate(groups):
            name = larger_name(number)
            place = LargerFile(folder=folder, name=name, units=()).hidden(output)
            written = _write(place, first, groups, file_bytes, check)
            yield LargerFile(folder=folder, name=name, units=tuple(written))


def _groups(
    units: Sequence[Unit], sizes: Mapping[str, int], group_bytes: int
) -> Iterator[Sequence[Unit]]:
    """Units that become one row group: as many as have so many bytes, or one."""
    own: list[Unit] = []
    held = 0
    for unit in units:
        size = sizes.get(unit.name, 0)  # who reads it says that it is gone
        if own and held + size > group_bytes:
            yield own
            own, held = [], 0
        own.append(unit)
        held += size
    if own:
        yield own


def _together(output: Location, folder: str, tables: Iterator[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{output.join(folder).uri}: its files have different columns"
            f" ({first_line(error)}); give another --output"
        ) from error


_Group = tuple[Sequence[Unit], pa.Table]


def _write(
    place: Location,
    first: _Group,
    others: Iterator[_Group],
    file_bytes: int,
    check: Callable[[], object],
) -> list[Unit]:
    """A larger file of the first row group and as many others as it takes; the units in it."""
    units: list[Unit] = []
    rows = 0
    with (
        storage.writing(place) as stream,
        pq.ParquetWriter(stream, first[1].schema, compression="zstd") as writer,
    ):
        for own, table in chain([first], others):
            check()
            writer.write_table(table, row_group_size=table.num_rows)
            units += own
            rows += table.num_rows
            if stream.tell() >= file_bytes:
                break
    there = pq.read_metadata(place.path, filesystem=place.filesystem).num_rows
    if there != rows:
        raise OSError(f"{place.uri} has {there} rows of {rows} that were written")
    return units


def _left(output: Location, folder: str, files: Sequence[LargerFile]) -> set[str]:
    """Names in a folder. Object stores remove a thousand files by one request, but only all that
    there are: where none of them is to stay, they go now."""
    names = set(_sizes(output, folder))
    own = {unit.name for file in files for unit in file.units}
    if output.local or not names or not names <= own:
        return names
    for file in files:
        file.here(output)
    storage.empty_directory(output.join(folder))
    return set()


def _put_in_place(output: Location, file: LargerFile, names: Collection[str]) -> None:
    """Step 3 for one file; `names`: of all files in its folder."""
    here = file.here(output)
    own = [output.join(file.folder, unit.name) for unit in file.units if unit.name in names]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(storage.remove, own))
    if file.name not in names:
        # Else a power cut might undo a removal, and not the move.
        storage.flush(output.join(file.folder))
        storage.move(here, file.visible(output))
