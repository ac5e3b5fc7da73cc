"""What a run says beside its figures: how to open its rows, and answers to a few of the bundled
images. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import pyarrow.parquet as pq

from trio import bundled
from trio.job.output.sink import ROWS
from trio.job.storage import ARROW_SCHEMES, Location, scheme_of, write_atomic

IMAGES = "images"
SHOWN_IMAGES, SHOWN_ROWS = 3, 5


def opening(output: Location, *, several: bool = False) -> str | None:
    """A shell command that prints the first rows; None where Arrow cannot open the place itself.

    several: settings, so that a row stands there more than once.
    """
    rows = output.join(ROWS).uri
    if scheme_of(rows) not in {None, *ARROW_SCHEMES}:
        return None
    columns = json.dumps(["id", "prompt", *(["setting"] if several else []), "response", "error"])
    code = (
        f"import pyarrow.dataset as ds; print(*ds.dataset({json.dumps(rows)})"
        f'.head({SHOWN_ROWS}, columns={columns}).to_pylist(), sep="\\n")'
    )
    return f"python -c {shlex.quote(code)}"


def page_command(output: Location) -> str:
    """A shell command that makes the page about a run."""
    return f"python jobs/report.py {shlex.quote(output.uri)}"


def examples(output: Location, settings: Sequence[str]) -> str:
    """Writes a few of the bundled images beside a run's rows; says what was answered about them.

    settings: names of those that the rows were asked with.

    Raises:
        OSError: they cannot be written or the rows not be read.
    """
    rows = output.join(ROWS)
    columns = ["row", "id", "prompt", "response", "error", "setting"]
    table = pq.read_table(rows.path, filesystem=rows.filesystem, columns=columns)
    order = [("row", "ascending"), ("setting", "ascending")]
    answered, lines = table.sort_by(order).to_pylist(), []
    for name, data in bundled.images(SHOWN_IMAGES).items():
        mine = [row for row in answered if row["id"].startswith(name.partition(".")[0] + "-")]
        if mine:
            image = output.join(IMAGES, name)
            write_atomic(image, data)
            lines.append(image.uri)
        for prompt, own in groupby(mine, key=itemgetter("prompt")):
            said = [f"({row['error']})" if row["error"] else row["response"] for row in own]
            if len(set(said)) > 1:
                said = [f"{name}: {one}" for name, one in zip(settings, said, strict=True)]
            lines.append(f"    {prompt:<28} {'; '.join(dict.fromkeys(said))}")
    return "\n".join(lines)
