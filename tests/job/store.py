"""A real S3 server in a process of its own, and what tests ask of it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trio.job.storage import Location, locate, write_atomic

SERVER = Path(__file__).with_name("s3_server.py")
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    bytes: int


class Store:
    """The server, a bucket of our own in it, and what the server was asked."""

    def __init__(self, port: int, log: Path, bucket: str) -> None:
        self._log = log
        self._seen = 0
        self._options = f"?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1"
        self._bucket = bucket
        maker = locate(f"s3://{bucket}/x{self._options}&allow_bucket_creation=true")
        maker.filesystem.create_dir(bucket)

    def uri(self, path: str) -> str:
        return f"s3://{self._bucket}/{path}{self._options}"

    def at(self, path: str) -> Location:
        return locate(self.uri(path))

    def put(self, path: str, data: bytes) -> None:
        write_atomic(self.at(path), data)

    def requests(self) -> list[Request]:
        """Those since the last call."""
        lines = [line.split("\t") for line in self._log.read_text().splitlines()]
        new, self._seen = lines[self._seen :], len(lines)
        return [Request(method, path, int(size)) for method, path, _, size, _ in new]

    def fail(self, *rules: str) -> None:
        """Answer such requests with an error; none: no more."""
        Path(f"{self._log}.fail").write_text("\n".join(rules))

    def kill(self, *rules: str) -> None:
        """Kill who asks for such bytes, as ``PATH BYTE``; none: nobody any more."""
        Path(f"{self._log}.kill").write_text("\n".join(rules))


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, Path]]:
    """The server while the block runs: its port, and the log of what it was asked."""
    log = folder / "log"
    log.touch()
    before = dict(os.environ)
    os.environ.update(CREDENTIALS)
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(log)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), log
    finally:
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ.update(before)


def bucket_of(server: tuple[int, Path]) -> Store:
    """A new, empty bucket."""
    made = Store(*server, bucket=f"bucket-{uuid.uuid4().hex}")
    made.requests()
    return made
