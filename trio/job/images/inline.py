"""Images that stand in a cell as text: base64, and ``data:`` URLs.

INPUT a cell's text, or bytes that hold such text; OUTPUT the encoded image. Text is taken for
base64 only if what it stands for begins as an image does.
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from trio.job.images import formats
from trio.job.images.policy import RowError

_LEAST = 32
# digits of base64 that are not perhaps a word
_DATA_URL = re.compile(rb"data:[^,]{0,300}?(;\s*base64)?\s*,", re.IGNORECASE)
_QUOTE = re.compile(rb"b?(['\"])")
# before text that was written as a literal; `b` where it was bytes
_DIGITS = re.compile(rb"[A-Za-z0-9+/]+")


def stands_for_image(text: bytes) -> bool:
    """Whether text is a ``data:`` URL, or base64 of an image."""
    text = _bare(text)
    match = _DIGITS.match(_plain(text[: 2 * formats.HEAD]))
    digits = match[0] if match else b""
    if len(digits) < _LEAST:
        return _DATA_URL.match(text) is not None
    return formats.name_of(binascii.a2b_base64(digits[: len(digits) // 4 * 4])) in formats.TAKEN


def decoded(text: bytes) -> bytes:
    """The encoded image that the text stands for.

    Raises:
        RowError: it is damaged.
    """
    text = _bare(text)
    if match := _DATA_URL.match(text):
        text = unquote_to_bytes(text[match.end() :])
        if not match[1]:
            return text
    plain = _plain(text).rstrip(b"=")
    try:
        return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)
    except binascii.Error as error:
        message = f"base64 text that cannot be decoded ({len(text)} characters)"
        raise RowError("image_unreadable", message) from error


def _bare(text: bytes) -> bytes:
    """Without space around it, and the quotes of a literal."""
    text = text.strip()
    match = _QUOTE.match(text)
    return text[match.end() :].removesuffix(match[1]).strip() if match else text


def _plain(text: bytes) -> bytes:
    """Without white space, in the standard alphabet."""
    return text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v")
