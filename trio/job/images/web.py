"""An image from a web server: allowed hosts only, and never a private address unless it is named.

INPUT an http or https URL found in a row; OUTPUT the bytes that the server sends. Each redirect is
checked like the URL itself. Proxies of the environment are not used: what a proxy connects to could
not be checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from contextlib import suppress
from functools import cache
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from trio.job.images.policy import PORTS, ImagePolicy, RowError, origin_for, redact

MAX_REDIRECTS = 3
SILENCE_S = 30.0
# without a byte from a server; --row-timeout limits the whole
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"User-Agent": "trio-vlm", "Accept": "image/*,*/*", "Accept-Encoding": "identity"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, policy: ImagePolicy) -> bytes:
    """Body of the answer to a GET, after at most MAX_REDIRECTS redirects.

    Raises:
        RowError: not allowed, not there, too large, or too slow.
    """
    shown = redact(url)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            answer = _get(parts, policy)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
            if parts.scheme.lower() == "https" and urlsplit(url).scheme != "https":
                raise RowError("image_forbidden", f"{shown} redirects from https to {redact(url)}")
    except TimeoutError as error:
        raise RowError("image_timeout", f"{shown}: no answer from the server") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RowError("image_not_found", f"{shown}: {type(error).__name__}") from error
    raise RowError("image_not_found", f"{shown}: more than {MAX_REDIRECTS} redirects")


def _get(parts: SplitResult, policy: ImagePolicy) -> bytes | str:
    """The body, or where the server sends us instead."""
    scheme, host, shown = parts.scheme.lower(), parts.hostname or "", redact(parts.geturl())
    if scheme not in PORTS or not host:
        raise RowError("image_forbidden", f"{shown} is no http or https address")
    if parts.username is not None or parts.password is not None:
        raise RowError("image_forbidden", f"{shown}: an address with credentials is not used")
    origin = origin_for(policy, scheme, host, parts.port)
    if origin is None:
        raise RowError("image_forbidden", f"{shown}: its host is not in --remote-images-from")
    port = parts.port or PORTS[scheme]
    connection_type = (
        http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    )
    connection = connection_type(host, port, timeout=min(SILENCE_S, policy.row_timeout))
    try:
        named = bool(policy.remote_from) and origin.literal
        connection.sock = _connect(host, port, connection.timeout, private=named, shown=shown)
        if scheme == "https":
            connection.sock = _tls().wrap_socket(connection.sock, server_hostname=host)
        target = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
        connection.request("GET", quote(target, safe="%/:=&?~+!$,;'@()*[]"), headers=_HEADERS)
        with connection.getresponse() as response:
            return _body(response, shown, policy)
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse, shown: str, policy: ImagePolicy) -> bytes | str:
    location = response.getheader("Location")
    if response.status in _REDIRECTS and location:
        return location
    if response.status != 200:
        raise RowError("image_not_found", f"{shown}: HTTP status {response.status}")
    most = policy.max_bytes
    if (response.length or 0) > most or len(body := response.read(most + 1)) > most:
        raise RowError("image_oversized", f"{shown}: more than {most} bytes")
    if response.length:
        raise RowError("image_truncated", f"{shown}: {response.length} bytes did not come")
    return body


def _connect(
    host: str, port: int, timeout: float | None, *, private: bool, shown: str
) -> socket.socket:
    """A connection to the first address that may be used and answers."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [(str(at[0]), port) for *_, at in found if private or is_public(str(at[0]))]
    if not allowed:
        raise RowError(
            "image_forbidden",
            f"{shown}: its host has a private address; name it in --remote-images-from to allow it",
        )
    for address in allowed[:-1]:
        with suppress(OSError):
            return socket.create_connection(address, timeout)
    return socket.create_connection(allowed[-1], timeout)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet; IPv6 that stands for IPv4 is that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
