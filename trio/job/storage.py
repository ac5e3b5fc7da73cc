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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qsl, unquote_to_bytes

import pyarrow as pa
from fsspec.utils import glob_translate
from pyarrow import fs as pafs

from trio.errors import UserError, first_line

ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"})
# all others are fsspec's
ROOTED, AZURE = ("hdfs", "viewfs"), ("abfs", "abfss")
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
_SECRET = re.compile(r"secret|token|key|password|credential|signature", re.IGNORECASE)
_TEMPORARY = f".*.{8 * '[0-9a-f]'}.tmp"
_WILD = re.compile(r"[*?\[]")
_OPTIONS = re.compile(r"\w+=[^&?]*(&\w+=[^&?]*)*")


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
        no_options = "" if bare(name) == name else "?&"
        return name + (self.query or no_options)

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
    if options == "&":
        return name, ""
    return (name, f"?{options}") if _OPTIONS.fullmatch(options) else (uri, "")


def bare(uri: str) -> str:
    """A path or URI without the options of its file system: what a shard is called."""
    return split_options(uri)[0]


def _through_arrow(scheme: str, uri: str) -> Location:
    """Only host and options go through Arrow's parser: it refuses or decodes letters of names."""
    whole, query = split_options(uri)
    host, _, name = whole.partition("://")[2].partition("/")
    options = query
    if scheme == "s3":
        # Puts a small object by one request instead of three; and a process that dies in the middle
        # leaves nothing on the store that would have to be cleared away.
        options += f"{'&' if query else '?'}allow_delayed_open=true"
    try:
        filesystem, root = pafs.FileSystem.from_uri(f"{scheme}://{host}{options}")
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


def _through_fsspec(uri: str) -> Location:
    """Only scheme and host choose the file system: "::" in a name would else be taken for two."""
    from fsspec.core import url_to_fs

    scheme, _, rest = uri.partition("://")
    filesystem, _ = url_to_fs(f"{scheme}://{rest.partition('/')[0]}")
    path = str(filesystem._strip_protocol(uri))
    prefix = "" if path.startswith(f"{scheme}://") else f"{scheme}://"
    wrapped = pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    return Location(filesystem=wrapped, path=path, prefix=prefix)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path fits a pattern: ``*`` and ``?`` stop at ``/``, ``**`` does not.

    Hidden names fit only where the pattern spells their first letter out.

    Raises:
        ValueError: ``**`` within a name.
    """
    fits = re.compile(glob_translate(pattern)).match
    spelled_out = [part for part in pattern.split("/") if _is_hidden(part)]

    def shown(name: str) -> bool:
        return not _is_hidden(name) or any(fnmatchcase(name, part) for part in spelled_out)

    return lambda path: fits(path) is not None and all(map(shown, path.split("/")))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


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
    if whole.type == pafs.FileType.NotFound and _WILD.search(path):
        base, pattern = _start_of_pattern(location)
    fits, below = matcher(pattern), len(base.rstrip("/")) + 1 if base else 0
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    found = [info for info in infos if info.is_file and fits(info.path[below:])]
    return sorted(found, key=lambda info: info.path)


def start_of(location: Location) -> Location:
    """The directory that a directory or pattern is looked through from."""
    whole = location.filesystem.get_file_info(location.path)
    if whole.type == pafs.FileType.NotFound and _WILD.search(location.path):
        return location.at(_start_of_pattern(location)[0])
    return location


def _start_of_pattern(location: Location) -> tuple[str, str]:
    """The directory that a pattern starts from, and the rest of it.

    Directories may have ``[`` in their names: one that is there by that very name is no pattern.
    """
    parts = location.path.split("/")
    for count, part in enumerate(parts):
        if _WILD.search(part):
            here = location.filesystem.get_file_info("/".join(parts[: count + 1]))
            if here.type != pafs.FileType.Directory:
                break
    base = "/".join(parts[:count]) or "/" * location.path.startswith("/")
    return base, "/".join(parts[count:])


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


@contextmanager
def writing(location: Location) -> Iterator[pa.NativeFile]:
    """A stream to a file that is larger than memory, lasting when the block ends.

    Where the block fails, part of the file may stay: only for names that no reader knows yet.
    """
    make_directory(location.at(location.path.rpartition("/")[0]))
    with location.filesystem.open_output_stream(location.path) as stream:
        yield stream
    if location.local:
        with open(location.path, "rb") as written:
            os.fsync(written.fileno())
        flush(location.at(location.path.rpartition("/")[0]))


def move(source: Location, target: Location) -> None:
    """Give a file another name in one step; on object stores: a copy, seen when it is whole, and
    then the source goes."""
    source.filesystem.move(source.path, target.path)
    flush(target.at(target.path.rpartition("/")[0]))


def remove(location: Location) -> None:
    location.filesystem.delete_file(location.path)


def remove_directory(location: Location) -> None:
    """With all that is in it; nothing where there is none."""
    if exists(location):
        location.filesystem.delete_dir(location.path)


def empty_directory(location: Location) -> None:
    location.filesystem.delete_dir_contents(location.path)


def flush(directory: Location) -> None:
    """Make the names in a directory last; object stores do that by themselves."""
    if directory.local:
        _flush_directory(Path(directory.path))


def sweep(directory: Location) -> None:
    """Remove what killed writers left in a directory; only while nobody writes there.

    Object stores have nothing of the kind.
    """
    if directory.local:
        for path in Path(directory.path).glob(_TEMPORARY):
            path.unlink(missing_ok=True)


def make_directory(location: Location) -> None:
    if location.local:
        Path(location.path).mkdir(parents=True, exist_ok=True)
