"""A web server on this machine that has an image and many ways to misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.job.fakes import png

IMAGE = png()


class Handler(BaseHTTPRequestHandler):
    """`/ok`, `/to?URL` (redirect), `/count/N` (N redirects), and ways to misbehave."""

    seen: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        """What a client of an object store asks first."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(IMAGE)))
        self.end_headers()

    def do_GET(self) -> None:
        self.seen.append(self.path)
        path, _, query = self.path.partition("?")
        steps = int(path.rpartition("/")[2]) if path.startswith("/count") else 0
        if path == "/to" or steps:
            self.send_response(302)
            self.send_header("Location", query if path == "/to" else f"/count/{steps - 1}")
            self.end_headers()
        elif path == "/missing":
            self.send_error(404)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        elif path == "/silent":
            time.sleep(3)
        else:
            cut = 30 if path == "/short" else len(IMAGE)
            self.send_response(200)
            self.send_header("Content-Length", str(len(IMAGE)))
            self.end_headers()
            self.wfile.write(IMAGE[:cut])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[int]:
    """The port of a server on 127.0.0.1."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
