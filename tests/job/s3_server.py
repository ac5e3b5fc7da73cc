"""A real S3 server for tests, in a process of its own: moto behind a log that can also fail.

``python tests/job/s3_server.py LOG`` prints its port. Each request becomes a line of LOG:
method, path, Range header, and the bytes of the answer's body as Content-Length says. While a file
``LOG.fail`` exists, requests that match its lines (a method, a space, and a part of the path with
its query) are answered with an error that clients do not retry.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Callable[..., Any]


class Logged:
    """A WSGI application around another that writes down what it is asked."""

    def __init__(self, inner: Callable[[dict[str, Any], Answer], Iterable[bytes]], log: Path):
        self._inner, self._log, self._lock = inner, log, threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Answer) -> Iterable[bytes]:
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        path = unquote(environ["PATH_INFO"]) + (f"?{query}" if query else "")

        def note(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            length = {k.lower(): v for k, v in headers}.get("content-length", "0")
            asked = environ.get("HTTP_RANGE", "-")
            with self._lock, self._log.open("a") as stream:
                stream.write(f"{method}\t{path}\t{asked}\t{length}\t{status}\n")
            return start(status, headers, *rest)

        for rule in self._rules("kill"):
            part, _, byte = rule.rpartition(" ")
            first, last = _range(environ)
            if method == "GET" and part in path and first <= int(byte) <= last:
                os.kill(_client(int(environ["REMOTE_PORT"])), signal.SIGKILL)
        for rule in self._rules("fail"):
            kind, _, part = rule.partition(" ")
            if kind == method and part in path:
                note("403 Forbidden", [("Content-Length", "0")])
                return [b""]
        return self._inner(environ, note)

    def _rules(self, kind: str) -> list[str]:
        try:
            return Path(f"{self._log}.{kind}").read_text().splitlines()
        except FileNotFoundError:
            return []


def _range(environ: dict[str, Any]) -> tuple[int, int]:
    """First and last byte that are asked for; of a whole file none."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
    return (int(found[1]), int(found[2])) if found else (0, -1)


def _client(port: int) -> int:
    """The process of this machine whose socket has the port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    (socket,) = (f"socket:[{f[9]}]" for f in fields if f[1].endswith(f":{port:04X}"))
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has been closed
            if os.readlink(link) == socket:
                return int(link.parts[2])
    raise AssertionError(f"nobody has port {port}")


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    application = Logged(DomainDispatcherApplication(create_backend_app), Path(sys.argv[1]))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()
