"""A stand-in for the Hub, as far as the files of one data set are listed and read.

``python tests/job/hub_files_server.py DIR`` prints its port; DIR is the repository `org/name`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40
API, FILE = "/api/datasets/org/name", "/datasets/org/name/resolve"


class Hub(BaseHTTPRequestHandler):
    root: Path

    def do_GET(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith(f"{FILE}/"):
            self._file(path.removeprefix(f"{FILE}/").partition("/")[2])
        elif path.startswith(f"{API}/tree/"):
            folder = path.removeprefix(f"{API}/tree/").partition("/")[2]
            self._tree(self.root / folder, every="recursive=true" in url.query.lower())
        elif path == API or path.startswith(f"{API}/revision/"):
            self._answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "tags": []}).encode())
        else:
            self._none()

    do_HEAD = do_POST = do_GET

    def _tree(self, folder: Path, *, every: bool) -> None:
        if not folder.is_dir():
            self._none()
            return
        found = folder.rglob("*") if every else folder.iterdir()
        self._answer(200, json.dumps([self._entry(path) for path in sorted(found)]).encode())

    def _entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.root).as_posix()
        size = path.stat().st_size if path.is_file() else 0
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": name, "size": size, "oid": _digest(name.encode())}

    def _file(self, name: str) -> None:
        path = self.root / name
        if not path.is_file():
            self._none()
            return
        data = path.read_bytes()
        about = {"ETag": f'"{_digest(data)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._answer(200, data, about)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        about["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], about)

    def _none(self) -> None:
        self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _answer(self, code: int, body: bytes, about: dict[str, str] | None = None) -> None:
        self.send_response(code)
        lines = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | (about or {})
        for name, value in lines.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
