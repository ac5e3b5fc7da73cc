"""The members of tars, whole and cut, by few reads."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from tests.job.input.kinds.input_samples import write_tar
from trio.job.input.kinds.read_ahead import HOP, STRIDE, ReadAhead
from trio.job.input.kinds.tar_members import Member, NoTar, TarEnd, members

LONG = "a very long folder/" * 9 + "é猫.jpg"
MEMBERS = [("a.jpg", b"1" * 700), (LONG, b"2" * 5), ("empty.txt", b""), ("b.json", b"{}" * 600)]
FORMS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walked(data: bytes, *, far: bool = False) -> tuple[list[Member], TarEnd, ReadAhead]:
    file, end = ReadAhead(pa.BufferReader(data), len(data), far=far), TarEnd()
    return list(members(file, end)), end, file


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_names_offsets_and_sizes(tmp_path: Path, form: int) -> None:
    data = write_tar(tmp_path / "a.tar", MEMBERS, form).read_bytes()
    found, end, _ = walked(data)
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in found] == MEMBERS
    assert all(m.whole for m in found) and end == TarEnd(marked=True)


def test_folders_and_links_are_no_members() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in (("x", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert walked(stream.getvalue())[0] == []


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_tar_cut_anywhere_gives_what_is_whole(tmp_path: Path, form: int) -> None:
    data = write_tar(tmp_path / "a.tar", MEMBERS, form).read_bytes()
    whole, _, _ = walked(data)
    stop = whole[-1].offset + whole[-1].size
    for size in range(512, len(data), 77):
        found, end, _ = walked(data[:size])
        kept = [m for m in found if m.whole]
        assert kept == [m for m in whole if m.offset + m.size <= size]
        assert len(found) - len(kept) <= 1
        assert not end.marked or size >= stop + 512


@pytest.mark.parametrize("data", [b"", b"x" * 2000, b"<html>" + bytes(600), bytes(100)])
def test_what_is_no_tar(data: bytes) -> None:
    with pytest.raises(NoTar):
        walked(data)


def test_damage_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 512) for n in range(3)])
    data = bytearray(path.read_bytes())
    data[1024:1200] = b"z" * 176
    found, end, _ = walked(bytes(data))
    assert [m.name for m in found] == ["0.jpg"] and end.damaged == 1024 and not end.marked


def test_large_members_are_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", bytes(2 << 20)) for n in range(10)])
    for far in (False, True):
        found, _, file = walked(path.read_bytes(), far=far)
        assert len(found) == 10
        assert file.bytes_read <= STRIDE + 12 * HOP


def test_small_members_of_a_store_are_read_through(tmp_path: Path) -> None:
    """Many headers in one request."""
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", bytes(3000)) for n in range(2000)])
    data = path.read_bytes()
    stream = Counted(pa.BufferReader(data))
    file, end = ReadAhead(stream, len(data), far=True), TarEnd()
    assert len(list(members(file, end))) == 2000 and end.marked
    assert stream.reads <= len(data) / STRIDE + 2


class Counted:
    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self.reads = stream, 0

    def read_at(self, size: int, offset: int) -> bytes:
        self.reads += 1
        return bytes(self._stream.read_at(size, offset))
