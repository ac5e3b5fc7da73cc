"""Regexes of Python as xgrammar reads them: what means something else there is refused by name.

Classes like `\\w` are of ASCII to both, as with `re.ASCII`. Halves of characters (surrogates),
which decode to something else, are in no class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trio.errors import UserError

Span = tuple[int, int]
"""Characters from one to another, by their numbers."""
SURROGATES: Span = (0xD800, 0xDFFF)
_MEMBER = r"\\x..|\\u....|\\.|."
_PIECE = re.compile(r"\[\^?(?:\\.|[^\]\\])*\]|" + _MEMBER, re.DOTALL)
_ESCAPES = frozenset("dDwWsSntrfvux")
"""Letters behind a backslash that are followed."""
_CONTROL = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_ESCAPED: tuple[Span, ...] = ((0, 31), (ord('"'), ord('"')), (ord("\\"), ord("\\")))
"""Characters that stand in no JSON text as they are."""


def _others(spans: Sequence[Span]) -> tuple[Span, ...]:
    """All characters but these, which are in order."""
    ends = [-1, *(number for span in spans for number in span), 0x110000]
    return tuple((a + 1, b - 1) for a, b in zip(ends[::2], ends[1::2], strict=True) if b - a > 1)


_CLASSES: dict[str, tuple[Span, ...]] = {
    "d": ((0x30, 0x39),),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
}
_CLASSES |= {name.upper(): _others((*spans, SURROGATES)) for name, spans in _CLASSES.items()}


def translated(regex: str) -> str:
    """A regex of Python as the library reads it.

    Raises:
        UserError: it is none, or cannot be followed exactly.
    """
    return "".join(map(_as_there, _pieces(regex)))


def translated_pattern(regex: str) -> str:
    """The same of a `pattern` of JSON Schema, which is searched in a text.

    Raises:
        UserError: as above, or it is not that of a whole text, or names what JSON escapes.
    """
    pieces = _pieces(regex)
    if not _is_of_all(pieces):
        raise UserError(
            f"pattern {regex!r:.80} may match a part of a text; write ^...$, or ^(...)$ around |"
        )
    for piece in pieces:
        trouble = _trouble_in_json(piece)
        if trouble is not None:
            raise UserError(f"pattern {regex!r:.80}: {trouble}")
    return "".join(_as_there(piece, (*_ESCAPED, SURROGATES)) for piece in pieces)


def _pieces(regex: str) -> list[str]:
    """Characters, escapes and classes."""
    try:
        re.compile(regex, re.ASCII)
    except (re.error, ValueError, OverflowError) as error:
        raise UserError(f"regex {regex!r:.80}: {error}") from error
    pieces = _PIECE.findall(regex)
    for place, piece in enumerate(pieces):
        trouble = _trouble(piece, first=place == 0, last=place == len(pieces) - 1)
        if trouble is not None:
            raise UserError(f"regex {regex!r:.80}: {trouble}")
    return pieces


def _trouble(piece: str, *, first: bool, last: bool) -> str | None:
    """Why a piece of a regex cannot be followed."""
    if (piece == "^" and not first) or (piece == "$" and not last):
        return f"{piece} in the middle is not followed; the whole answer has to match without it"
    if piece in ("[]", "[^]"):
        return r"write ] in a class as \]"
    for letter in re.findall(r"\\(.)", piece, re.DOTALL):
        if letter.isalnum() and letter not in _ESCAPES:
            return rf"\{letter} is not followed"
    halves = (SURROGATES[0] <= a <= b <= SURROGATES[1] for a, b in _named(piece))
    return r"\ud800 to \udfff are no characters; leave them out" if any(halves) else None


def _is_of_all(pieces: Sequence[str]) -> bool:
    """Whether it is ^...$ with no alternation but in groups."""
    depth = 0
    for piece in pieces:
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            return False
    return len(pieces) > 1 and (pieces[0], pieces[-1]) == ("^", "$")


def _trouble_in_json(piece: str) -> str | None:
    """Why a piece of a pattern cannot be followed."""
    letters = set(re.findall(r"\\([a-zA-Z])", piece.replace(r"\\", "")))
    if letters & set("DWS") or (piece.startswith("[^") and letters & set("dws")):
        return rf"what {piece:.20} shuts out is not the same to all readers of JSON; name it"
    if any(_is_escaped(a) and _is_escaped(b) for a, b in _named(piece)):
        return f"{piece:.20} names a character that JSON escapes, which is not followed"
    return None


def _is_escaped(number: int) -> bool:
    return any(a <= number <= b for a, b in _ESCAPED)


def _as_there(piece: str, never: Sequence[Span] = (SURROGATES,)) -> str:
    """`never`: in no class."""
    if piece == ".":
        return rf"[^{_written(*never)}\n]"
    if len(piece) > 1 and piece[0] == "[":
        shut = piece.startswith("[^")
        spans = [span for member in _members(piece[1 + shut : -1]) for span in member]
        return f"[^{_written(*never, *spans)}]" if shut else _class(spans, never)
    return _class(_CLASSES[piece[1]], never) if _is_class(piece) else piece


def _class(given: Sequence[Span], never: Sequence[Span]) -> str:
    """One of these characters. The library takes ^ for a negation where it comes first, also as an
    escape."""
    both = [(max(a, c), min(b, d)) for a, b in given for c, d in _others(never)]
    spans = [(a, b) for a, b in both if a <= b]
    last = max(b for _, b in spans)
    if {a for a, _ in spans} != {ord("^")}:
        spans = sorted(spans, key=lambda span: span[0] == ord("^"))
    elif last == ord("^"):
        return r"\^"
    else:
        spans = [(last, last), *spans]
    return f"[{_written(*spans)}]"


def _named(piece: str) -> Iterator[Span]:
    """The characters that a piece lets in by their names."""
    if len(piece) > 1 and piece[0] == "[":
        if not piece.startswith("[^"):
            yield from (member[0] for member in _members(piece[1:-1]) if len(member) == 1)
    elif not _is_class(piece) and piece != ".":
        yield _number(piece), _number(piece)


def _members(inner: str) -> Iterator[tuple[Span, ...]]:
    """What stands in a class."""
    units = re.findall(_MEMBER, inner, re.DOTALL)
    place = 0
    while place < len(units):
        unit = units[place]
        is_range = units[place + 1 : place + 2] == ["-"] and place + 2 < len(units)
        if _is_class(unit):
            yield _CLASSES[unit[1]]
        else:
            yield ((_number(unit), _number(units[place + 2] if is_range else unit)),)
        place += 3 if is_range else 1


def _number(unit: str) -> int:
    """Of a character or an escape."""
    if unit[:2] in ("\\x", "\\u"):
        return int(unit[2:], 16)
    return _CONTROL.get(unit[1], ord(unit[1])) if len(unit) == 2 else ord(unit)


def _is_class(unit: str) -> bool:
    return unit[0] == "\\" and unit[1:] in _CLASSES


def _written(*spans: Span) -> str:
    return "".join("-".join(map(_escape, span)) for span in spans)


def _escape(number: int) -> str:
    return rf"\u{number:04x}" if number < 0x10000 else chr(number)
