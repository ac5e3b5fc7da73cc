"""Output and input on an object store: a real S3 server, reached as users reach theirs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from tests.job.commits import commit, totals_of
from tests.job.compactions import (
    KILLED,
    SMALL,
    UNITS,
    Steps,
    check_between,
    check_end,
    commit_long,
    compact,
)
from tests.job.fakes import ODD_NAMES, png
from tests.job.faults import faulty
from tests.job.input.kinds.input_samples import (
    members_of,
    picture,
    width_of,
    write_jsonl,
    write_tar,
)
from tests.job.rivals import check_until_lost, start_together
from tests.job.runs import execute
from tests.job.store import Store, bucket_of, serving
from trio.engine.request import Sampling
from trio.errors import UserError
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy
from trio.job.input import ids
from trio.job.input.columns import resolve
from trio.job.input.manifest import expand, inspect
from trio.job.input.reader import RunReader
from trio.job.input.units import Unit, units
from trio.job.output import output_directory
from trio.job.output.output_rows import RowSettings, identify, sources
from trio.job.output.sink import serialise
from trio.job.resume import committed, fingerprint, lease
from trio.job.settings import made_of
from trio.job.storage import (
    Location,
    exists,
    list_files,
    locate,
    parent,
    read_bytes,
    write_atomic,
)

SHARDS, ROWS, UNIT_ROWS = 10, 8, 4
PROMPT = RowSettings(
    prompts=("what is this?",),
    sampling=Sampling(max_new_tokens=1),
    policy=ImagePolicy(),
    seed=0,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    with serving(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def store(server: tuple[int, Path]) -> Iterator[Store]:
    made = bucket_of(server)
    yield made
    made.fail()


def test_a_small_file_is_one_request_and_whole(store: Store) -> None:
    write_atomic(store.at("x/a"), b"data")
    assert [r.method for r in store.requests()] == ["PUT"]
    assert read_bytes(store.at("x/a")) == b"data"


@pytest.mark.parametrize("rule", ["PUT partNumber=1", "PUT partNumber=2", "POST uploadId", "PUT a"])
def test_a_write_that_fails_shows_nothing(store: Store, rule: str) -> None:
    for data in (os.urandom(12 << 20), b"small"):
        store.fail(rule)
        large = len(data) > 5
        if large or rule == "PUT a":
            with pytest.raises(OSError, match="ACCESS_DENIED"):
                write_atomic(store.at(f"x/a{large}"), data)
        store.fail()
        assert not exists(store.at(f"x/a{large}"))


def test_a_process_that_is_killed_while_it_writes_shows_nothing(store: Store) -> None:
    code = (
        "import sys\n"
        "from trio.job.storage import locate, write_atomic\n"
        "write_atomic(locate(sys.argv[1]), bytes(400 << 20))\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, store.uri("x/big")], cwd=root)
    try:
        until = time.monotonic() + 30
        while not any("partNumber=2" in r.path for r in store.requests()):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not exists(store.at("x/big"))


def test_ctrl_c_while_writing_shows_the_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trio.job import storage

    original = storage._put

    def interrupted(location: Location, data: bytes) -> None:
        import _thread

        _thread.interrupt_main()
        time.sleep(0.1)
        original(location, data)

    monkeypatch.setattr(storage, "_put", interrupted)
    # A shell that starts the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(store.at("x/a"), b"data")
    until = time.monotonic() + 10
    while not exists(store.at("x/a")) and time.monotonic() < until:
        time.sleep(0.05)
    assert read_bytes(store.at("x/a")) == b"data"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_taken_letter_for_letter(store: Store, name: str) -> None:
    """Listed, planned, read, and resumed on; images beside the shard and an output there too."""
    table = pa.table({"image": [f"images/{name}.png"]})
    store.put(f"d/{name}/{name}.parquet", serialise(table))
    store.put(f"d/{name}/images/{name}.png", png())
    (location,) = [found.location for found in expand([store.uri("d")])]
    assert location.path.endswith(f"/d/{name}/{name}.parquet")
    for uri in (store.uri("d"), store.uri(f"d/{name}"), location.uri):
        manifest, schemas = inspect([uri])
        (shard,) = manifest.shards
        assert manifest.difference(expand([uri])) is None and locate(shard.path) == location
    columns = resolve(schemas, [shard.path], {}, prompt_given=True)
    unit = Unit(0, 0, 1)
    table = RunReader({0: shard}, columns.roles, lambda *_: None).read(unit)
    assert isinstance(table, pa.Table)
    (row,) = sources(table, unit, shard.path)
    assert load_images(row.cell("image"), parent(shard.path), PROMPT.policy)
    identify(row, PROMPT)
    assert row.id == f"{name}.parquet#0"
    output = store.at(f"out/{name}")
    commit(output.uri, unit)
    assert committed.listed(locate(output.uri)) == {unit}


def shards(store: Store) -> list[str]:
    """Ten shards with images, so that their ids are a small part of them."""
    for number in range(SHARDS):
        rows = {
            "id": [f"{number}-{row % 7}" for row in range(ROWS)],
            "image": [png((number, row, 0), (60, 60)) for row in range(ROWS)],
        }
        write_atomic(store.at(f"in/{number:03d}.parquet"), serialise(pa.table(rows)))
    return [store.uri("in")]


def pin(
    store: Store, output: Location, inputs: Sequence[str] = ()
) -> tuple[output_directory.Pinned, list[Unit]]:
    """A first plan, claimed."""
    inputs = inputs or shards(store)
    config = made_of(input=(store.uri("in"),), output=output.uri, rows_per_file=UNIT_ROWS)
    manifest, schemas = inspect(inputs)
    columns = resolve(schemas, [s.path for s in manifest.shards], {}, prompt_given=True)
    run = output_directory.Pinned(
        run_id="run1",
        manifest=manifest,
        columns=columns,
        fingerprint=fingerprint.take(config),
        ids=ids.scan(manifest, columns.roles["id"]),
        config=config,
    )
    return output_directory.claim(output, run), list(units(manifest, UNIT_ROWS))


def test_a_resume_reads_no_byte_of_any_shard_and_few_of_the_output(store: Store) -> None:
    output = store.at("out")
    run, plan = pin(store, output)
    assert run.ids is not None and run.ids.duplicates == SHARDS
    assert any(r.path.endswith("in/003.parquet") and r.bytes for r in store.requests())
    for unit in plan[:18]:
        commit(output.uri, unit)
    store.requests()

    with lease.hold(output):
        found = output_directory.earlier(output)
        assert found is not None and found.manifest == run.manifest and found.ids == run.ids
        now = fingerprint.take(found.config)
        output_directory.check_same(found, now, expand([store.uri("in")], output), output.uri)
        todo = list(units(found.manifest, UNIT_ROWS))
        done = committed.listed(output) & set(todo)
        before = committed.totals(output, done, found.run_id)
    assert done == set(plan[:18]) and before == totals_of(*plan[:18])

    asked = store.requests()
    of_shards = [r for r in asked if "/in/" in r.path.partition("?")[0]]
    assert [r.bytes for r in of_shards] == [0] * len(of_shards)  # a HEAD at the most
    assert {r.method for r in of_shards} <= {"HEAD"}
    assert not [r for r in asked if "/rows/" in r.path]
    read = [r.path.rpartition("/")[2] for r in asked if "/stats/" in r.path and r.method == "GET"]
    assert sorted(read) == [u.name for u in plan[:18]]


def test_what_is_no_parquet_is_indexed_once_and_read_by_ranges(
    store: Store, tmp_path: Path
) -> None:
    """A tar, a folder and a table: planned, claimed, found again, and each row's image read."""
    tar = write_tar(tmp_path / "0.tar", members_of(range(40))).read_bytes()
    store.put("in/t/0.tar", tar)
    for name in ("a b", "c%20d/é"):
        store.put(f"in/photos/{name}.png", picture(3))
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"image": "img/x.png", "id": "r0"}])
    store.put("in/j/rows.jsonl", rows.read_bytes())
    store.put("in/j/img/x.png", picture(4))
    inputs = [store.uri(f"in/{name}") for name in ("t", "photos", "j/rows.jsonl")]
    output = store.at("out")
    store.requests()
    run, plan = pin(store, output, inputs)
    asked = [r for r in store.requests() if r.path.endswith("/0.tar") and r.method == "GET"]
    assert len(asked) == 1 and asked[0].bytes == len(tar)

    found = output_directory.earlier(output)
    assert found is not None and found.manifest == run.manifest
    assert all(exists(locate(shard.index)) for shard in run.manifest.shards)
    assert [s.index for s in found.manifest.shards] == [s.index for s in run.manifest.shards]
    assert found.manifest.difference(expand(inputs, output)) is None
    assert not [r for r in store.requests() if "/in/" in r.path and r.method == "GET"]
    by_number = {shard.number: shard for shard in found.manifest.shards}
    reader, widths = RunReader(by_number, found.columns.roles, lambda *_: None), {}
    for unit in plan:
        table, path = reader.read(unit), by_number[unit.shard].path
        assert isinstance(table, pa.Table), table
        for source in sources(table, unit, path):
            (image,) = load_images(source.cell("image"), parent(path), PROMPT.policy)
            widths[source.cell("id")] = image.width
    wanted = {f"0.tar/{n:09d}": width_of(n) for n in range(40)}
    assert widths == wanted | {"a b.png": 13, "c%20d/é.png": 13, "r0": 14}
    of_tar = [r for r in store.requests() if r.path.endswith("/0.tar") and r.method == "GET"]
    assert len(of_tar) == 40 // UNIT_ROWS


