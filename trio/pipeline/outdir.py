"""A run's output directory: claimed, resumed or found finished, and closed with _SUCCESS.

``manifest.parquet`` pins the input and carries the run's id; ``run.yaml`` the settings. A second
run on the same directory goes on where the first stopped, if both say the same.
"""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trio.errors import UserError
from trio.pipeline import config as settings
from trio.pipeline.config import JobConfig
from trio.pipeline.manifest import Manifest
from trio.pipeline.schema import RUN_KEY, metadata_of
from trio.pipeline.sink import ROWS, STATS, serialise
from trio.pipeline.storage import Location, exists, make_directory, read_bytes, write_atomic

MANIFEST, CONFIG, SUMMARY, SUCCESS = "manifest.parquet", "run.yaml", "summary.json", "_SUCCESS"
UNPRUNED = "unpruned"
# the comparison's own directory, which is done before the run around it begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """What an earlier, unfinished run left in the directory."""

    run_id: str
    manifest: Manifest
    config: JobConfig


def fresh_directory(job: str, base: str = "trio-output") -> str:
    """A directory that does not exist yet, named by the job and the time [UTC]."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = Path(base) / f"{job}-{stamp}"
    number = 1
    while path.exists():
        number += 1
        path = Path(base) / f"{job}-{stamp}-{number}"
    return str(path)


def finished(output: Location) -> bool:
    """Whether a whole run lies there.

    Raises:
        UserError: the place cannot be looked at.
    """
    try:
        return exists(output.join(SUCCESS))
    except OSError as error:
        raise UserError(f"--output {output.uri}: cannot be read: {error}") from error


def earlier(output: Location) -> Earlier | None:
    """The unfinished run in a directory, None in a new or empty one.

    Raises:
        UserError: the directory holds something else, or a run whose files are damaged.
    """
    if not exists(output.join(MANIFEST)) or not exists(output.join(CONFIG)):
        _check_unused(output)
        return None
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(output.join(MANIFEST))))
        values = yaml.safe_load(read_bytes(output.join(CONFIG)))
        run_id = table.schema.metadata[RUN_KEY].decode()
        config = settings.from_mapping(values, f"{output.uri}/{CONFIG}")
        return Earlier(run_id=run_id, manifest=Manifest.from_table(table), config=config)
    except (OSError, KeyError, TypeError, pa.ArrowException, yaml.YAMLError, UserError) as error:
        raise UserError(
            f"--output {output.uri}: its {MANIFEST} or {CONFIG} cannot be read ({error});"
            " give another directory"
        ) from error


def _check_unused(output: Location) -> None:
    from pyarrow import fs as pafs

    info = output.filesystem.get_file_info(output.path)
    if info.type == pafs.FileType.File:
        raise UserError(f"--output {output.uri} is a file; give a directory")
    selector = pafs.FileSelector(output.path, allow_not_found=True)
    names = [i.base_name for i in output.filesystem.get_file_info(selector)]
    known = {MANIFEST, CONFIG, ROWS, STATS, UNPRUNED}
    other = sorted(name for name in names if name not in known and not name.startswith("."))
    if other:
        raise UserError(
            f"--output {output.uri} holds other files ({other[0]}); give a new or empty directory"
        )


def check_same(old: Earlier, config: JobConfig, manifest: Manifest, output: str) -> None:
    """Refuse to mix rows of two different runs.

    Raises:
        UserError: naming the setting or the input file that differs.
    """
    changed = settings.results_difference(old.config, config)
    input_changed = old.manifest.difference(manifest)
    reason = changed[0] if changed else f"the input: {input_changed}" if input_changed else None
    if reason is not None:
        raise UserError(
            f"--output {output} holds an unfinished run with another {reason};"
            " give the same settings to go on with it, or another --output"
        )


def new_run_id() -> str:
    return uuid.uuid4().hex


def claim(output: Location, config: JobConfig, manifest: Manifest, run_id: str) -> None:
    """Write what the run is before its first row.

    Raises:
        UserError: the directory cannot be made or written.
    """
    from trio.pipeline.summary import versions

    table = manifest.to_table()
    marked = table.replace_schema_metadata(metadata_of(table.schema, run_id))
    comment = (
        f"trio-vlm {versions()['trio-vlm']}, run {run_id}\n"
        f"Repeat: --config {CONFIG} --output NEW_DIRECTORY"
    )
    try:
        for name in (ROWS, STATS):
            make_directory(output.join(name))
        write_atomic(output.join(CONFIG), settings.dump(config, comment).encode())
        write_atomic(output.join(MANIFEST), serialise(marked))
    except OSError as error:
        raise UserError(f"--output {output.uri}: cannot be written: {error}") from error


def close(output: Location, summary: Mapping[str, Any]) -> None:
    """Write the summary, then the mark that the output is whole."""
    text = json.dumps(summary, indent=2) + "\n"
    write_atomic(output.join(SUMMARY), text.encode())
    write_atomic(output.join(SUCCESS), b"")


def read_summary(output: Location) -> dict[str, Any]:
    loaded = json.loads(read_bytes(output.join(SUMMARY)))
    assert isinstance(loaded, dict)
    return loaded
