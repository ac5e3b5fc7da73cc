"""How to open a run's rows."""

import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from tests.job.fakes import write_shard
from trio.job.output.ending import opening
from trio.job.storage import locate


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
