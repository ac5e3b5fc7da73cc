"""What a run says beside its figures: how to open its rows, answers to a few of the bundled images,
and which prompts the bundled model was not taught. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trio import bundled
from trio.job.input.manifest import Manifest
from trio.job.output.sink import ROWS
from trio.job.settings import Settings
from trio.job.storage import ARROW_SCHEMES, Location, open_location, scheme_of, write_atomic

IMAGES = "images"
SHOWN_IMAGES, SHOWN_ROWS = 3, 5


def opening(output: Location) -> str | None:
    """A shell command that prints the first rows; None where Arrow cannot open the place itself."""
    rows = output.join(ROWS).uri
    if scheme_of(rows) not in {None, *ARROW_SCHEMES}:
        return None
    columns = json.dumps(["id", "prompt", "response", "error"])
    code = (
        f"import pyarrow.dataset as ds; print(*ds.dataset({json.dumps(rows)})"
        f'.head({SHOWN_ROWS}, columns={columns}).to_pylist(), sep="\\n")'
    )
    return f"python -c {shlex.quote(code)}"


def examples(output: Location) -> str:
    """Writes a few of the bundled images beside a run's rows; says what was answered about them.

    Raises:
        OSError: they cannot be written or the rows not be read.
    """
    answered = _answered(output)
    lines = []
    for name, data in bundled.images(SHOWN_IMAGES).items():
        rows = [row for row in answered if row["id"].startswith(name.partition(".")[0] + "-")]
        if not rows:
            continue
        image = output.join(IMAGES, name)
        write_atomic(image, data)
        lines += [image.uri, *map(_line, rows)]
    return "\n".join(lines)


def _answered(output: Location) -> list[dict[str, Any]]:
    rows = output.join(ROWS)
    columns = ["row", "id", "prompt", "response", "error"]
    table = pq.read_table(rows.path, filesystem=rows.filesystem, columns=columns)
    found: list[dict[str, Any]] = table.sort_by("row").to_pylist()
    return found


def _line(row: Mapping[str, Any]) -> str:
    said = row["response"] if row["error"] is None else f"({row['error']})"
    return f"    {row['prompt']:<28} {said}"


def prompt_notices(config: Settings, manifest: Manifest, column: str | None) -> Iterator[str]:
    """Lines on prompts that are not what they seem.

    column: the input's own prompts, if it has any.
    """
    if config.input.prompt is not None and column is not None:
        yield f"rows keep their own prompt (column {column!r}); --prompt is for those without"
    if bundled.is_bundled(config.model.model):
        prompts: Iterable[str] = filter(None, [config.input.prompt])
        if column is not None:
            prompts = _prompts(manifest.shards, column, config.input.limit)
        line = bundled.prompts_notice(prompts)
        if line is not None:
            yield line


def _prompts(shards: Sequence[Any], column: str, limit: int | None) -> Iterator[str]:
    """The input's own prompts, once for each shard that has them; unreadable ones are left to the
    run, which makes errors of their rows."""
    left = limit
    for shard in shards:
        if left is not None and left <= 0:
            return
        try:
            location = open_location(shard.path)
            with location.filesystem.open_input_file(location.path) as stream:
                file = pq.ParquetFile(stream)
                names = [column] if column in file.schema_arrow.names else []
                table = file.read(names).slice(0, left)
            found = table.column(column).unique() if names else ()
        except (OSError, pa.ArrowException):
            continue
        for prompt in found:
            with suppress(UnicodeDecodeError):
                if text := prompt.as_py():
                    yield text
        left = None if left is None else left - shard.rows
