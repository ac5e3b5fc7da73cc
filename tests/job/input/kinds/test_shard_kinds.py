"""Kinds by name."""

import pytest

from trio.job.input.kinds.shard_kinds import (
    ARROW,
    IMAGES,
    PARQUET,
    TABLE,
    TAR,
    is_packed_tar,
    kind_of,
    suffix_of,
)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.parquet", "a.PQ", "a.b.parq"], PARQUET),
        (["00000.tar", "x.y.TAR"], TAR),
        (["a.jsonl", "a.NDJSON", "a.csv", "a.tsv", "a.csv.gz", "a.jsonl.zst"], TABLE),
        (["data-00000-of-00001.arrow"], ARROW),
        (["a.jpg", "a.JPEG", "a.webp", "a.jp2", "a b.tiff", "000000-0123.trio-images"], IMAGES),
        (["a", "a.json", "a.txt", "a.heic", "a.eps", "a.tar.gz", "jpg", "a.jpg.part"], None),
    ],
)
def test_kinds(names: list[str], kind: str | None) -> None:
    assert {kind_of(name) for name in names} == {kind}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.zst", "a.tbz2"])
def test_compressed_tars(name: str) -> None:
    assert is_packed_tar(name) and not is_packed_tar("a.tar") and kind_of(name) is None


def test_suffixes() -> None:
    names = ["a.JPG", "x.y/a", "x/a.b.c", ".a"]
    assert [suffix_of(name) for name in names] == [".jpg", "", ".c", ".a"]
