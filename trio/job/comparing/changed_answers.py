"""``changed.parquet``: rows of a comparison that settings answer differently, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from trio.job import storage
from trio.job.output.file_record import HIDDEN
from trio.job.output.schema import metadata_of
from trio.job.output.sink import ROWS
from trio.job.storage import Location

CHANGED = "changed.parquet"
OF_ROW = ("row", "prompt_number", "id", "prompt", "picture")
OF_SETTING = ("response", "error", "score")
"""As far as the rows have them."""
BATCH = 1000


def write_changed(output: Location, run_id: str, settings: Sequence[str]) -> int:
    """Write the file; returns how many rows it has.

    Args:
        output: the directory of a run whose rows are all there.
        run_id: its id.
        settings: names of those that each row was asked with, in the order of their numbers.

    Raises:
        OSError: the rows cannot be read, or the file not be written.
    """
    dataset = ds.dataset(output.join(ROWS).path, filesystem=output.filesystem, format="parquet")
    there = [name for name in (*OF_ROW, *OF_SETTING) if name in dataset.schema.names]
    schema = _schema(dataset.schema, settings, run_id)
    rows = _rows(dataset, [*there, "setting"])
    changed = (_line(own, settings, schema.names) for own in _of_each(rows) if _differ(own))
    count = 0
    place = output.join(HIDDEN, CHANGED)
    with storage.writing(place) as stream, pq.ParquetWriter(stream, schema) as writer:
        while lines := list(islice(changed, BATCH)):
            writer.write_table(pa.Table.from_pylist(lines, schema))
            count += len(lines)
    storage.move(place, output.join(CHANGED))
    storage.remove_directory(output.join(HIDDEN))
    return count


def _schema(rows: pa.Schema, settings: Sequence[str], run_id: str) -> pa.Schema:
    fields = [rows.field(name) for name in OF_ROW]
    for name in OF_SETTING:
        if name in rows.names:
            own = rows.field(name)
            fields += [own.with_name(f"{name} {setting}") for setting in settings]
    return pa.schema(fields, metadata=metadata_of(fields, run_id))


def _rows(dataset: ds.Dataset, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """In the order of files, and so of the input."""
    for batch in dataset.to_batches(columns=list(columns), batch_size=BATCH, fragment_readahead=1):
        yield from batch.to_pylist()


def _of_each(rows: Iterable[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """What the settings answered to each prompt: these stand one after the other."""
    for _, own in groupby(rows, key=itemgetter("row", "prompt_number")):
        yield list(own)


def _differ(own: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["response"] for row in own}) > 1


def _line(
    own: Sequence[Mapping[str, Any]], settings: Sequence[str], columns: Sequence[str]
) -> dict[str, Any]:
    told = {name: own[0][name] for name in OF_ROW}
    for row in own:
        for name in OF_SETTING:
            told[f"{name} {settings[row['setting']]}"] = row.get(name)
    return {name: told[name] for name in columns}
