"""Images that stand in a cell as text: base64, and ``data:`` URLs.

INPUT a cell's text, or bytes that hold such text; OUTPUT the encoded image. Text is taken for
base64 only if what it stands for begins as an image, or another known file, does.
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from trio.job.images import formats
from trio.job.images.policy import RowError

LEAST = 32
# characters of base64 that are not perhaps a word
HEAD = 8192
# characters that are looked at first; enough for every signature
_DATA = re.compile(rb"\s*(?:data:([^,]{0,300})|(image/[^,]{1,99};\s*base64)),", re.IGNORECASE)
# its media type and encoding; as it is found in the wild, without `data:` too
_ALPHABET = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n\f\v"
_QUOTE = re.compile(rb"\s*(b?)(['\"])")
# before text that was written as a literal; `b` where it was bytes
NAME = 64
# digits of base64 that are more than most names have
_DIGITS = re.compile(rb"[A-Za-z0-9+/]+")


def is_text_of_image(text: bytes) -> bool:
    """Whether text is a ``data:`` URL or base64 of something known."""
    text = bare(text)
    return _is_data(text) or _is_base64(text)


def is_certain(text: bytes) -> bool:
    """Whether it can be nothing else, such as a path."""
    match = _DATA.match(bare(text))
    kind = _kind(match) if match else b""
    return kind.startswith(b"image/") or kind.endswith(b"base64")


def decoded(text: bytes) -> bytes:
    """The encoded image that the text stands for.

    Raises:
        RowError: it is damaged.
    """
    text = bare(text)
    match = _DATA.match(text)
    if match is None:
        return _from_base64(text, "base64 text")
    body = text[match.end() :]
    if b"%" in body:
        body = unquote_to_bytes(body)
    if not _kind(match).endswith(b"base64"):
        return body
    return _from_base64(body, "base64 of a data: URL")


def _is_data(text: bytes) -> bool:
    match = _DATA.match(text)
    kind = _kind(match) if match else b"?"
    return not kind or b"/" in kind or b";" in kind or b"base64" in kind


def _kind(match: re.Match[bytes]) -> bytes:
    return bytes(match[1] if match[2] is None else match[2]).strip().lower()


def bare(text: bytes) -> bytes:
    """Without the quotes of a literal, as in ``"iVBOR..."`` and ``b'iVBOR...'``; the second one is
    not there where text is only a file's beginning."""
    match = _QUOTE.match(text)
    if match is None:
        return text
    return text[match.end() :].rstrip(_SPACE).removesuffix(match[2])


def is_digits(text: bytes) -> bool:
    """Whether text may be base64 of something, known or not."""
    return _DIGITS.fullmatch(_plain(bare(text)).rstrip(b"=")) is not None


def is_no_name(text: bytes) -> bool:
    """Whether text that names no file is hardly meant to: a literal of bytes, or a long run of
    base64's digits. One in 32 of these is a slash or a dash, of a path's letters many more are."""
    match = _QUOTE.match(text)
    if match is not None and match[1]:
        return True
    text = bare(text).strip()
    dense = 16 * sum(map(text.count, (b"/", b"-", b"_"))) > len(text)
    return len(text) > NAME and b" " not in text and not dense and is_digits(text)


def _is_base64(text: bytes) -> bool:
    match = _DIGITS.match(_plain(text[:HEAD]))
    digits = match[0] if match else b""
    if len(digits) < LEAST:
        return False
    start = binascii.a2b_base64(digits[: len(digits) // 4 * 4])
    return formats.name_of(start, short=False) is not None


def _plain(text: bytes) -> bytes:
    """Without white space, in the standard alphabet."""
    return text.translate(_ALPHABET, _SPACE)


def _from_base64(text: bytes, what: str) -> bytes:
    plain = _plain(text).rstrip(b"=")
    try:
        return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)
    except binascii.Error as error:
        message = f"{what} that cannot be decoded ({len(text)} characters)"
        raise RowError("image_unreadable", message) from error
