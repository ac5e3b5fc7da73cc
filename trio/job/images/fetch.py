"""The bytes behind a path or URI that a row names, as far as the policy allows to read them.

INPUT the name and the directory of the row's shard; OUTPUT the file's bytes. Local files have to be
regular ones and lie, links followed, below that directory or one of the policy's roots.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from trio.errors import UserError
from trio.job.images import web
from trio.job.images.policy import PORTS, SCHEMES, ImagePolicy, RowError, origin_for, redact
from trio.job.storage import Location, local_path, locate, scheme_of


def fetch(name: str, base: Location | None, policy: ImagePolicy) -> bytes:
    """Bytes of the file that a row names; ``base`` is its shard's directory.

    Raises:
        RowError: not allowed, not there, too large, or too slow.
    """
    if not name.strip() or "\0" in name:
        raise RowError("image_missing", "the row's image path is empty or no path")
    scheme = scheme_of(name)
    if scheme and scheme != "file":
        return _remote(name, scheme, policy)
    if scheme == "file" or base is None or base.local or name.startswith("/"):
        return _local(name, base, policy)
    if ".." in name.split("/"):
        raise RowError("image_forbidden", f"{redact(name)} leaves the directory of its shard")
    return _stored(base.join(name), redact(name), policy)


def _local(name: str, base: Location | None, policy: ImagePolicy) -> bytes:
    """A regular file below the shard's directory (when that is local) or one of the roots."""
    shown, here = redact(name), [base.path] if base and base.local else []
    try:
        path = local_path(name) if scheme_of(name) else os.path.join(*here, name)
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(os.path.realpath(root)) for root in (*here, *policy.roots)):
            raise RowError(
                "image_forbidden",
                f"{shown} lies outside of its shard's directory and of all --image-roots",
            )
        status = real.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RowError("image_forbidden", f"{shown} is not a regular file")
        if status.st_size > policy.max_bytes:
            raise RowError("image_oversized", f"{shown}: {status.st_size} bytes")
        return real.read_bytes()
    except (OSError, ValueError) as error:
        raise _unread(shown, error) from error


def _unread(shown: str, error: Exception) -> RowError:
    gone = isinstance(error, FileNotFoundError)
    reason = "no such file" if gone else f"cannot be read ({type(error).__name__})"
    return RowError("image_not_found", f"{shown}: {reason}")


def _remote(name: str, scheme: str, policy: ImagePolicy) -> bytes:
    shown = redact(name)
    bucket, _, key = name.partition("://")[2].partition("/")
    if scheme not in SCHEMES:
        kind = "image_forbidden" if policy.allow_remote else "image_remote"
        raise RowError(kind, f"{shown}: {scheme}:// is never fetched")
    listed = f"--remote-images-from {redact(f'{scheme}://{bucket}')}"
    if not policy.allow_remote:
        flags = "--allow-remote-images" + ("" if scheme in PORTS else f" {listed}")
        raise RowError("image_remote", f"{scheme}:// is not fetched without {flags}")
    if scheme in PORTS:
        return web.fetch(name, policy)
    if origin_for(policy, scheme, bucket, None) is None:
        # without being named a bucket would be whatever the node's own credentials can read
        raise RowError("image_forbidden", f"{shown}: to be fetched only with {listed}")
    if "@" in bucket or "?" in name or "::" in name:
        # Options could name another server, and fsspec's chains another file system.
        raise RowError("image_forbidden", f"{shown}: a row's URI may not carry options")
    try:
        store = _store(f"{scheme}://{bucket}")
    except UserError as error:
        raise RowError("image_not_found", f"{scheme}://{bucket} cannot be opened") from error
    return _stored(store.at(f"{bucket}/{key}"), shown, policy)


@lru_cache(maxsize=64)
def _store(uri: str) -> Location:
    """A bucket on its file system; opening one may ask its server for the region."""
    return locate(uri)


def _stored(location: Location, shown: str, policy: ImagePolicy) -> bytes:
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            size = stream.size()
            if size > policy.max_bytes:
                raise RowError("image_oversized", f"{shown}: {size} bytes")
            return bytes(stream.read())
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unread(shown, error) from error
