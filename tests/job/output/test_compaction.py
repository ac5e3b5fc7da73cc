"""Larger files: each row once at every moment, whatever dies meanwhile."""

import os
import random
import resource
import shutil
import threading
from collections import Counter
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.job.commits import commit
from tests.job.compactions import (
    SMALL,
    UNITS,
    Steps,
    check_between,
    check_end,
    commit_long,
    compact,
    killed,
)
from trio.errors import JobFailed, UserError
from trio.job.input.units import Unit
from trio.job.output.compaction import ROW_GROUPS
from trio.job.output.file_record import FILES, HIDDEN, read_record
from trio.job.output.schema import RUN_KEY
from trio.job.resume import committed
from trio.job.storage import locate


@pytest.fixture(scope="module")
def units_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose units are all committed."""
    out = tmp_path_factory.mktemp("units")
    for unit in UNITS:
        commit_long(out, unit)
    return out


@pytest.fixture
def out(units_files: Path, tmp_path: Path) -> Path:
    return linked(units_files, tmp_path / "out")


def linked(source: Path, target: Path) -> Path:
    """A copy; files are replaced and removed, never changed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    return target


def test_files_of_useful_size_with_all_that_the_small_ones_said(out: Path) -> None:
    output, before = locate(str(out)), pq.read_table(out / "stats")
    expected = pq.read_schema(out / "rows" / UNITS[0].name)
    steps = Steps()
    compact(output, UNITS, SMALL, steps)
    names = check_end(output, UNITS)
    assert len(names) >= 20 and names[0] == "0-00000.parquet"
    sizes = [(out / "rows" / name).stat().st_size for name in names]
    assert all(SMALL <= size < 2 * SMALL for size in sizes[:-1])
    schema = pq.read_schema(out / "rows" / names[0])
    assert schema.equals(expected, check_metadata=True)
    stats = pq.read_table(out / "stats")
    assert stats == before and stats.schema.metadata[RUN_KEY] == b"run1"
    assert {file.folder for file in read_record(output)} == {"rows", "stats"}
    assert sorted(steps.names[:2]) == ["check", "remove_directory"]
    again = Steps()
    compact(output, UNITS, SMALL, again)
    assert set(again.names) <= {"check", "remove_directory"}


def test_row_groups_of_many_units(out: Path) -> None:
    compact(locate(str(out)), UNITS, 50 * SMALL, Steps())
    (name,) = check_end(locate(str(out)), UNITS)
    file = pq.ParquetFile(out / "rows" / name)
    assert 2 <= file.num_row_groups <= ROW_GROUPS + 2 and file.metadata.num_rows == 2 * len(UNITS)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("file_bytes", [0, 1])
def test_files_that_would_not_become_fewer_stay(out: Path, file_bytes: int) -> None:
    before = sorted(os.listdir(out / "rows"))
    compact(locate(str(out)), UNITS, file_bytes, Steps())
    assert sorted(os.listdir(out / "rows")) == before and not (out / FILES).exists()


def steps_of(units_files: Path, tmp_path: Path) -> list[str]:
    steps = Steps()
    compact(locate(str(linked(units_files, tmp_path / "out"))), UNITS, SMALL, steps)
    return steps.names


def kill_at(step: int, units_files: Path, target: Path, rng: random.Random) -> None:
    """Killed at a step, then again soon after, then not any more."""
    output = locate(str(linked(units_files, target)))
    assert killed(output, UNITS, SMALL, step)
    check_between(output, UNITS)
    if killed(output, UNITS, SMALL, rng.randint(1, 30)):
        check_between(output, UNITS)
    compact(output, UNITS, SMALL, Steps())
    assert len(check_end(output, UNITS)) >= 20


def test_killed_at_steps_of_each_kind(units_files: Path, tmp_path: Path) -> None:
    names = steps_of(units_files, tmp_path)
    assert set(names) == {"check", "remove_directory", "record", "remove", "move"}
    record = names.index("record") + 1
    moves = [n for n, name in enumerate(names, start=1) if name == "move"]
    # Before the record; amid the removals; before a move.
    for step in (record, moves[3] - 1, moves[5]):
        kill_at(step, units_files, tmp_path / "out", random.Random(step))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_step(units_files: Path, tmp_path: Path) -> None:
    for step in range(1, len(steps_of(units_files, tmp_path)) + 1):
        kill_at(step, units_files, tmp_path / "out", random.Random(step))


