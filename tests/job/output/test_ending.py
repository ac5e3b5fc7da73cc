"""How to open a run's rows, and what is said of its prompts."""

import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import write_shard
from trio.job.input.manifest import inspect
from trio.job.output.ending import opening, prompt_notices
from trio.job.settings import made_of
from trio.job.storage import locate

OTHER = pa.schema([("image", pa.binary())])
OWN = "rows keep their own prompt"
BROKEN = "caf\udce9"
"""Stands for text that is not UTF-8."""


def test_the_command_prints_the_first_rows_wherever_they_lie(tmp_path: Path) -> None:
    place = tmp_path / 'it\'s "here" $HOME'
    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "response", "error")])
    row = {"prompt": "p", "response": "a cat", "error": None}
    write_shard(place / "rows" / "0.parquet", [row | {"id": str(n)} for n in range(9)], schema)
    command = opening(locate(str(place)))
    assert command is not None and "\n" not in command
    ours = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(ours, shell=True, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and "'a cat'" in lines[0] and "'id': '4'" in lines[4]


@pytest.mark.parametrize(
    ("flags", "prompts", "says"),
    [
        ({}, ["Describe the image.", None, "where is the 3 ?"], []),
        ({}, ["What is this?", "Who?", "Who?"], ["'What is this?' and 1 more: do not"]),
        ({}, [BROKEN, "What is this?"], []),
        ({"limit": 1}, ["Describe the image.", "Who?"], []),
        ({"prompt": "Who?"}, None, ["'Who?': do not"]),
        ({"prompt": "Describe this photo in one sentence."}, None, []),
        ({"prompt": "Is there a 7?"}, ["where is the 3 ?"], [OWN]),
        ({"model": "org/name", "prompt": "Who?"}, None, []),
        ({"model": "org/name", "prompt": "Who?"}, ["What?"], [OWN]),
    ],
)
def test_prompts_that_are_not_what_they_seem_are_told(
    tmp_path: Path, flags: dict[str, object], prompts: list[str | None] | None, says: list[str]
) -> None:
    if prompts is None:
        write_shard(tmp_path / "0.parquet", [{"image": b""}], OTHER)
    else:
        texts = [text and text.encode("utf-8", "surrogateescape") for text in prompts]
        column = pa.array(texts, pa.binary()).view(pa.string())
        pq.write_table(
            pa.table({"image": [b""] * len(texts), "prompt": column}), tmp_path / "0.parquet"
        )
    write_shard(tmp_path / "1.parquet", [{"image": b""}], OTHER)
    manifest, _ = inspect([str(tmp_path)], locate(str(tmp_path / "out")))
    config = made_of(**flags)
    lines = list(prompt_notices(config, manifest, None if prompts is None else "prompt"))
    assert len(lines) == len(says), lines
    assert all(text in line for text, line in zip(says, lines, strict=True))
