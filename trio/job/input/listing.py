"""Which of the files that an input names are shards, and what is said about the others.

INPUT a listing; OUTPUT the shards among it, and a line on files left out. Of a directory or pattern
one kind of files is read. A file that is named in full is Parquet unless its name says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pyarrow as pa
from pyarrow import fs as pafs

from trio.errors import UserError
from trio.job.input.kinds.found_shard import Found
from trio.job.input.kinds.image_folders import chunks, lies_beside
from trio.job.input.kinds.shard_kinds import IMAGES, KINDS, PARQUET, TAR, is_packed_tar, kind_of
from trio.job.storage import Location, parent, start_of
from trio.tables import counted

THREADS = 16
EXAMPLES = 3
MAGIC = b"PAR1"
STATS = "_stats.json"
# ends the name of a file that img2dataset writes for each of its shards
_UNSAID = re.compile(r"[^.]+|.+\.(parquet|parq|pq)\.(gz|gzip|snappy|zstd|zst|lz4|br|brotli)", re.I)
# names that do not say what the file is: exports without a suffix, and pandas' .parquet.gzip
_NO_ROWS = re.compile(
    r"(readme|licen[cs]e|changelog|dataset_infos?|dataset_dict|state)(\.\w+)?"
    r"|.*\.(md|crc|sha256|md5)",
    re.I,
)


def named(location: Location, info: pafs.FileInfo) -> list[Found]:
    """The shard that a file named in full is.

    Raises:
        UserError: a compressed tar.
    """
    _refuse_packed([info])
    if kind_of(info.base_name) == IMAGES:
        return chunks(parent(location.uri), [info], [])
    return [Found(location, int(info.size))]


def split(location: Location, infos: Sequence[pafs.FileInfo]) -> tuple[list[Found], str]:
    """Shards among the files below a directory or pattern, and a few words on those left out.

    Shards are what is called so, in any case of letters, and files whose names do not say what they
    are but that begin as Parquet does: of these four bytes are read.

    Raises:
        UserError: compressed tars, where no other kind is there to be read.
    """
    by_kind = _by_kind(location, infos)
    described = _described(infos, by_kind)
    by_kind[PARQUET] = [info for info in by_kind[PARQUET] if info.path not in described]
    kind = next((kind for kind in KINDS if by_kind[kind]), None)
    if kind in (None, TAR):
        _refuse_packed(infos)
    if kind is None:
        return [], _left_out(None, {}, [], _others(infos, []))
    mine = by_kind.pop(kind)
    beside = [info for info in infos if info.path in described]
    others = _others(infos, [*mine, *beside, *chain.from_iterable(by_kind.values())])
    if kind != IMAGES:
        found = [Found(location.at(info.path), int(info.size)) for info in mine]
    else:
        found = chunks(start_of(location), mine, others)
        stems = {info.path.rpartition(".")[0] for info in mine}
        others = [info for info in others if not lies_beside(info.path, stems)]
    return found, _left_out(kind, by_kind, beside, others)


def _refuse_packed(infos: Sequence[pafs.FileInfo]) -> None:
    for info in infos:
        if is_packed_tar(info.base_name):
            raise UserError(
                f"{info.path}: a compressed tar, of which no member can be read alone; unpack it to"
                " a .tar, whose images are compressed anyway"
            )


def _by_kind(location: Location, infos: Sequence[pafs.FileInfo]) -> dict[str, list[pafs.FileInfo]]:
    unsaid = [info for info in infos if _UNSAID.fullmatch(info.base_name)]
    with ThreadPoolExecutor(THREADS) as pool:
        begin = pool.map(lambda info: _begins_as_parquet(location.at(info.path)), unsaid)
        parquet = {info.path for info, yes in zip(unsaid, begin, strict=True) if yes}
    out: dict[str, list[pafs.FileInfo]] = {kind: [] for kind in KINDS}
    for info in infos:
        kind = PARQUET if info.path in parquet else kind_of(info.base_name)
        if kind is not None:
            out[kind].append(info)
    return out


def _described(
    infos: Sequence[pafs.FileInfo], by_kind: Mapping[str, Sequence[pafs.FileInfo]]
) -> set[str]:
    """Paths of files that img2dataset writes beside a tar, or beside a folder of images."""
    stems = {info.path.rpartition(".")[0] for info in by_kind[TAR]}
    folders = {info.path.rpartition("/")[0] for info in by_kind[IMAGES]}
    there = {info.path for info in infos}
    stems |= {folder for folder in folders if f"{folder}{STATS}" in there}
    parquet = {i.path for i in by_kind[PARQUET] if i.path.rpartition(".")[0] in stems}
    return parquet | {f"{stem}{STATS}" for stem in stems} & there


def _others(infos: Sequence[pafs.FileInfo], known: Sequence[pafs.FileInfo]) -> list[pafs.FileInfo]:
    """Files of no kind that may hold rows."""
    paths = {info.path for info in known}
    return [i for i in infos if i.path not in paths and not _NO_ROWS.fullmatch(i.base_name)]


def _begins_as_parquet(location: Location) -> bool:
    """False too for a file that cannot be read: it is said to be left out."""
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            return bool(stream.read(len(MAGIC)) == MAGIC)
    except (OSError, pa.ArrowException):
        return False


def _left_out(
    kind: str | None,
    by_kind: Mapping[str, Sequence[pafs.FileInfo]],
    beside: Sequence[pafs.FileInfo],
    others: Sequence[pafs.FileInfo],
) -> str:
    """A few words about files that are left out; "" where there are none."""
    said = [counted(len(some), f"{other} file") for other, some in by_kind.items() if some]
    for some, what in ((beside, "beside shards of the same name"), (others, "of other kinds")):
        if some:
            said.append(f"{counted(len(some), 'file')} {what} ({_examples(some)})")
    if not said:
        return ""
    read = f"{kind} files are read; " if kind else ""
    return f"{read}left out: {', '.join(said)}; name a file in full to have it read"


def _examples(some: Collection[pafs.FileInfo]) -> str:
    names = [info.base_name for info in some][:EXAMPLES]
    more = len(some) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
