"""Local paths and URIs behind one small interface; writes are whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from trio.errors import UserError, first_line

ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "mock"})
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
_SECRET = re.compile(r"secret|token|key|password|credential|signature", re.IGNORECASE)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_WILD = re.compile(r"[*?\[]")


def scheme_of(uri: str) -> str | None:
    """Lower-case scheme of a URI, None for a plain path."""
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else None


def is_local(uri: str) -> bool:
    return scheme_of(uri) in (None, "file")


def check_no_secret(uri: str) -> None:
    """Refuse a URI that carries credentials: it would end up in run.yaml, logs and errors.

    Raises:
        UserError: naming the scheme only, never the URI.
    """
    if is_local(uri):
        return
    parts = urlsplit(uri)
    secret = [name for name, _ in parse_qsl(parts.query) if _SECRET.search(name)]
    if parts.password or secret or (parts.username and parts.scheme in ("s3", "gs", "gcs")):
        raise UserError(
            f"a {parts.scheme}:// URI carries credentials: put them into the environment"
            " (for example AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and leave them out of it"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """A path on a file system, and the prefix that turns such a path back into a URI."""

    filesystem: pafs.FileSystem
    path: str
    prefix: str
    # "" for local paths, "s3://" and the like for the others
    query: str = ""
    # options of the file system, as in "?region=eu-west-1"; "" for none

    @property
    def uri(self) -> str:
        return self.prefix + self.path + self.query

    @property
    def local(self) -> bool:
        return not self.prefix

    def at(self, path: str) -> Location:
        return dataclasses.replace(self, path=path)

    def join(self, *parts: str) -> Location:
        return self.at("/".join([self.path.rstrip("/"), *parts]))


def locate(uri: str) -> Location:
    """The file system and path of a URI or local path (which becomes absolute), as a user gave it.

    Raises:
        UserError: a scheme nobody here knows, or a file system that does not open.
    """
    try:
        return open_location(uri)
    except OSError as error:
        raise UserError(str(error)) from error


def open_location(uri: str) -> Location:
    """``locate`` for what was found good before: that it does not open now may pass.

    Raises:
        OSError: a file system that does not open.
    """
    scheme = scheme_of(uri)
    if scheme in (None, "file"):
        path = uri if scheme is None else urlsplit(uri).path
        absolute = Path(path).expanduser().absolute().as_posix()
        return Location(filesystem=pafs.LocalFileSystem(), path=absolute, prefix="")
    check_no_secret(uri)
    base = uri.split("://", 1)[1].split("?", 1)[0]
    root = f"{scheme}://{_WILD.split(base)[0]}"
    options = urlsplit(uri).query
    query = f"?{options}" if scheme in ARROW_SCHEMES and "=" in options else ""
    try:
        if scheme in ARROW_SCHEMES:
            filesystem, _ = pafs.FileSystem.from_uri(root + _in_one_request(scheme, query))
            path = base if query else uri.split("://", 1)[1]
        else:
            filesystem, path = _through_fsspec(uri)
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise OSError(f"cannot open {root}: {first_line(error, 300)}") from error
    return Location(filesystem=filesystem, path=path, prefix=f"{scheme}://", query=query)


def parent(path: str) -> Location:
    """Directory of a shard: what relative image paths start from."""
    location = open_location(path)
    return location.at(location.path.rpartition("/")[0])


def _in_one_request(scheme: str | None, query: str) -> str:
    """With the option that puts a small object by one request instead of three.

    Such an upload also leaves nothing on the store that would have to be cleared away when the
    process dies in the middle.
    """
    option = "allow_delayed_open"
    if scheme != "s3" or option in query:
        return query
    return f"{query}{'&' if query else '?'}{option}=true"


def _through_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    import fsspec
    from fsspec.core import url_to_fs

    assert fsspec is not None
    filesystem, path = url_to_fs(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def has_wildcard(path: str) -> bool:
    return _WILD.search(path) is not None


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Shell pattern as a regular expression: ``*`` and ``?`` stop at ``/``, ``**`` does not."""
    out, index = "", 0
    while index < len(pattern):
        if pattern.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif pattern.startswith("**", index):
            out, index = out + ".*", index + 2
        elif pattern[index] == "*":
            out, index = out + "[^/]*", index + 1
        elif pattern[index] == "?":
            out, index = out + "[^/]", index + 1
        elif pattern[index] == "[" and "]" in pattern[index + 2 :]:
            end = pattern.index("]", index + 2)
            inner = pattern[index + 1 : end].replace("\\", "\\\\")
            out += "[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]"
            index = end + 1
        else:
            out, index = out + re.escape(pattern[index]), index + 1
    return re.compile(out)


def list_files(location: Location) -> list[pafs.FileInfo]:
    """Files at a path (itself), below a directory, or matching a pattern, sorted by path.

    Names that start with ``_`` or ``.`` are left out below directories, as Arrow does.
    """
    filesystem, path = location.filesystem, location.path
    whole = filesystem.get_file_info(path)
    if whole.type == pafs.FileType.File:
        return [whole]
    pattern = None
    if whole.type == pafs.FileType.NotFound and has_wildcard(path):
        pattern = glob_regex(path)
        path = _WILD.split(path)[0].rpartition("/")[0]
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = [info for info in filesystem.get_file_info(selector) if info.is_file]
    if pattern is not None:
        return sorted((i for i in infos if pattern.fullmatch(i.path)), key=lambda i: i.path)
    hidden = len(path.rstrip("/")) + 1
    seen = [i for i in infos if not any(p[:1] in "._" for p in i.path[hidden:].split("/"))]
    return sorted(seen, key=lambda i: i.path)


def read_bytes(location: Location) -> bytes:
    """A file as it is now.

    Raises:
        FileNotFoundError: also where it was removed between opening and reading, for which object
            stores have another error.
    """
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            return bytes(stream.read())
    except OSError as error:
        if isinstance(error, FileNotFoundError) or exists(location):
            raise
        raise FileNotFoundError(location.uri) from error


def exists(location: Location) -> bool:
    return location.filesystem.get_file_info(location.path).type != pafs.FileType.NotFound


def write_atomic(location: Location, data: bytes | pa.Buffer) -> None:
    """Write a file that readers see whole or not at all, overwriting one of that name.

    Locally: temporary name, flush to disk, rename; the temporary name is hidden, so that readers of
    the directory pass over what a killed process left. Object stores show an object when its upload
    is complete, so they get the final name at once.
    """
    if location.local:
        _write_local(Path(location.path), data)
        return
    # Arrow completes an upload whenever its stream is closed, be it by an exception, and then shows
    # what had been written by then. A failed request does not do that, but Ctrl-C between opening
    # and writing would. It is not raised in other threads, and Python waits for those of a pool.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_put, location, data).result()


def _put(location: Location, data: bytes | pa.Buffer) -> None:
    with location.filesystem.open_output_stream(location.path) as stream:
        stream.write(data)


def _write_local(path: Path, data: bytes | pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _flush_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    """Make the names in it last: without this, a power cut may bring the old ones back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def sweep(directory: Location) -> int:
    """Remove what killed writers left in a directory; only while nobody writes there.

    Returns the number of files removed. Object stores have nothing of the kind.
    """
    if not directory.local or not Path(directory.path).is_dir():
        return 0
    left = [path for path in Path(directory.path).iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def make_directory(location: Location) -> None:
    if location.local:
        Path(location.path).mkdir(parents=True, exist_ok=True)
