"""Which kinds of shards there are, and which name stands for which: decided here alone.

What is no Parquet has an *index*, a Parquet file that planning makes of it: see `shard_index`.
"""

from __future__ import annotations

import re

from PIL import Image

from trio.job.images.image_files import FORMATS

PARQUET, TAR, ARROW, TABLE, IMAGES = "Parquet", "tar", "Arrow", "JSONL or CSV", "image"
"""A shard of images stands for many files of a folder."""
KINDS = (TAR, PARQUET, ARROW, TABLE, IMAGES)
"""Of several in one folder the first is read."""
PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
CHUNK_SUFFIX = ".trio-images"
"""Of the name that a shard of images is given."""
PICTURE_SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS
)
"""With their dots, in lower case: whatever the installed Pillow takes."""
_TABLE = re.compile(r".*\.(jsonl|ndjson|csv|tsv)(\.(gz|bz2|zst))?", re.IGNORECASE | re.DOTALL)
_PACKED_TAR = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE | re.DOTALL)


def kind_of(name: str) -> str | None:
    """What a file is by its name; None where that does not say it."""
    lower = name.lower()
    if lower.endswith(PARQUET_SUFFIXES):
        return PARQUET
    for suffix, kind in ((".tar", TAR), (".arrow", ARROW), (CHUNK_SUFFIX, IMAGES)):
        if lower.endswith(suffix):
            return kind
    if _TABLE.fullmatch(name):
        return TABLE
    return IMAGES if suffix_of(name) in PICTURE_SUFFIXES else None


def suffix_of(name: str) -> str:
    """From the last dot of the file's name on, in lower case; "" for none."""
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" if "." in base else ""


def is_packed_tar(name: str) -> bool:
    """Whether a tar is compressed as a whole: no member can be read alone."""
    return _PACKED_TAR.fullmatch(name) is not None
