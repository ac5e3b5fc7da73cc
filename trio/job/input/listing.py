"""Which of the files that an input names are shards, and what is said about the others.

INPUT a listing; OUTPUT the shards among it, and the files left out that might hold rows. A file
that is named in full is not asked for its suffix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from pyarrow import fs as pafs

from trio.job.storage import Location

SUFFIXES = (".parquet", ".pq", ".parq")
THREADS = 16
EXAMPLES = 3
MAGIC = b"PAR1"
_UNSAID = re.compile(r"[^.]+|.+\.(parquet|parq|pq)\.(gz|gzip|snappy|zstd|zst|lz4|br|brotli)", re.I)
# names that do not say what the file is: exports without a suffix, and pandas' .parquet.gzip
_NO_ROWS = re.compile(
    r"(readme|licen[cs]e|changelog|dataset_infos?|dataset_dict|state)(\.\w+)?"
    r"|.*\.(md|crc|sha256|md5|jpe?g|jfif|png|webp|gif|bmp|tiff?|jp2|avif|heic|ico|ppm)",
    re.I,
)


def split(
    location: Location, infos: Sequence[pafs.FileInfo]
) -> tuple[list[pafs.FileInfo], list[pafs.FileInfo]]:
    """Shards among the files below a directory or pattern, and those left out that may hold rows.

    Shards are what is called so, in any case of letters, and files whose names do not say what they
    are but that begin as Parquet does: of these four bytes are read.
    """
    unsaid = [info for info in infos if _UNSAID.fullmatch(info.base_name)]
    with ThreadPoolExecutor(THREADS) as pool:
        begin = pool.map(lambda info: _begins_as_parquet(location.at(info.path)), unsaid)
        parquet = {info.path for info, yes in zip(unsaid, begin, strict=True) if yes}
    taken, left = [], []
    for info in infos:
        if info.path in parquet or info.base_name.lower().endswith(SUFFIXES):
            taken.append(info)
        elif not _NO_ROWS.fullmatch(info.base_name):
            left.append(info)
    return taken, left


def _begins_as_parquet(location: Location) -> bool:
    """False too for a file that cannot be read: it is said to be left out."""
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            return bool(stream.read(len(MAGIC)) == MAGIC)
    except (OSError, pa.ArrowException):
        return False


def left_out(left: Sequence[pafs.FileInfo]) -> str:
    """A few words about files that are left out."""
    names = [info.base_name for info in left[:EXAMPLES]]
    more = len(left) - len(names)
    shown = ", ".join(names) + (f" and {more} more" if more else "")
    files = "1 file is" if len(left) == 1 else f"{len(left)} files are"
    return (
        f"{files} no Parquet by name ({', '.join(SUFFIXES)}) and left out: {shown};"
        " name a file in full to have it read"
    )
