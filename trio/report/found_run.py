"""What a run has left in its directory so far: settings, figures, files and how it stands.

INPUT a directory or URI; OUTPUT a ``FoundRun``, also of a run under way, killed, failed or empty.
No Ray, no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyarrow.fs import FileSelector, FileType

from trio.errors import UserError, first_line
from trio.job import run_yaml
from trio.job.comparing.compared import UNPRUNED
from trio.job.input.units import Unit
from trio.job.output.file_record import read_record
from trio.job.output.gallery import GALLERY
from trio.job.output.output_directory import CONFIG, MANIFEST, SUCCESS, SUMMARY
from trio.job.output.sink import ROWS, STATS
from trio.job.output.summary import DONE, FAILED, RUNNING
from trio.job.resume import committed, lease
from trio.job.settings import made_of
from trio.job.storage import Location, locate, read_bytes

METRICS = "metrics.json"
STOPPED = "stopped"
"""Beside the states that a run tells of itself: not finished, and nobody is at work, as it was
killed, or stopped by an older version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRun:
    """A run's files, as they are now."""

    output: Location
    state: str
    """`DONE`, `RUNNING`, `FAILED` or `STOPPED`."""
    why: str | None
    """Of a failed run, in one line."""
    settings: Mapping[str, Any]
    """Of run.yaml, by name."""
    config: str
    """The text of run.yaml."""
    summary: Mapping[str, Any]
    """The object of summary.json; empty where there is none."""
    metrics: Mapping[str, Any]
    """The object of metrics.json; empty where there is none."""
    names: Sequence[str]
    """Of the settings that each row is asked with, by number."""
    planned: int | None
    """Input rows of the whole run; None where the manifest does not tell."""
    units: frozenset[str]
    """Of the units that are committed, the names in ``stats/``."""
    rows: Sequence[str]
    """Paths of the files of ``rows/``, in the order of the input."""
    stats: Sequence[str]
    gallery: Sequence[str]

    @property
    def job(self) -> str:
        """The job's program."""
        return "vqa.py" if self.settings.get("mode") is not None else "caption.py"

    def with_settings(self, count: int) -> FoundRun:
        """With a name for each of so many settings at least: those of another version may be
        more than its run.yaml tells this one."""
        more = [f"setting {number}" for number in range(len(self.names), count)]
        return replace(self, names=[*self.names, *more]) if more else self


def find_run(place: str) -> FoundRun:
    """The run in a directory.

    Raises:
        UserError: no such directory, or no run in it, or its files are damaged.
        FileNotFoundError: a file went meanwhile; looking again helps.
        OSError: the storage does not answer.
    """
    output = locate(place)
    names = _names(output)
    if CONFIG not in names:
        raise UserError(
            f"{output.uri}: no run lies there (it has no {CONFIG}); give the directory that the job"
            " printed as its output"
        )
    try:
        config = read_bytes(output.join(CONFIG)).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{output.join(CONFIG).uri} is not text in UTF-8: put the run's own back"
        ) from error
    settings = _settings(config, output)
    summary = _object(output, SUMMARY, names)
    state, why = _state(output, names, summary)
    units = committed.listed(output)
    return FoundRun(
        output=output,
        state=state,
        why=why,
        settings=settings,
        config=config,
        summary=summary,
        metrics=_object(output, METRICS, names),
        names=_setting_names(config, settings, summary),
        planned=_planned(output, settings),
        units=frozenset(unit.stem for unit in units),
        rows=_files(output, ROWS),
        stats=_files(output, STATS),
        gallery=_gallery(output, units),
    )


