"""Rows of a WebDataset tar: the members of one key, which is their path up to the first dot of
their name, one after the other.

INPUT the tar; OUTPUT raw rows (see `raw_rows`) whose pictures are places in the tar.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from trio.job.images.policy import MAX_BYTES
from trio.job.input.kinds import json_fields
from trio.job.input.kinds.raw_rows import ERROR_COLUMN, MOST_TEXT, Notes, text_of
from trio.job.input.kinds.read_ahead import ReadAhead
from trio.job.input.kinds.shard_kinds import PICTURE_SUFFIXES, suffix_of
from trio.job.input.kinds.tar_members import Member, TarEnd, members

PLACES = pa.list_(pa.struct([("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
"""A row's pictures: member, and where its bytes lie."""
PICTURES = pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
"""What the reader makes of them."""
CUT = "shard_cut"
TEXTS = frozenset({"txt", "json"})
# suffixes of members that become columns


def samples(file: ReadAhead, tar: str, notes: Notes) -> Iterator[dict[str, Any]]:
    """Rows of a tar that messages and ids call `tar`."""
    end = TarEnd()
    for key, told in groupby(_told(file, end, notes), lambda one: one[0]):
        group = [(member, text) for _, member, text in told]
        yield _row(f"{tar}/{json_fields.clean(key)}", group, notes)
    if end.damaged is not None:
        reason = f"no tar header at byte {end.damaged}: what is behind it is lost"
        yield _lost(f"{tar}@{end.damaged}", reason)
    elif not end.marked:
        notes.add("tars without an end mark, which may be cut", tar)


def _told(file: ReadAhead, end: TarEnd, notes: Notes) -> Iterator[tuple[str, Member, str | None]]:
    """Key, member and its text, which is read before the file goes on."""
    for member in members(file, end):
        if (key := _key(member)) is not None:
            is_text = member.whole and _suffix(member) in TEXTS
            yield key, member, _text(file, member, notes) if is_text else None


def _key(member: Member) -> str | None:
    """None for a member that belongs to no row: hidden, or without a dot."""
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    key, dot, _ = name.partition(".")
    return f"{folder}{slash}{key}" if key and dot else None


def _row(id: str, group: list[tuple[Member, str | None]], notes: Notes) -> dict[str, Any]:
    last, _ = group[-1]
    if not last.whole:
        return _lost(id, f"the tar ends within {last.name}")
    texts = {_suffix(member): text for member, text in reversed(group)}
    for member, _ in group:
        if _suffix(member) not in TEXTS and suffix_of(member.name) not in PICTURE_SUFFIXES:
            notes.add("members that are no image, txt or json, left out", member.name)
    row: dict[str, Any] = {"id": id, "image": _pictures([m for m, _ in group], notes)}
    row |= {name: text for name, text in texts.items() if name in TEXTS}
    large = [place for place in row["image"] or () if place["size"] > MAX_BYTES]
    if large:
        error = {"kind": "image_oversized", "message": f"{large[0]['size']} bytes"}
        row |= {"image": None, ERROR_COLUMN: error}
    return row


def _lost(id: str, reason: str) -> dict[str, Any]:
    return {"id": id, "image": None, ERROR_COLUMN: {"kind": CUT, "message": reason}}


def _suffix(member: Member) -> str:
    """All behind the first dot, as WebDataset names fields."""
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _pictures(group: list[Member], notes: Notes) -> list[dict[str, Any]] | None:
    """The first member whose whole suffix is a picture's; without one, all whose last part is."""
    found = [m for m in group if f".{_suffix(m)}" in PICTURE_SUFFIXES]
    if len(found) > 1:
        notes.add("keys of several pictures, of which the first is taken", found[0].name)
    found = found[:1] or [m for m in group if suffix_of(m.name) in PICTURE_SUFFIXES]
    return [
        {"path": json_fields.clean(m.name), "offset": m.offset, "size": m.size} for m in found
    ] or None


def _text(file: ReadAhead, member: Member, notes: Notes) -> str | None:
    data = file.read_at(member.offset, member.size) if member.size <= MOST_TEXT else None
    return text_of(data, member.name, notes)
