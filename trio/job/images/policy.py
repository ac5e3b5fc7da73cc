"""What an image of a row may be and where it may come from, and the error a row ends with.

Settings only, so that every process can load them quickly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from trio.errors import UserError

MAX_PIXELS = 90_000_000
MAX_BYTES = 256 << 20
ROW_TIMEOUT_S = 60.0
SCHEMES = ("https", "http", "s3", "gs", "gcs", "hf", "abfs", "abfss", "hdfs", "viewfs")
PORTS = {"http": 80, "https": 443}
# of the schemes that --allow-remote-images alone allows: all others are read with credentials
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_ORIGIN = re.compile(
    r"(?P<scheme>\w+)://"
    r"(?P<host>\*|(?:\*\.)?[^\s/@?#*:\[\]]+|\[[\da-fA-F:.]+\])"
    r"(?::(?P<port>\d+))?/?"
)
_SHOWN = 200
# characters of a path or URI in a message
_LONGEST = 1000
# characters of a message: whatever it quotes, no image is written into the output


class RowError(Exception):
    """A mistake in one input row: it becomes that row's ``error`` and touches no other."""

    def __init__(self, kind: str, message: str) -> None:
        message = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePolicy:
    """What may be opened."""

    max_pixels: int = MAX_PIXELS
    # width times height
    max_bytes: int = MAX_BYTES
    # of the encoded image
    allow_remote: bool = False
    # fetch URIs found in rows; paths relative to a remote shard are always read
    remote_from: tuple[str, ...] = ()
    # origins (``parse_origin``) that URIs may name; none: public web servers
    roots: tuple[str, ...] = ()
    # local directories that paths may lead into, besides that of the row's shard
    row_timeout: float = ROW_TIMEOUT_S
    # seconds for fetching and decoding the images of one row


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme and host that may be read from; ``*`` and ``*.domain`` stand for many hosts."""

    scheme: str
    host: str
    port: int | None

    @property
    def literal(self) -> bool:
        """Whether it names one host: that one may have a private address."""
        return not self.host.startswith("*")

    def covers(self, scheme: str, host: str, port: int | None) -> bool:
        if (scheme, port or PORTS.get(scheme)) != (self.scheme, self.port):
            return False
        host = host.lower().rstrip(".")
        return host == self.host or (not self.literal and host.endswith(self.host[1:]))


def parse_origin(text: str) -> Origin:
    """``https://images.example.org``, ``https://*.cdn.net:8443`` or ``s3://bucket``.

    Raises:
        UserError: anything else.
    """
    match = _ORIGIN.fullmatch(text)
    scheme = match["scheme"].lower() if match else ""
    if match is None or scheme not in SCHEMES or int(match["port"] or 0) > 65535:
        raise UserError(
            "an origin is scheme://host, as in https://images.example.org, https://*.cdn.net or"
            f" s3://bucket, with a scheme of {', '.join(SCHEMES)} and no path; got {redact(text)!r}"
        )
    host = match["host"].strip("[]").lower().rstrip(".")
    return Origin(scheme, host, int(match["port"]) if match["port"] else PORTS.get(scheme))


@lru_cache(maxsize=8)
def _origins(texts: tuple[str, ...]) -> tuple[Origin, ...]:
    """Origins of a policy, those that name one host first."""
    return tuple(sorted(map(parse_origin, texts), key=lambda origin: not origin.literal))


def origin_for(policy: ImagePolicy, scheme: str, host: str, port: int | None) -> Origin | None:
    """What allows to read from a host; None where nothing does."""
    if not policy.remote_from:
        return Origin(scheme, "*", port) if scheme in PORTS else None
    listed = _origins(policy.remote_from)
    return next((origin for origin in listed if origin.covers(scheme, host, port)), None)


def redact(name: str) -> str:
    """A path or URI for a message: a URI without user, query and fragment; cut, on one line."""
    if _SCHEME.match(name):
        name = re.sub(r"[?#].*", "", name, flags=re.DOTALL)
        name = re.sub(r"^([^:]+:[/\\]*)[^/]*@", r"\1", name)
    name = "".join(c if c.isprintable() else "?" for c in name[: _SHOWN + 1])
    return name if len(name) <= _SHOWN else name[: _SHOWN - 3] + "..."