@contextmanager
def naming_the_damaged(found: FoundRun, paths: Sequence[str]) -> Iterator[None]:
    """While these files are read: Arrow's own errors do not tell which one is damaged.

    Raises:
        UserError: one of them cannot be read.
        FileNotFoundError: a file went meanwhile; looking again helps.
        OSError: the storage does not answer.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        for path in paths:
            if (why := _unreadable(found.output, path)) is not None:
                raise UserError(
                    f"{path} cannot be read ({first_line(why)}): put it back from a copy, or run"
                    " the job into a new --output"
                ) from error
        if isinstance(error, OSError):
            raise
        raise UserError(
            f"{found.output.uri}: its files do not fit together ({first_line(error)}): put them"
            " back from a copy, or run the job into a new --output"
        ) from error


def _unreadable(output: Location, path: str) -> Exception | None:
    """Why; a storage that does not even open it raises OSError."""
    with output.filesystem.open_input_file(path) as stream:
        try:
            for _ in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                pass
        except (OSError, pa.ArrowException) as error:
            return error
    return None


def _names(output: Location) -> set[str]:
    try:
        kind = output.filesystem.get_file_info(output.path).type
        if kind == FileType.File:
            raise UserError(f"{output.uri} is a file; give the directory of a run")
        if kind == FileType.NotFound:
            raise UserError(f"{output.uri}: there is no such directory; give the --output of a run")
        infos = output.filesystem.get_file_info(FileSelector(output.path))
    except OSError as error:
        raise UserError(f"{output.uri}: cannot be read: {first_line(error)}") from error
    return {info.base_name for info in infos}


def _settings(text: str, output: Location) -> dict[str, Any]:
    """Without the checks of a job: the page also shows runs of other versions."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{output.join(CONFIG).uri} is not YAML ({first_line(error)}): put the run's own back"
        ) from error
    return values if isinstance(values, dict) else {}


def _object(output: Location, name: str, there: set[str]) -> dict[str, Any]:
    if name not in there:
        return {}
    try:
        found = json.loads(read_bytes(output.join(name)))
    except ValueError as error:
        raise UserError(
            f"{output.join(name).uri} is no JSON ({first_line(error)}): remove it, the page does"
            " without"
        ) from error
    return found if isinstance(found, dict) else {}


def _state(output: Location, names: set[str], summary: Mapping[str, Any]) -> tuple[str, str | None]:
    """`_SUCCESS` decides, then whether somebody is at work, then what the run said last: one that
    goes on after a failure has not said anything yet."""
    if SUCCESS in names:
        return DONE, None
    if _held(output):
        return RUNNING, None
    if summary.get("state") == FAILED:
        return FAILED, summary.get("why")
    return STOPPED, None


def _held(output: Location) -> bool:
    """Whether a run beats there, as far as another process can tell without a claim of its own."""
    selector = FileSelector(output.join(lease.DIRECTORY).path, allow_not_found=True)
    infos = [info for info in output.filesystem.get_file_info(selector) if info.is_file]
    for claim in (info for info in infos if info.base_name.endswith(lease.CLAIM)):
        name = claim.base_name.removesuffix(lease.CLAIM)
        alive = lease.lives(name)
        beats = [info.mtime_ns or 0 for info in infos if info.base_name.startswith(name)]
        silent_s = time.time() - max(beats) / 1e9
        if alive or (alive is None and silent_s < lease.EXPIRY_S):
            return True
    return False


def _setting_names(
    config: str, settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> Sequence[str]:
    if summary.get("settings"):
        return [one["name"] for one in summary["settings"]]
    try:
        return [one.name for one in made_of(**run_yaml.parse(config, CONFIG)).compared]
    except (UserError, TypeError):  # of another version
        items = settings.get("compare")
        alone = str(summary.get("name") or "as configured")
        if not isinstance(items, list):
            return [alone]
        return [UNPRUNED if item in (1, "1", "1.0") else str(item) for item in items]


def _planned(output: Location, settings: Mapping[str, Any]) -> int | None:
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(output.join(MANIFEST))), columns=["rows"])
    except (OSError, pa.ArrowException):
        return None
    rows = sum(table["rows"].to_pylist())
    if settings.get("only_row") is not None:
        return min(rows, 1)
    return min(rows, settings.get("limit") or rows)


def _files(output: Location, folder: str) -> list[str]:
    """Larger files wherever they lie now, then units' own that are in none of them."""
    larger = [file for file in read_record(output) if file.folder == folder]
    inside = {unit for file in larger for unit in file.units}
    selector = FileSelector(output.join(folder).path, allow_not_found=True)
    infos = output.filesystem.get_file_info(selector)
    units = {Unit.of_name(info.base_name): info.path for info in infos if info.is_file}
    own = sorted((unit, path) for unit, path in units.items() if unit and unit not in inside)
    return [file.here(output).path for file in larger] + [path for _, path in own]


def _gallery(output: Location, units: AbstractSet[Unit]) -> list[str]:
    """Without files of units whose rows were not written any more."""
    selector = FileSelector(output.join(GALLERY).path, allow_not_found=True)
    infos = output.filesystem.get_file_info(selector)
    return sorted(
        info.path
        for info in infos
        if info.is_file
        and info.base_name.endswith(".parquet")
        and info.base_name[0] not in "._"
        and ((unit := Unit.of_name(info.base_name)) is None or unit in units)
    )
