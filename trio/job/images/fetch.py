"""The bytes behind a path or URI that a row names, as far as the policy allows to read them.

INPUT the name and the directory of the row's shard; OUTPUT the file's bytes. Local files have to be
regular ones and lie, links followed, below that directory or one of the policy's roots.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from trio.errors import UserError
from trio.job.images import web
from trio.job.images.policy import PORTS, SCHEMES, ImagePolicy, RowError, origin_for, redact

if TYPE_CHECKING:
    from trio.job.storage import Location

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
_KINDS = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def fetch(name: str, base: str | None, policy: ImagePolicy) -> bytes:
    """Bytes of the file that a row names; ``base`` is its shard's directory, a path or URI.

    Raises:
        RowError: not allowed, not there, too large, or too slow.
    """
    if not name.strip() or "\0" in name:
        raise RowError("image_missing", "the row's image path is empty or no path")
    scheme = _scheme(name)
    if scheme == "file":
        return _local(unquote(urlsplit(name).path), base, policy)
    if scheme is not None:
        return _remote(name, scheme, policy)
    if base is None or _scheme(base) is None:
        return _local(os.path.join(base or os.getcwd(), name), base, policy)
    if name.startswith("/"):
        return _local(name, None, policy)
    if ".." in name.split("/"):
        raise RowError("image_forbidden", f"{redact(name)} leaves the directory of its shard")
    return _stored(_store(base).join(name), redact(name), policy)


def is_remote(base: str | None) -> bool:
    """Whether a shard's directory is on no local disk."""
    return base is not None and _scheme(base) is not None


def _scheme(name: str) -> str | None:
    """Lower-case scheme of a URI, None for a path."""
    head, sign, _ = name.partition("://")
    plain = head.replace("+", "").replace("-", "").replace(".", "")
    return head.lower() if sign and plain.isalnum() and plain.isascii() else None


def _local(path: str, base: str | None, policy: ImagePolicy) -> bytes:
    """A regular file below the shard's directory (when that is local) or one of the roots."""
    shown = redact(path)
    try:
        real = os.path.realpath(path)
        roots = [os.path.realpath(r) for r in (base, *policy.roots) if r and _scheme(r) is None]
        if not any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
            raise RowError(
                "image_forbidden",
                f"{shown} lies outside of its shard's directory and of all --image-roots",
            )
        _check_regular(os.lstat(real), shown)
        with os.fdopen(os.open(real, _OPEN), "rb") as stream:
            status = os.fstat(stream.fileno())
            _check_regular(status, shown)
            if status.st_size > policy.max_bytes:
                raise RowError("image_oversized", f"{shown}: {status.st_size} bytes")
            return stream.read(status.st_size + 1)
    except FileNotFoundError as error:
        raise RowError("image_not_found", f"{shown}: no such file") from error
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise RowError("image_not_found", f"{shown}: cannot be read ({reason})") from error


def _check_regular(status: os.stat_result, shown: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise RowError("image_not_found", f"{shown}: its links lead in a circle")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
        raise RowError("image_forbidden", f"{shown} is a {kind}, not a regular file")


def _remote(name: str, scheme: str, policy: ImagePolicy) -> bytes:
    web_page, shown = scheme in PORTS, redact(name)
    if scheme not in SCHEMES:
        kind = "image_forbidden" if policy.allow_remote else "image_remote"
        raise RowError(kind, f"{shown}: {scheme}:// is never fetched")
    bucket, _, key = name.partition("://")[2].partition("/")
    listed = f"--remote-images-from {scheme}://{redact(f'{scheme}://{bucket}').partition('://')[2]}"
    if not policy.allow_remote:
        flags = "--allow-remote-images" + ("" if web_page else f" {listed}")
        raise RowError("image_remote", f"{scheme}:// is not fetched without {flags}")
    if web_page:
        return web.fetch(name, policy)
    if origin_for(policy, scheme, bucket, None) is None:
        # without being named a bucket would be whatever the node's own credentials can read
        raise RowError("image_forbidden", f"{shown}: to be fetched only with {listed}")
    if "@" in bucket or "?" in name or "::" in name:
        # Options could name another server, and fsspec's chains another file system.
        raise RowError("image_forbidden", f"{shown}: a row's URI may not carry options")
    store = _store(f"{scheme}://{bucket}")
    return _stored(store.at(f"{bucket}/{key}"), shown, policy)


@lru_cache(maxsize=64)
def _store(uri: str) -> Location:
    """The directory or bucket on its file system; opening one may ask its server for the region."""
    from trio.job.storage import locate

    try:
        return locate(uri)
    except UserError as error:
        raise RowError("image_not_found", f"{redact(uri)} cannot be opened") from error


def _stored(location: Location, shown: str, policy: ImagePolicy) -> bytes:
    import pyarrow as pa

    try:
        with location.filesystem.open_input_file(location.path) as stream:
            size = stream.size()
            if size > policy.max_bytes:
                raise RowError("image_oversized", f"{shown}: {size} bytes")
            return bytes(stream.read())
    except FileNotFoundError as error:
        raise RowError("image_not_found", f"{shown}: no such file") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = type(error).__name__
        raise RowError("image_not_found", f"{shown}: cannot be read ({reason})") from error
