"""Runs over a real Ray, with a stand-in for the engine: each row once, resumed, refused."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.job.fakes import png, write_shard
from tests.job.runs import execute
from trio.errors import UserError
from trio.job import runner
from trio.job.input.manifest import Manifest, Shard
from trio.job.nodes import cluster
from trio.job.output import output_directory
from trio.job.output.schema import row_key
from trio.job.resume import lease
from trio.job.settings import made_of
from trio.job.storage import locate

pytestmark = pytest.mark.ray
SCHEMA = pa.schema(
    [
        ("id", pa.int32()),
        ("image", pa.binary()),
        ("prompt", pa.string()),
        ("answers", pa.list_(pa.string())),
    ]
)
SIZES = (30, 0, 25)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        rows = [
            {
                "id": 100 * number + max(i, 1),
                "image": png((i, number, 0)),
                "prompt": f"p{number}-{i}",
                "answers": [f"p{number}-{i} [({i}, {number}, 0)]"] if i % 2 else ["wrong"],
            }
            for i in range(size)
        ]
        write_shard(tmp_path / "in" / f"{number}.parquet", rows, SCHEMA, row_group=10)
    return tmp_path / "in"


@pytest.mark.usefixtures("ray_local")
def test_every_row_once_in_order_with_two_actors(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary = execute(shards, out, actors=2, save_kept=True, score="exact")
    files = sorted((out / "rows").iterdir())
    tables = [pq.read_table(f) for f in files]
    table = pa.concat_tables(tables)
    keys = [row_key(s, r) for s, size in enumerate(SIZES) for r in range(size)]
    assert table.column("row").to_pylist() == keys
    assert table.column("id").to_pylist() == [1, *range(1, 30), 201, *range(201, 225)]
    assert table.schema.field("id").type == pa.int32()
    expected = [f"p{s}-{r} [({r}, {s}, 0)]" for s, size in enumerate(SIZES) for r in range(size)]
    assert table.column("response").to_pylist() == expected
    assert table.column("kept_tokens").to_pylist()[0] == [list(range(8)), list(range(4))]
    assert [len(t) for t in tables] == [8, 8, 8, 6, 8, 8, 8, 1]
    assert sorted(p.name for p in out.iterdir()) == [
        ".lease", "README.md", "_SUCCESS", "gallery", "manifest.parquet", "rows", "run.yaml",
        "stats", "summary.json",
    ]  # fmt: skip
    stats = pq.read_table(out / "stats").to_pylist()
    assert len(stats) == 8 and sum(s["images"] for s in stats) == summary["images"] == 55
    assert sum(s["output_tokens"] for s in stats) == summary["output_tokens"] == 165
    assert all(s["start"] <= s["end"] for s in stats)
    assert {s["actor"] for s in stats} == set(table.column("actor").to_pylist())
    assert {s["actor"][-9:] for s in stats} <= {" engine 1", " engine 2"}
    here = ray.get_runtime_context().get_node_id()
    assert {(s["node"], s["decode_node"]) for s in stats} == {(here, here)}
    assert (summary["rows"], summary["errors"], summary["scored"], summary["right"]) == (
        55,
        0,
        55,
        27,
    )
    assert summary["duplicate_ids"] == 2 and summary["score"] == "exact"
    assert "2 rows have an id that an earlier row has (1, 201)" in capsys.readouterr().out
    assert summary["retention"] == 0.25 and summary["flops_ratio"] == 4.0
    assert summary["memory_plan"]["requests"] == 20
    assert summary["memory_plan"]["requests_unpruned"] == 5
    assert output_directory.read_summary(locate(str(out))) == summary


@pytest.mark.usefixtures("ray_local")
def test_a_stopped_run_goes_on_without_doing_anything_twice(shards: Path, tmp_path: Path) -> None:
    """The first 33 rows, without ids of their own, in files of one name."""
    (shards / "a").mkdir()
    (shards / "2.parquet").rename(shards / "a" / "0.parquet")
    asked: dict[str, Any] = {"limit": 33, "columns": "id=none"}
    out = tmp_path / "out"
    execute(shards, out, **asked)
    (out / "_SUCCESS").unlink()
    files = sorted((out / "rows").iterdir())
    kept = {f: f.stat().st_mtime_ns for f in files if f not in (files[1], files[-1])}
    before = pq.read_table(out / "rows", columns=["row", "id"])
    assert before["row"].to_pylist() == [*range(30), *(row_key(2, r) for r in range(3))]
    names = [*(f"0.parquet#{r}" for r in range(30)), *(f"a/0.parquet#{r}" for r in range(3))]
    assert before["id"].to_pylist() == names
    for lost in (files[1], files[-1]):
        lost.unlink()
    run_id = pq.read_schema(files[0]).metadata[b"trio.run"]
    summary = execute(shards, out, rows_per_file=None, **asked)
    assert summary["rows_before"] == 33 - 11 and summary["rows"] == 33
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert pq.read_table(out / "rows", columns=["row", "id"]) == before
    assert pq.read_schema(files[1]).metadata[b"trio.run"] == run_id
    assert (out / "_SUCCESS").exists()
    (out / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="seed: 0, now 9"):
        execute(shards, out, seed=9, **asked)
    with lease.hold(locate(str(out))), pytest.raises(UserError, match="in use by process"):
        execute(shards, out, **asked)


@pytest.mark.usefixtures("ray_local")
def test_an_input_without_rows_is_a_finished_run(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [], SCHEMA)
    summary = execute(tmp_path / "in", tmp_path / "out")
    assert summary["rows"] == 0 and os.listdir(tmp_path / "out" / "rows") == []
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gpus_per_actor": 1.0, "actors": 2},
            "2 engines with 1 GPUs .*: none can .* 6 CPUs and 0 GPUs",
        ),
        ({"actors": 50}, "50 engines .*: 6 can be placed .* 6 CPUs"),
    ],
)
def test_more_than_there_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster.fit(made_of(**changes), attached=True)


def test_what_the_cluster_decides_is_written_down() -> None:
    shard = Shard(number=0, path="x", size=10**6, rows=240, row_groups=(240,))
    resources = cluster.Resources(
        cpus=8,
        gpus=4,
        nodes=2,
        actors=4,
        gpus_per_actor=1.0,
        cpus_per_actor=1.0,
        attached=True,
        per_node=2,
    )
    config = runner.resolve_resources(made_of(), Manifest(shards=(shard,)), resources)
    assert (config.cluster.actors, config.cluster.gpus_per_actor) == (4, 1.0)
    assert config.output.rows_per_file == 8
    settings = runner.engine_settings(config, resources)
    assert settings.gpu and settings.dtype is None and settings.engines_per_node == 2


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_engines_that_take_all_cpus_are_fed_all_the_same(shards: Path, tmp_path: Path) -> None:
    summary = execute(shards, tmp_path / "out", limit=20, actors=1, cpus_per_actor=6.0)
    assert "1 engine on CPU; 1 task for images" in summary["resources"]
    assert (summary["rows"], summary["errors"]) == (20, 0)