def test_a_reader_meanwhile_sees_no_row_twice(out: Path) -> None:
    done = threading.Event()
    counts: list[int] = []
    wrong: list[BaseException] = []

    def look() -> None:
        while not (done.is_set() or wrong):
            try:
                keys = ds.dataset(out / "rows").to_table(columns=["row"])["row"].to_pylist()
            except FileNotFoundError:  # one of those it had listed
                continue
            except BaseException as error:
                wrong.append(error)
            else:
                counts.append(len(keys))
                wrong.extend(AssertionError(key) for key, n in Counter(keys).items() if n > 1)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        compact(locate(str(out)), UNITS, SMALL, Steps())
    finally:
        done.set()
        reader.join()
    assert not wrong and len(counts) > 5


def test_a_larger_file_that_is_gone_is_named(out: Path) -> None:
    output = locate(str(out))
    compact(output, UNITS, SMALL, Steps())
    (out / "rows" / "0-00001.parquet").rename(out / "elsewhere")
    message = r"rows/0-00001\.parquet is gone, .* \d units: put it back"
    with pytest.raises(UserError, match=message):
        committed.listed(output)
    with pytest.raises(UserError, match=message):
        compact(output, UNITS, SMALL, Steps())
    (out / "stats" / "0-00000.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"stats/0-00000\.parquet cannot be used .*: put it back"):
        committed.by_setting(output, UNITS, "run1")
    (out / FILES).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"files\.parquet cannot be used"):
        committed.listed(output)


def test_a_damaged_file_of_a_unit_is_named_and_nothing_goes(out: Path) -> None:
    lost = out / "rows" / UNITS[5].name
    data = lost.read_bytes()
    for damage in (data[:-9], (out / "rows" / UNITS[4].name).read_bytes()):
        lost.unlink()
        lost.write_bytes(damage)
        with pytest.raises(UserError, match=rf"{lost} cannot be used .*: remove {lost} and start"):
            compact(locate(str(out)), UNITS, SMALL, Steps())
        assert not (out / FILES).exists() and len(os.listdir(out / "rows")) == len(UNITS)
    lost.unlink()
    commit(out, UNITS[5], run_id="other")
    with pytest.raises(UserError, match="of another run"):
        compact(locate(str(out)), UNITS, SMALL, Steps())


def test_asked_to_stop_it_ends_and_goes_on_later(out: Path) -> None:
    class Stopping(Steps):
        def take(self, name: str) -> None:
            super().take(name)
            if len(self.names) == 9:
                raise JobFailed("stopped")

    output = locate(str(out))
    with pytest.raises(JobFailed, match="stopped"):
        compact(output, UNITS, SMALL, Stopping())
    assert (out / HIDDEN).exists()
    check_between(output, UNITS)
    compact(output, UNITS, SMALL, Steps())
    check_end(output, UNITS)


def test_a_unit_done_beside_a_larger_file_counts_once(out: Path) -> None:
    output = locate(str(out))
    compact(output, UNITS, SMALL, Steps())
    late = Unit(7, 0, 2)
    commit(out, late)
    assert committed.listed(output) == {*UNITS, late}
    both = committed.by_setting(output, [*UNITS[:3], late], "run1")[0]
    assert both.rows == 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_rows_in_little_memory(tmp_path: Path) -> None:
    """Rows of half a kilobyte, in units of 128, become files of 64 MB."""
    count, of_unit, file_bytes = 10**6, 128, 64 * 10**6
    units = [Unit(0, n, min(n + of_unit, count)) for n in range(0, count, of_unit)]
    for unit in units:
        commit_long(tmp_path, unit, letters=1000)
    output, before = locate(str(tmp_path)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        compact(output, units, file_bytes, Steps())
        os._exit(0)
    _, code, used = os.wait4(child, 0)
    assert code == 0 and used.ru_maxrss - before < 500_000  # KB
    sizes = [(tmp_path / "rows" / name).stat().st_size for name in check_end(output, units)]
    assert len(sizes) >= 7 and all(file_bytes <= size < 1.3 * file_bytes for size in sizes[:-1])
