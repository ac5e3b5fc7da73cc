"""A run's output directory: claimed, resumed or found finished, and closed with _SUCCESS.

``manifest.parquet`` pins the input and carries, in its schema's metadata, all else that a resume
needs: the run's id, the input's columns, the fingerprint and what was found out about the ids.
``run.yaml`` holds the settings. A second run on the same directory goes on where the first stopped,
if both say the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector

from trio.errors import UserError
from trio.job import run_yaml
from trio.job.input import manifest
from trio.job.input.columns import Columns
from trio.job.input.ids import IdReport
from trio.job.input.kinds.found_shard import Found
from trio.job.input.manifest import Manifest
from trio.job.output.schema import RUN_KEY, metadata_of
from trio.job.output.sink import ROWS, STATS, serialise
from trio.job.resume.fingerprint import Fingerprint
from trio.job.settings import Settings, made_of
from trio.job.storage import Location, make_directory, open_location, read_bytes, write_atomic
from trio.tables import counted
from trio.version import VERSION

MANIFEST, CONFIG, SUMMARY, SUCCESS = "manifest.parquet", "run.yaml", "summary.json", "_SUCCESS"
INDEX = "index"
"""Directory of the indexes of shards that are no Parquet."""
PUT_THREADS = 16
COLUMNS_KEY, FINGERPRINT_KEY, IDS_KEY = b"trio.columns", b"trio.fingerprint", b"trio.ids"
SHOWN_DIFFERENCES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Pinned:
    """What a run is; written before its first row, found again by a run that goes on."""

    run_id: str
    manifest: Manifest
    columns: Columns
    fingerprint: Fingerprint
    ids: IdReport | None
    # None where the input has no id column
    config: Settings


def fresh_directory(job: str, base: str = "trio-output") -> str:
    """A directory that does not exist yet, named by the job and the time [UTC]."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = Path(base) / f"{job}-{stamp}"
    while path.exists():
        path = path.with_name(f"{job}-{stamp}-{uuid.uuid4().hex[:4]}")
    return str(path)


def _names(output: Location) -> set[str]:
    """What lies in a directory; nothing where there is none.

    Raises:
        UserError: the place cannot be looked at, or is no directory.
    """
    try:
        infos = output.filesystem.get_file_info(FileSelector(output.path, allow_not_found=True))
    except OSError as error:
        raise UserError(f"--output {output.uri}: cannot be read as a directory: {error}") from error
    return {info.base_name for info in infos}


def finished(output: Location) -> bool:
    """Whether a whole run lies there.

    Raises:
        UserError: the place cannot be looked at.
    """
    return SUCCESS in _names(output)


def earlier(output: Location) -> Pinned | None:
    """The unfinished run in a directory, None in a new or empty one.

    Raises:
        UserError: the directory holds something else, a run of another version of this package, or
            one whose files are damaged.
    """
    names = _names(output)
    if not {MANIFEST, CONFIG} <= names:
        known = {MANIFEST, CONFIG, ROWS, STATS, INDEX}
        other = sorted(name for name in names - known if not name.startswith("."))
        if other:
            raise UserError(
                f"--output {output.uri} holds other files ({other[0]}); give a new or empty"
                " directory"
            )
        return None
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(output.join(MANIFEST))))
        said = table.schema.metadata
        fingerprint = Fingerprint.from_json(said[FINGERPRINT_KEY])
        if fingerprint.version == VERSION:
            values = run_yaml.parse(read_bytes(output.join(CONFIG)), f"{output.uri}/{CONFIG}")
            return Pinned(
                run_id=said[RUN_KEY].decode(),
                manifest=Manifest.from_table(table).indexed_in(output.join(INDEX)),
                columns=Columns.from_bytes(said[COLUMNS_KEY]),
                fingerprint=fingerprint,
                ids=IdReport.from_json(said[IDS_KEY]) if IDS_KEY in said else None,
                config=made_of(**values),
            )
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"--output {output.uri}: its {MANIFEST} or {CONFIG} cannot be read ({error});"
            " give another directory"
        ) from error
    raise UserError(
        f"--output {output.uri} holds a run of another version of this package:"
        f" {fingerprint.version}, now {VERSION}. Go on with that version, or give another --output"
    )


