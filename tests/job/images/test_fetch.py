"""What rows may name: files below their shard, allowed origins, public addresses; and what not."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.job.servers import IMAGE, Handler, serving
from trio.errors import UserError
from trio.job.images import fetch as files
from trio.job.images import web
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy, RowError, parse_origin, redact
from trio.job.images.time_limit import TimeLimit
from trio.job.storage import locate

REMOTE = "s3://bucket/dir?region=us-east-1"
SECRETS = ("hunter2", "sig=abc", "frag")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as port:
        yield port


def remote(*origins: str, **changes: Any) -> ImagePolicy:
    return ImagePolicy(allow_remote=True, remote_from=origins, **changes)


def local(port: int, **changes: Any) -> ImagePolicy:
    return remote(f"http://127.0.0.1:{port}", **changes)


def failure(name: str, policy: ImagePolicy, base: Path | str | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        files.fetch(name, None if base is None else locate(str(base)), policy)
    assert not any(secret in str(caught.value) for secret in SECRETS), caught.value
    return caught.value


def test_a_server_that_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url, policy = f"http://127.0.0.1:{port}", local(port)
    assert files.fetch(f"{url}/ok", None, policy) == IMAGE
    assert files.fetch(f"HTTP://127.0.0.1:{port}/ö b.png?q=1&r=ü#frag", None, policy) == IMAGE
    assert Handler.seen[-1] == "/%C3%B6%20b.png?q=1&r=%C3%BC"
    assert files.fetch(url, None, policy) == IMAGE
    assert files.fetch(f"{url}/count/3", None, policy) == IMAGE
    assert failure(f"{url}/count/4", policy).message.endswith("more than 3 redirects")
    error = failure(f"{url}/missing?sig=abc#frag", policy)
    assert str(error) == f"image_not_found: {url}/missing: HTTP status 404"
    assert failure(f"{url}/short", policy).kind == "image_truncated"
    assert failure("http://127.0.0.1:1/x?sig=abc", remote("http://127.0.0.1:1")).kind == (
        "image_not_found"
    )


@pytest.mark.parametrize(
    ("name", "origins"),
    [
        ("http://127.0.0.1:{port}/ok?sig=abc", []),
        ("http://localhost:{port}/ok", []),
        ("http://2130706433:{port}/ok", []),
        ("http://[::ffff:127.0.0.1]:{port}/ok", []),
        ("http://0.0.0.0:{port}/ok", []),
        ("http://127.0.0.1:{port}/ok", ["http://*:{port}"]),
        ("http://127.0.0.1:{port}/ok", ["http://127.0.0.1"]),
        ("http://127.0.0.1:{port}/ok", ["https://127.0.0.1:{port}"]),
        ("http://localhost:{port}/ok", ["http://127.0.0.1:{port}"]),
        ("http://me:hunter2@127.0.0.1:{port}/ok", ["http://127.0.0.1:{port}"]),
        ("http://127.0.0.1:{port}/to?http://localhost:{port}/ok", ["http://127.0.0.1:{port}"]),
        (
            "http://127.0.0.1:{port}/to?http://localhost:{port}/ok",
            ["http://127.0.0.1:{port}", "http://*:{port}"],
        ),
        ("http://127.0.0.1:{port}/to?file:///etc/hostname", ["http://127.0.0.1:{port}"]),
        ("http://127.0.0.1:{port}/to?s3://bucket/x", ["http://127.0.0.1:{port}", "s3://bucket"]),
        ("ftp://127.0.0.1/x", []),
        ("local:///etc/hostname", []),
        ("s3://other/x", ["s3://bucket"]),
        ("s3://bucket/x?endpoint_override=127.0.0.1&sig=abc", []),
        ("s3://key:hunter2@bucket/x", []),
        ("hf://datasets/a/b/c::file:///etc/hostname", []),
    ],
)
def test_what_is_not_fetched(name: str, origins: list[str], port: int) -> None:
    before = len(Handler.seen)
    policy = remote(*(origin.format(port=port) for origin in origins))
    assert failure(name.format(port=port), policy).kind == "image_forbidden"
    assert all(path.startswith("/to?") for path in Handler.seen[before:])


STORES = ["s3", "gs", "gcs", "hf", "abfs", "abfss", "hdfs", "viewfs"]


def test_remote_images_are_off_by_default(port: int) -> None:
    for name in (f"http://127.0.0.1:{port}/ok?sig=abc", "s3://bucket/x", "other://x/y"):
        assert failure(name, ImagePolicy()).kind == "image_remote"
    both = failure("s3://key:hunter2@bucket/x?sig=abc", ImagePolicy()).message
    assert "--allow-remote-images --remote-images-from s3://bucket" in both
    assert failure("other://x/y", ImagePolicy()).message == "other://x/y: other:// is never fetched"


@pytest.mark.parametrize("scheme", STORES)
@pytest.mark.parametrize("origins", [[], ["https://example.org"], ["s3://mine", "gs://mine"]])
def test_object_stores_are_read_only_where_they_are_named(
    scheme: str, origins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_store", lambda uri: pytest.fail(f"{uri} was opened"))
    error = failure(f"{scheme}://bucket/private/x.png", remote(*origins))
    assert error.kind == "image_forbidden"
    assert error.message.endswith(f"to be fetched only with --remote-images-from {scheme}://bucket")
    with pytest.raises(pytest.fail.Exception, match="was opened"):
        files.fetch(f"{scheme}://bucket/x.png", None, remote(*origins, f"{scheme}://bucket"))


def test_names_that_lead_to_private_addresses(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, *_: Any, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for origins in ([], [f"http://*.example.org:{port}"]):
        error = failure(f"http://cdn.example.org:{port}/ok", remote(*origins))
        assert error.kind == "image_forbidden" and "private address" in error.message
    named = remote(f"http://cdn.example.org:{port}")
    assert files.fetch(f"http://cdn.example.org:{port}/ok", None, named) == IMAGE


def test_https_is_not_left_by_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_get", lambda parts, policy: "http://example.org/x?sig=abc")
    error = failure("https://example.org/a?sig=abc", remote())
    assert error.kind == "image_forbidden" and "from https to" in error.message


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.1.2.3", False),
        ("172.20.0.1", False),
        ("192.168.0.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::5db8:d822", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert web.is_public(address) == public


def test_large_and_slow_servers(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    assert failure(f"{url}/ok", local(port, max_bytes=50)).kind == "image_oversized"
    assert failure(f"{url}/endless", local(port, max_bytes=1 << 20)).kind == "image_oversized"
    assert failure(f"{url}/silent?sig=abc", local(port, row_timeout=0.3)).kind == "image_timeout"
    with TimeLimit(0.6) as limit, pytest.raises(RowError) as caught, limit.row():
        load_images(f"{url}/drip", None, local(port, row_timeout=0.6))
    assert caught.value.kind == "image_timeout"


def test_object_stores(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    policy = remote("s3://bucket", max_pixels=1000)
    assert load_images("s3://bucket/a/b.png", None, policy)[0].size == (12, 9)
    assert Handler.seen[-1] == "/bucket/a/b.png"
    assert load_images("c.png", locate("s3://shards/d"), ImagePolicy())[0].size == (12, 9)
    assert Handler.seen[-1] == "/shards/d/c.png"


def test_files_outside_of_shard_and_roots(tmp_path: Path) -> None:
    shard, other = tmp_path / "shard", tmp_path / "shard-2"
    for folder in (shard, other, shard / "sub"):
        folder.mkdir()
    (other / "a.png").write_bytes(IMAGE)
    (shard / "sub" / "b.png").write_bytes(IMAGE)
    (shard / "out.png").symlink_to(other / "a.png")
    (shard / "in.png").symlink_to(shard / "sub" / "b.png")
    (shard / "up").symlink_to(tmp_path)
    outside = [
        str(other / "a.png"),
        f"file://{other}/a.png",
        f"file://{other}/%61.png",
        "../shard-2/a.png",
        "sub/../../shard-2/a.png",
        "out.png",
        "up/shard-2/a.png",
        "/etc/hostname",
        "/nowhere/at/all",
        "~/x.png/../../../../../../../../etc/hostname",
    ]
    for name in outside:
        assert failure(name, ImagePolicy(), shard).kind == "image_forbidden", name
    assert failure("sub/b.png", ImagePolicy()).kind == "image_forbidden"
    assert failure(str(other / "a.png"), ImagePolicy(), REMOTE).kind == "image_forbidden"
    assert failure("../x.png", ImagePolicy(), REMOTE).kind == "image_forbidden"
    for name in ("sub/b.png", "in.png", "up/shard/sub/b.png", f"file://{shard}/sub/%62.png"):
        assert files.fetch(name, locate(str(shard)), ImagePolicy()) == IMAGE
    rooted = ImagePolicy(roots=("/nowhere", str(other)))
    for name in ("out.png", str(other / "a.png")):
        assert files.fetch(name, locate(str(shard)), rooted) == IMAGE
        assert files.fetch(str(other / "a.png"), None, rooted) == IMAGE


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    everywhere = ImagePolicy(roots=("/",))
    for name in ("fifo", "folder", "socket", "/dev/zero"):
        error = failure(name, everywhere, tmp_path)
        assert error.kind == "image_forbidden" and "is not a regular file" in error.message
    for name in ("loop", "no", "x" * 5000, "folder/no"):
        assert failure(name, everywhere, tmp_path).kind == "image_not_found"
    (tmp_path / "large").write_bytes(b"x" * 100)
    assert failure("large", ImagePolicy(max_bytes=99), tmp_path).kind == "image_oversized"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://me:hunter2@host:8/a/b@c.png?sig=abc#frag", "https://host:8/a/b@c.png"),
        ("https://host?sig=abc", "https://host"),
        ("HTTP:/host/x?sig=abc", "HTTP:/host/x"),
        ("img/what?.png", "img/what?.png"),
        ("a\nb\x1b.png", "a?b?.png"),
        ("x" * 300, "x" * 197 + "..."),
    ],
)
def test_names_in_messages(name: str, shown: str) -> None:
    assert redact(name) == shown


def test_origins() -> None:
    cdn = parse_origin("https://*.CDN.net")
    assert cdn.covers("https", "a.b.cdn.net", None) and cdn.covers("https", "A.cdn.NET.", 443)
    for scheme, host, port in [
        ("https", "cdn.net", None),
        ("https", "evilcdn.net", None),
        ("https", "a.cdn.net", 8443),
        ("http", "a.cdn.net", None),
        ("https", "a.cdn.net.evil.org", None),
    ]:
        assert not cdn.covers(scheme, host, port)
    assert not cdn.literal and not parse_origin("https://*").literal
    assert parse_origin("s3://Bucket/").covers("s3", "bucket", None)
    assert parse_origin("https://[::1]:8443").covers("https", "::1", 8443)


@pytest.mark.parametrize(
    "text",
    [
        "example.org",
        "ftp://example.org",
        "file:///etc",
        "https://",
        "https://a.*.org",
        "https://a*.org",
        "https://host/path",
        "https://me:hunter2@host",
        "https://host:port",
        "https://host?sig=abc",
        "*",
    ],
)
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(UserError, match="an origin is scheme://host") as caught:
        parse_origin(text)
    assert not any(secret in str(caught.value) for secret in SECRETS)
