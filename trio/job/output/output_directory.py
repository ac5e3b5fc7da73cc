"""A run's output directory: claimed, resumed or found finished, and closed with _SUCCESS.

``manifest.parquet`` pins the input and carries, in its schema's metadata, all else that a resume
needs: the run's id, the input's columns, the fingerprint and what was found out about the ids.
``run.yaml`` holds the settings. A second run on the same directory goes on where the first stopped,
if both say the same.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio.errors import UserError
from trio.job import run_yaml
from trio.job.input import manifest
from trio.job.input.columns import Columns
from trio.job.input.ids import IdReport
from trio.job.input.manifest import Manifest
from trio.job.output.schema import RUN_KEY, metadata_of
from trio.job.output.sink import ROWS, STATS
from trio.job.resume.fingerprint import Fingerprint
from trio.job.settings import Settings, made_of
from trio.job.storage import Location, exists, make_directory, read_bytes, write_atomic
from trio.tables import counted

MANIFEST, CONFIG, SUMMARY, SUCCESS = "manifest.parquet", "run.yaml", "summary.json", "_SUCCESS"
COLUMNS_KEY, FINGERPRINT_KEY, IDS_KEY = b"trio.columns", b"trio.fingerprint", b"trio.ids"
UNPRUNED = "unpruned"
# the comparison's own directory


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


def earlier(output: Location) -> Pinned | None:
    """The unfinished run in a directory, None in a new or empty one.

    Raises:
        UserError: the directory holds something else, or a run whose files are damaged.
    """
    if not exists(output.join(MANIFEST)) or not exists(output.join(CONFIG)):
        _check_unused(output)
        return None
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(output.join(MANIFEST))))
        values = run_yaml.parse(read_bytes(output.join(CONFIG)), f"{output.uri}/{CONFIG}")
        said = table.schema.metadata
        return Pinned(
            run_id=said[RUN_KEY].decode(),
            manifest=Manifest.from_table(table),
            columns=_columns_from_json(said[COLUMNS_KEY]),
            fingerprint=Fingerprint.from_json(said[FINGERPRINT_KEY]),
            ids=IdReport.from_json(said[IDS_KEY]) if IDS_KEY in said else None,
            config=made_of(**values),
        )
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"--output {output.uri}: its {MANIFEST} or {CONFIG} cannot be read ({error});"
            " give another directory"
        ) from error


def _columns_to_json(columns: Columns) -> bytes:
    """Every field as it is; Arrow types, which JSON does not know, as an encoded schema."""

    def plain(value: object) -> object:
        if not isinstance(value, pa.DataType):
            return value
        encoded = pa.schema([("", value)]).serialize().to_pybytes()
        return {"type": base64.b64encode(encoded).decode()}

    fields = dataclasses.fields(columns)
    return json.dumps({f.name: plain(getattr(columns, f.name)) for f in fields}).encode()


def _columns_from_json(text: bytes) -> Columns:
    values = json.loads(text)
    for name, value in values.items():
        if isinstance(value, dict):
            encoded = pa.py_buffer(base64.b64decode(value["type"]))
            values[name] = pa.ipc.read_schema(encoded).field(0).type
    return Columns(**values)


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


def check_same(
    old: Pinned, now: Fingerprint, found: Sequence[tuple[Location, int]] | None, output: str
) -> None:
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
    if old.fingerprint.version != now.version:
        raise UserError(
            f"--output {output} holds a run of {reasons[0]}. Go on with that version, or give"
            " another --output"
        )
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
    began = old is None and exists(output.join(MANIFEST)) and exists(output.join(CONFIG))
    if began or finished(output):
        raise UserError(
            f"--output {output.uri}: another run was at work there in the meantime; start again to"
            " go on with it, or give another --output"
        )


def new_run_id() -> str:
    return uuid.uuid4().hex


def claim(output: Location, run: Pinned, facts: Sequence[str] = ()) -> None:
    """Write what the run is before its first row; `facts` are lines that its settings leave open.

    Raises:
        UserError: the directory cannot be made or written.
    """
    said = metadata_of(manifest.SCHEMA, run.run_id) | {
        COLUMNS_KEY: _columns_to_json(run.columns),
        FINGERPRINT_KEY: run.fingerprint.to_json().encode(),
    }
    if run.ids is not None:
        said[IDS_KEY] = run.ids.to_json().encode()
    comment = (
        f"trio-vlm {run.fingerprint.version}, run {run.run_id}\n"
        f"Repeat: --config {CONFIG} --output NEW_DIRECTORY"
    )
    comment = "\n".join([comment, *facts])
    try:
        for name in (ROWS, STATS):
            make_directory(output.join(name))
        write_atomic(output.join(CONFIG), run_yaml.dump(run.config, comment).encode())
        write_atomic(output.join(MANIFEST), run.manifest.to_bytes(said))
    except OSError as error:
        raise UserError(f"--output {output.uri}: cannot be written: {error}") from error


def close(output: Location, summary: Mapping[str, Any], images: str | None = None) -> None:
    """Write the summary, then the mark that the output is whole.

    What the engines said of CUDA graphs, and of `images` that they had to process themselves, is
    noted in the settings as a comment, which nothing reads.
    """
    if graphs := summary.get("cuda_graphs"):
        said = (f"{state} ({counted(count, 'file')})" for state, count in graphs.items())
        _note(output, "CUDA graphs", "; ".join(said))
    if images is not None:
        _note(output, "images", images)
    text = json.dumps(summary, indent=2) + "\n"
    write_atomic(output.join(SUMMARY), text.encode())
    write_atomic(output.join(SUCCESS), b"")


def _note(output: Location, what: str, said: str) -> None:
    lines = read_bytes(output.join(CONFIG)).decode().splitlines()
    lines = [line for line in lines if not line.startswith(f"# {what}: ")]
    write_atomic(output.join(CONFIG), "\n".join([*lines, f"# {what}: {said}", ""]).encode())


def read_summary(output: Location) -> dict[str, Any]:
    loaded = json.loads(read_bytes(output.join(SUMMARY)))
    assert isinstance(loaded, dict)
    return loaded