def check_same(old: Pinned, now: Fingerprint, found: Sequence[Found] | None, output: str) -> None:
    """Refuse to mix rows of two different runs.

    Args:
        old: what the directory holds.
        now: the fingerprint of what was asked for.
        found: the input as it is listed now, see `manifest.expand`; no shard is opened. None: it is
            not compared.
        output: for the message.

    Raises:
        UserError: naming what differs.
    """
    reasons = old.fingerprint.differences(now)
    changed = old.manifest.difference(found) if found is not None else None
    if changed is not None:
        reasons.append(f"the input: {changed}")
    if reasons:
        more = len(reasons) - SHOWN_DIFFERENCES
        shown = "; ".join(reasons[:SHOWN_DIFFERENCES]) + (f"; {more} more" if more > 0 else "")
        raise UserError(
            f"--output {output} holds a run that differs in this: {shown}."
            " Give the same settings, model and input to go on with it, or another --output"
        )


def check_unchanged(output: Location, old: Pinned | None) -> None:
    """Make sure, with the lease held, that what was planned on is still what is there.

    Raises:
        UserError: another run began or finished there in between.
    """
    names = _names(output)
    if SUCCESS in names or (old is None and {MANIFEST, CONFIG} <= names):
        raise UserError(
            f"--output {output.uri}: another run was at work there in the meantime; start again to"
            " go on with it, or give another --output"
        )


def claim(output: Location, run: Pinned, facts: Sequence[str] = ()) -> Pinned:
    """Write what the run is before its first row; `facts` are lines that its settings leave open.

    Returns the same run, whose indexes are in the output now.

    Raises:
        UserError: the directory cannot be made or written.
    """
    said = metadata_of(manifest.SCHEMA, run.run_id) | {
        COLUMNS_KEY: run.columns.to_bytes(),
        FINGERPRINT_KEY: run.fingerprint.to_json().encode(),
    }
    if run.ids is not None:
        said[IDS_KEY] = run.ids.to_json().encode()
    comment = [
        f"trio-vlm {run.fingerprint.version}, run {run.run_id}",
        f"Repeat: --config {CONFIG} --output NEW_DIRECTORY",
        *facts,
    ]
    try:
        for name in (ROWS, STATS):
            make_directory(output.join(name))
        indexed = run.manifest.indexed_in(output.join(INDEX))
        _put_indexes(run.manifest, indexed)
        write_atomic(output.join(CONFIG), run_yaml.dump(run.config, "\n".join(comment)).encode())
        table = run.manifest.to_table().replace_schema_metadata(said)
        write_atomic(output.join(MANIFEST), serialise(table, **manifest.COMPACT))
    except OSError as error:
        raise UserError(f"--output {output.uri}: cannot be written: {error}") from error
    return dataclasses.replace(run, manifest=indexed)


def _put_indexes(made: Manifest, wanted: Manifest) -> None:
    """From where planning made them, where they are not left: a driver may be killed."""
    both = zip(made.shards, wanted.shards, strict=True)
    pairs = [(one.index, other.index) for one, other in both if one.index and other.index]

    def put(pair: tuple[str, str]) -> None:
        with pa.memory_map(pair[0]) as stream:
            write_atomic(open_location(pair[1]), stream.read_buffer())

    with ThreadPoolExecutor(PUT_THREADS) as pool:
        for _ in pool.map(put, pairs):
            pass
    for directory in {Path(path).parent for path, _ in pairs}:
        shutil.rmtree(directory, ignore_errors=True)


def close(
    output: Location,
    summary: Mapping[str, Any],
    images: str | None = None,
    also: Mapping[str, str] | None = None,
) -> None:
    """Write the summary, then other files (text by name), then the mark that all is there.

    What the engines said of CUDA graphs, and of `images` that they had to process themselves, is
    noted in the settings as comments, which nothing reads.
    """
    graphs = summary.get("cuda_graphs") or {}
    said = "; ".join(f"{state} ({counted(count, 'file')})" for state, count in graphs.items())
    notes = {"# CUDA graphs: ": said, "# images: ": images}
    lines = read_bytes(output.join(CONFIG)).decode().splitlines()
    lines = [line for line in lines if not line.startswith(tuple(notes))]
    lines += [start + note for start, note in notes.items() if note]
    write_atomic(output.join(CONFIG), "\n".join([*lines, ""]).encode())
    write_summary(output, summary)
    for name, text in (also or {}).items():
        write_atomic(output.join(name), text.encode())
    write_atomic(output.join(SUCCESS), b"")


def write_summary(output: Location, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, whole or not at all.

    Raises:
        OSError: the storage does not take it.
    """
    write_atomic(output.join(SUMMARY), (json.dumps(summary, indent=2) + "\n").encode())


def read_summary(output: Location) -> dict[str, Any]:
    """Of a finished run; before `_SUCCESS` the same file holds the totals so far."""
    return dict(json.loads(read_bytes(output.join(SUMMARY))))


def read_text(output: Location, name: str) -> str | None:
    """One of the files beside the rows; None where the run has none of that name."""
    try:
        return read_bytes(output.join(name)).decode()
    except FileNotFoundError:
        return None
