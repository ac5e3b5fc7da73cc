"""What of a run is there already: from one listing, a snapshot, and few footers.

A unit is committed when its file in ``rows/`` is there. Its totals stand in that file's footer, so
that a resume would read as many footers as there are files; the snapshot that the driver saves now
and then spares it those of all units it names. It is an aid only: without it, or where it does not
agree with the listing, the footers are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from trio.job import storage
from trio.job.input.units import Unit
from trio.job.output.schema import RECEIPT_KEY, RUN_KEY
from trio.job.output.sink import ROWS, STATS
from trio.job.output.totals import Totals, merge
from trio.job.storage import Location, read_bytes, write_atomic

SNAPSHOT = ".committed.json"
FOOTER_THREADS = 16
TAIL_BYTES = 64 << 10
# read from the end of a file at once: most footers are shorter


@dataclass(frozen=True, slots=True)
class Committed:
    units: set[Unit]
    totals: Totals
    # of exactly these


def listed(output: Location) -> set[Unit]:
    """Units that have a file in ``rows/``."""
    selector = pafs.FileSelector(output.join(ROWS).path, allow_not_found=True)
    infos = output.filesystem.get_file_info(selector)
    units = (Unit.of_name(info.base_name) for info in infos if info.is_file)
    return {unit for unit in units if unit is not None}


def read(output: Location, wanted: Sequence[Unit], run_id: str) -> Committed:
    """Which of the units are committed, and what they add up to.

    A file that is damaged, of another run or of another number of rows is none of them: its unit
    is done again, which overwrites it.

    Args:
        output: the run's directory.
        wanted: all units of the run in the plan's order.
        run_id: the run's id.

    Raises:
        OSError: the storage does not answer.
    """
    there = listed(output)
    units, totals = _snapshot(output, wanted, run_id)
    if not units <= there:
        units, totals = set(), Totals()
    rest = [unit for unit in wanted if unit in there and unit not in units]

    def totals_of(unit: Unit) -> Totals | None:
        return receipt(output, unit, run_id)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        parts = zip(rest, pool.map(totals_of, rest), strict=True)
        found = {unit: part for unit, part in parts if part is not None}
    return Committed(units | found.keys(), merge([totals, *found.values()]))


def save(
    output: Location,
    wanted: Sequence[Unit],
    units: AbstractSet[Unit],
    totals: Totals,
    run_id: str,
) -> None:
    """Write the snapshot: all of ``units`` are committed, and add up to ``totals``.

    Raises:
        OSError: the storage does not take it.
    """
    done = _ranges(number for number, unit in enumerate(wanted) if unit in units)
    snapshot = {
        "run": run_id,
        "wanted": len(wanted),
        "done": done,
        "totals": dataclasses.asdict(totals),
    }
    write_atomic(output.join(SNAPSHOT), json.dumps(snapshot, separators=(",", ":")).encode())


def drop(output: Location) -> None:
    """Remove the snapshot: a finished run needs none."""
    if storage.exists(output.join(SNAPSHOT)):
        output.filesystem.delete_file(output.join(SNAPSHOT).path)


def sweep(output: Location) -> int:
    """Remove the temporary files of killed writers; only while the lease is held."""
    return sum(storage.sweep(part) for part in (output, output.join(ROWS), output.join(STATS)))


def _ranges(numbers: Iterable[int]) -> list[int]:
    """Rising numbers as [gap, length, gap, length, ...]: short for long runs of them."""
    bounds: list[int] = []
    for number in numbers:
        if bounds and bounds[-1] == number:
            bounds[-1] += 1
        else:
            bounds += [number, number + 1]
    return [after - before for before, after in pairwise([0, *bounds])]


def _snapshot(output: Location, wanted: Sequence[Unit], run_id: str) -> tuple[set[Unit], Totals]:
    """Units and totals of the snapshot; nothing where it is missing, damaged or of another run."""
    try:
        said = json.loads(read_bytes(output.join(SNAPSHOT)))
        if said["run"] != run_id or said["wanted"] != len(wanted):
            return set(), Totals()
        units: set[Unit] = set()
        at, steps = 0, iter(said["done"])
        for gap, length in zip(steps, steps, strict=True):
            at += gap + length
            units.update(wanted[at - length : at])
        return units, Totals(**said["totals"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set(), Totals()


def receipt(output: Location, unit: Unit, run_id: str) -> Totals | None:
    """Totals from a file's footer; None where it is no whole file of this unit and run."""
    # A storage that does not answer raises here; what has been read can only be damaged.
    footer = _tail(output.join(ROWS, unit.name))
    try:
        meta = pq.read_metadata(pa.BufferReader(footer))
        if meta.num_rows != unit.stop - unit.start or meta.metadata[RUN_KEY] != run_id.encode():
            return None
        return Totals.from_json(meta.metadata[RECEIPT_KEY])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _tail(location: Location) -> bytes:
    """The end of a Parquet file, from its footer on at the latest; nothing of a missing file."""
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            size = stream.size()
            tail = bytes(stream.read_at(min(size, TAIL_BYTES), max(0, size - TAIL_BYTES)))
            needed = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < needed <= size:
                tail = bytes(stream.read_at(needed, size - needed))
            return tail
    except FileNotFoundError:
        return b""