def test_a_run_from_claim_to_success(store: Store) -> None:
    output = store.at("out")
    with lease.hold(output) as held:
        assert output_directory.earlier(output) is None and not output_directory.finished(output)
        run, plan = pin(store, output)
        for unit in plan:
            commit(output.uri, unit)
            held.check()
        output_directory.close(output, {"rows": SHARDS * ROWS})
    assert output_directory.finished(output)
    assert committed.totals(output, committed.listed(output), run.run_id) == totals_of(*plan)
    selector = pafs.FileSelector(output.path, recursive=True)
    files = [i.path for i in output.filesystem.get_file_info(selector) if i.is_file]
    top = {path.removeprefix(output.path + "/").partition("/")[0] for path in files}
    assert top == {"_SUCCESS", "summary.json", "run.yaml", "manifest.parquet", "rows", "stats"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_each_row_once_though_a_write_fails_and_an_engine_dies(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = tmp_path / "starts"
    store.fail("PUT rows/000003")

    def disturb() -> None:
        while not any(r.method == "PUT" and "rows/000003" in r.path for r in store.requests()):
            time.sleep(0.01)
        store.fail()
        os.kill(int(starts.read_text()), signal.SIGKILL)

    (uri,) = shards(store)
    disturber = threading.Thread(target=disturb, daemon=True)
    disturber.start()
    engine = faulty(delay_s=0.2, starts=starts)
    summary = execute(uri, store.uri("out"), engine, prompt=("p",), rows_per_file=UNIT_ROWS)
    disturber.join()
    assert (summary["rows"], summary["errors"]) == (SHARDS * ROWS, 0)
    output = store.at("out")
    table = pq.read_table(output.join("rows").path, filesystem=output.filesystem)
    assert len(set(table.column("row").to_pylist())) == table.num_rows == SHARDS * ROWS
    assert "an engine died" in capsys.readouterr().err


def test_a_shard_that_changed_is_named(store: Store) -> None:
    output = store.at("out")
    run, _ = pin(store, output)
    write_atomic(store.at("in/004.parquet"), b"longer or shorter")
    with pytest.raises(UserError, match=r"the input: s3://.*004\.parquet.* has 17\. Give"):
        output_directory.check_same(run, run.fingerprint, expand([store.uri("in")]), output.uri)


def test_readers_see_only_whole_files(store: Store) -> None:
    output = store.at("out")
    plan = [Unit(0, start, start + 2) for start in range(0, 40, 2)]
    done = threading.Event()
    seen: list[int] = []
    wrong: list[BaseException] = []

    def look() -> None:
        mine = store.at("out")
        while not done.is_set():
            try:
                infos = list_files(mine.join("rows"))
                for info in infos[-4:]:
                    pq.read_table(info.path, filesystem=mine.filesystem)
                seen.append(len(infos))
            except BaseException as error:
                wrong.append(error)
                return

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for unit in plan:
            commit(output.uri, unit)
            commit(output.uri, unit)  # done again: overwritten while it is read
    finally:
        done.set()
        reader.join()
    assert not wrong
    assert len(set(seen)) > 3 and committed.listed(output) == set(plan)


def test_a_silent_claim_elsewhere_expires_by_the_stores_clock(store: Store) -> None:
    output = store.at("out")
    write_atomic(output.join(".lease", "other.claim"), b"process 1 on far")
    said: list[str] = []
    with lease.hold(output, interval_s=0.5, expiry_s=3.0, say=said.append):
        assert not exists(output.join(".lease", "other.claim"))
    # On a machine that stood still for the whole expiry there is nothing to wait for.
    assert all("on far" in line for line in said) and len(said) <= 1
    assert not list_files(output.join(".lease"))


def test_a_claim_that_is_taken_away_is_noticed(store: Store) -> None:
    output = store.at("out")
    with lease.hold(output, interval_s=0.1, expiry_s=0.5) as held:
        (claim,) = [i for i in list_files(output.join(".lease")) if i.path.endswith(".claim")]
        output.filesystem.delete_file(claim.path)
        with pytest.raises(lease.LeaseLost):
            check_until_lost(held)


def test_of_many_that_start_together_one_holds_at_a_time(store: Store) -> None:
    start_together(lambda round_: store.at(f"out{round_}"), rounds=6)


def compaction_killed(output: Location, count: int, step: int) -> bool:
    """Whether a process that puts the files of the first units together dies before a step."""
    command = [sys.executable, "-m", "tests.job.compactions", output.uri, str(count), str(step)]
    ended = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=False)
    assert ended.returncode in (0, KILLED)
    return ended.returncode == KILLED


def killed_at(output: Location, units: Sequence[Unit], step: int) -> bool:
    """Whether a compaction of these units, on the store anew, came to a step; then it goes on."""
    for unit in units:
        commit_long(output.uri, unit)
    killed = compaction_killed(output, len(units), step)
    check_between(output, units)
    compact(output, units, SMALL, Steps())
    assert len(check_end(output, units)) >= len(units) // 2
    return killed


def test_larger_files_though_their_writer_is_killed(store: Store, tmp_path: Path) -> None:
    """Right behind the record."""
    steps = Steps()
    for unit in UNITS[:6]:
        commit_long(tmp_path, unit)
    compact(locate(str(tmp_path)), UNITS[:6], SMALL, steps)
    assert killed_at(store.at("out"), UNITS[:6], steps.names.index("record") + 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_larger_files_though_their_writer_is_killed_at_every_step(store: Store) -> None:
    step = 1
    while killed_at(store.at(f"out-{step}"), UNITS, step):
        step += 1
    assert step > len(UNITS)
