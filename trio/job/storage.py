"""Local paths and URIs behind one small interface; writes are whole or not there.

A URI is taken apart here and nowhere else: everybody else has a ``Location``. Names in URIs are
taken letter for letter, as object stores list them (``s3://bucket/hot dog/50%.parquet``); only
``file://`` is percent-encoded.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote_to_bytes

import pyarrow as pa
from pyarrow import fs as pafs

from trio.errors import UserError, first_line

ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "mock"})
ROOTED, AZURE = ("hdfs", "viewfs"), ("abfs", "abfss")
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
_SECRET = re.compile(r"secret|token|key|password|credential|signature", re.IGNORECASE)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_WILD = re.compile(r"[*?\[]")
_OPTIONS = re.compile(r"\w+=[^&?]*(&\w+=[^&?]*)*")
_NO_OPTIONS = "&"
# after a "?" at the end of a URI: another "?" before it belongs to the name
_HIDDEN = r"\.|_(?![^/]*=)"


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
    scheme, rest = scheme_of(uri), uri.partition("://")[2]
    user, sign, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    options = parse_qsl(re.sub(r"[?#]", "&", rest.partition("?")[2]))
    secret = any(_SECRET.search(name) for name, _ in options)
    if secret or ":" in user or (sign and scheme in ("s3", "gs", "gcs")):
        raise UserError(
            f"a {scheme}:// URI carries credentials: put them into the environment"
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
        """Text that ``locate`` takes back to this location."""
        name = self.prefix + self.path
        return name + (self.query or _end_of_name(name))

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

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
    if is_local(uri):
        return Location(filesystem=pafs.LocalFileSystem(), path=local_path(uri), prefix="")
    check_no_secret(uri)
    scheme, host = str(scheme_of(uri)), uri.partition("://")[2].partition("/")[0]
    try:
        return _through_arrow(scheme, uri) if scheme in ARROW_SCHEMES else _through_fsspec(uri)
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        root = f"{scheme}://{host.partition('?')[0]}"
        raise OSError(f"cannot open {root}: {first_line(error, 300)}") from error


def local_path(uri: str) -> str:
    """A local path or ``file://`` URI as an absolute path.

    Raises:
        OSError: a file of another machine, or a name that is not UTF-8, which Arrow cannot open.
    """
    path = os.path.expanduser(uri)
    if scheme_of(uri) == "file":
        host, _, rest = uri.partition("://")[2].partition("/")
        if host not in ("", "localhost"):
            raise OSError(f"{uri} names the machine {host!r}; write file:///PATH for a local file")
        path = "/" + os.fsdecode(unquote_to_bytes(rest))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise OSError(f"{path!a}: a name that is not UTF-8; rename it") from None
    return Path(path).absolute().as_posix()


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these with their "?"; "" for none.

    Options are what follows the last "?" if it reads ``name=value&...``. A name that itself goes on
    like that after a "?" is followed by ``?&``, which stands for no options.
    """
    name, sign, options = uri.rpartition("?")
    if not sign or scheme_of(uri) not in ARROW_SCHEMES:
        return uri, ""
    if options == _NO_OPTIONS:
        return name, ""
    return (name, f"?{options}") if _OPTIONS.fullmatch(options) else (uri, "")


def bare(uri: str) -> str:
    """A path or URI without the options of its file system: what a shard is called."""
    return split_options(uri)[0]


def _end_of_name(name: str) -> str:
    """What has to follow a URI without options so that no part of its name is taken for some."""
    return "" if bare(name) == name else f"?{_NO_OPTIONS}"


def _through_arrow(scheme: str, uri: str) -> Location:
    """Only host and options go through Arrow's parser: it refuses or decodes letters of names."""
    whole, query = split_options(uri)
    host, _, name = whole.partition("://")[2].partition("/")
    try:
        filesystem, root = pafs.FileSystem.from_uri(
            f"{scheme}://{host}{_in_one_request(scheme, query)}"
        )
    except pa.ArrowInvalid as error:
        hint = f" (options are what follows the last '?' of {query}; add '?&' if it is a name)"
        raise ValueError(f"{first_line(error, 200)}{hint if query else ''}") from error
    prefix, root = f"{scheme}://{host.removesuffix(root)}", root.strip("/")
    if scheme in ROOTED:
        prefix, root = f"{scheme}://{host}", ""
        name = "/" + name
    elif scheme in AZURE:
        prefix = f"{scheme}://{host.rpartition('@')[2]}/"
    path = f"{root}/{name}" if root and name else root or name
    return Location(filesystem=filesystem, path=path, prefix=prefix, query=query)


