"""A stand-in of the Hugging Face Hub's HTTP API, as far as an upload asks it.

It keeps repositories of data sets: whose they are, their files, and each commit's operations.
Content of Parquet files comes by the LFS protocol, that of others within the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


@dataclass
class Hub:
    """What has been put there."""

    port: int = 0
    private: dict[str, bool] = field(default_factory=dict)
    """Of each repository that was made."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """Of each, its operations: `+name` and `-name`."""
    uploads: int = 0
    """Objects that were put by LFS."""
    objects: dict[str, bytes] = field(default_factory=dict)
    failing: str | None = None
    """Part of the path of requests that fail."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(b"")

    def do_PUT(self) -> None:
        self._answer(self._body())

    def do_POST(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        status, said = 200, None
        if self.hub.failing is not None and self.hub.failing in path:
            status, said = 403, {"error": "no space left"}
        elif path.startswith("/objects/"):
            self._put(path.rpartition("/")[2], body)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, said = 401, {"error": "Invalid token"}
        else:
            status, said = self._api(path, body)
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _put(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.uploads += 1

    def _api(self, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.hub
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repository = "/".join(path.removeprefix("/api").removeprefix("/datasets/").split("/")[:2])
        repository = repository.removesuffix(".git")
        if repository not in hub.files:
            return 404, {"error": "Repository not found"}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": self._batch(json.loads(body)["objects"])}
        if "/preupload/" in path:
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".parquet") else "regular" for name in names]
            return 200, {
                "files": [
                    {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                    for name, mode in zip(names, modes, strict=True)
                ]
            }
        if "/commit/" in path:
            return self._commit(repository, body)
        if "/tree/" in path:
            files = hub.files[repository].items()
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files
            ]
        if path == f"/api/datasets/{repository}" or "/revision/" in path:
            siblings = [{"rfilename": name} for name in hub.files[repository]]
            return 200, {"id": repository, "sha": "0" * 40, "siblings": siblings}
        return 404, {"error": f"the stand-in does not know {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        known = name in self.hub.files
        if not known:
            self.hub.files[name] = {}
            hidden = asked.get("private") or asked.get("visibility") == "private"
            self.hub.private[name] = bool(hidden)
        said = {"url": f"{self.hub.url}/datasets/{name}", "name": name}
        return (409 if known else 200), said

    def _batch(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        new = [one for one in asked if one["oid"] not in self.hub.objects]
        actions = {
            one["oid"]: {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}} for one in new
        }
        return [
            one | ({"actions": actions[one["oid"]]} if one["oid"] in actions else {})
            for one in asked
        ]

    def _commit(self, repository: str, body: bytes) -> tuple[int, Any]:
        files, operations = dict(self.hub.files[repository]), []
        for line in map(json.loads, body.decode().splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                operations.append(f"+{value['path']}")
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                operations.append(f"+{value['path']}")
            elif kind == "deletedFile":
                del files[value["path"]]
                operations.append(f"-{value['path']}")
        self.hub.files[repository] = files
        self.hub.commits.append(operations)
        url = f"{self.hub.url}/datasets/{repository}/commit/{'0' * 40}"
        return 200, {"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""}

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        hub.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