def parent(path: str) -> Location:
    """Directory of a shard: what relative image paths start from."""
    location = open_location(path)
    return location.at(location.path.rpartition("/")[0] or "/" * location.local)


def _in_one_request(scheme: str | None, query: str) -> str:
    """With the option that puts a small object by one request instead of three.

    Such an upload also leaves nothing on the store that would have to be cleared away when the
    process dies in the middle.
    """
    option = "allow_delayed_open"
    if scheme != "s3" or option in query:
        return query
    return f"{query}{'&' if query else '?'}{option}=true"


def _through_fsspec(uri: str) -> Location:
    """Only scheme and host choose the file system: "::" in a name would else be taken for two."""
    from fsspec.core import url_to_fs

    scheme, _, rest = uri.partition("://")
    filesystem, _ = url_to_fs(f"{scheme}://{rest.partition('/')[0]}")
    path = str(filesystem._strip_protocol(uri))
    prefix = "" if path.startswith(f"{scheme}://") else f"{scheme}://"
    wrapped = pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    return Location(filesystem=wrapped, path=path, prefix=prefix)


def has_wildcard(path: str) -> bool:
    return _WILD.search(path) is not None


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Shell pattern as a regular expression: ``*`` and ``?`` stop at ``/``, ``**`` does not.

    A hidden name is matched only where its first letter is spelled out.
    """
    out, index = "", 0
    while index < len(pattern):
        first = index == 0 or pattern[index - 1] == "/"
        if first and pattern[index] in "*?[" and not pattern.startswith("**/", index):
            out += f"(?!{_HIDDEN})"
        piece, index = _piece(pattern, index)
        out += piece
    return re.compile(out, re.DOTALL)


def _piece(pattern: str, index: int) -> tuple[str, int]:
    """Regular expression of the wildcard or letter at a place, and the place behind it."""
    if pattern.startswith("**/", index):
        return f"(?:(?!{_HIDDEN})[^/]*/)*", index + 3
    if pattern.startswith("**", index):
        return f"[^/]*(?:/(?!{_HIDDEN})[^/]*)*", index + 2
    if pattern[index] in "*?":
        return "[^/]*" if pattern[index] == "*" else "[^/]", index + 1
    if pattern[index] == "[" and "]" in pattern[index + 2 :]:
        end = pattern.index("]", index + 2)
        inner = re.sub(r"[\\\[&~|]", r"\\\g<0>", pattern[index + 1 : end])
        return "[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]", end + 1
    return re.escape(pattern[index]), index + 1


def list_files(location: Location) -> list[pafs.FileInfo]:
    """Files at a path (itself), below a directory, or matching a pattern, sorted by path.

    Names that start with ``.`` or ``_`` are hidden, unless they hold a ``=`` after the ``_``: as in
    Spark, ``_day=1`` is a partition. Directories and wildcards pass over hidden files and whatever
    lies in hidden directories.
    """
    filesystem, path = location.filesystem, location.path
    whole = filesystem.get_file_info(path)
    if whole.type == pafs.FileType.File:
        return [whole]
    base, pattern = path, "**"
    if whole.type == pafs.FileType.NotFound and has_wildcard(path):
        base, pattern = _start_of_pattern(location)
    regex, below = glob_regex(pattern), len(base.rstrip("/")) + 1 if base else 0
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = [info for info in filesystem.get_file_info(selector) if info.is_file]
    found = [info for info in infos if regex.fullmatch(info.path[below:])]
    return sorted(found, key=lambda info: info.path)


def _start_of_pattern(location: Location) -> tuple[str, str]:
    """The directory that a pattern starts from, and the rest of it.

    Directories may have ``[`` in their names: one that is there by that very name is no pattern.
    """
    parts = location.path.split("/")
    for count, part in enumerate(parts):
        here = location.at("/".join(parts[: count + 1]))
        if has_wildcard(part) and not _is_directory(here):
            break
    base = "/".join(parts[:count]) or "/" * location.path.startswith("/")
    return base, "/".join(parts[count:])


def _is_directory(location: Location) -> bool:
    info = location.filesystem.get_file_info(location.path)
    return bool(info.type == pafs.FileType.Directory)


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
