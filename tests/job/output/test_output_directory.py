"""Output directories: new, unfinished, finished, somebody else's."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trio.errors import UserError
from trio.job import run_yaml
from trio.job.input.columns import Columns
from trio.job.input.ids import IdReport
from trio.job.input.kinds.found_shard import Found
from trio.job.input.manifest import Manifest, Shard
from trio.job.output import output_directory
from trio.job.resume.fingerprint import Fingerprint
from trio.job.settings import made_of
from trio.job.storage import locate
from trio.version import VERSION

CONFIG = made_of(input=("x",), output="o", retention=0.5, rows_per_file=8)
SHARD = Shard(number=0, path="/x.parquet", size=10, rows=3, row_groups=(3,))
RUN = output_directory.Pinned(
    run_id="run1",
    manifest=Manifest(shards=(SHARD,)),
    columns=Columns(roles={"image": "jpg", "id": "id"}, id_type=pa.uuid()),
    fingerprint=Fingerprint(
        settings=CONFIG.results(), model_files={"m": "1"}, version=VERSION, libraries={}
    ),
    ids=IdReport(rows=3, complete=True, duplicates=1, nulls=0, examples=("x",)),
    config=CONFIG,
)
FOUND = [Found(locate("/x.parquet"), 10)]


def test_a_claimed_directory_is_found_again(tmp_path: Path) -> None:
    out = locate(str(tmp_path / "o"))
    assert output_directory.earlier(out) is None
    output_directory.claim(out, RUN)
    assert output_directory.earlier(out) == RUN
    names = sorted(p.name for p in (tmp_path / "o").iterdir())
    assert names == ["manifest.parquet", "rows", "run.yaml", "stats"]


def test_files_of_a_run(tmp_path: Path) -> None:
    out = locate(str(tmp_path))
    output_directory.claim(out, RUN)
    assert made_of(**run_yaml.parse((tmp_path / "run.yaml").read_text(), "")) == CONFIG
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table.column_names == ["shard", "path", "size", "rows", "row_groups"]
    assert table.schema.metadata[b"trio.run"] == b"run1"
    assert json.loads(table.schema.metadata[b"trio.units"])["size"] == "bytes"
    assert not output_directory.finished(out)
    summary = {"rows": 3, "cuda_graphs": {"off: no: memory": 1, "on": 2}}
    for _ in range(2):
        output_directory.close(out, summary)
    assert output_directory.finished(out) and output_directory.read_summary(out) == summary
    text = (tmp_path / "run.yaml").read_text()
    assert text.count("# CUDA graphs: off: no: memory (1 file); on (2 files)\n") == 1
    assert made_of(**run_yaml.parse(text, "")) == CONFIG


def test_a_run_without_ids_is_found_again(tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, ids=None)
    output_directory.claim(locate(str(tmp_path)), run)
    assert output_directory.earlier(locate(str(tmp_path))) == run


def test_what_changed_since_the_plan_is_noticed(tmp_path: Path) -> None:
    out = locate(str(tmp_path))
    output_directory.check_unchanged(out, None)
    output_directory.claim(out, RUN)
    output_directory.check_unchanged(out, RUN)
    with pytest.raises(UserError, match="in the meantime"):
        output_directory.check_unchanged(out, None)
    output_directory.close(out, {})
    with pytest.raises(UserError, match="in the meantime"):
        output_directory.check_unchanged(out, RUN)


def test_another_run_is_refused_and_the_difference_named() -> None:
    now = RUN.fingerprint
    output_directory.check_same(RUN, now, FOUND, "o")
    changed = dataclasses.replace(now, settings={**now.settings, "retention": 0.25})
    with pytest.raises(UserError, match=r"retention: 0\.5, now 0\.25\. Give"):
        output_directory.check_same(RUN, changed, FOUND, "o")
    with pytest.raises(UserError, match=r"the input: /x\.parquet had 10 bytes, has 11"):
        output_directory.check_same(RUN, now, [Found(locate("/x.parquet"), 11)], "o")
    settings = {**changed.settings, "seed": 7, "limit": 3}
    many = dataclasses.replace(changed, settings=settings, model_files={"m": "2"})
    with pytest.raises(UserError, match=r"seed: 0, now 7; 2 more\. Give"):
        output_directory.check_same(RUN, many, [], "o")


def test_a_run_of_another_version_is_refused_whatever_it_holds(tmp_path: Path) -> None:
    out, old = locate(str(tmp_path)), dataclasses.replace(RUN.fingerprint, version="0.0.9")
    output_directory.claim(out, dataclasses.replace(RUN, fingerprint=old))
    (tmp_path / "run.yaml").write_text("a_setting_of_old: 1")
    with pytest.raises(UserError, match=r"another version of this package: 0\.0\.9, now .* Go on"):
        output_directory.earlier(out)


def test_a_file_of_a_killed_write_is_no_run(tmp_path: Path) -> None:
    (tmp_path / ".run.yaml.1234.tmp").write_text("")
    assert output_directory.earlier(locate(str(tmp_path))) is None


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        output_directory.claim(locate(str(tmp_path / "file" / "o")), RUN)


def test_an_output_that_cannot_be_looked_at_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        output_directory.finished(locate("/" + "x" * 300))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        output_directory.earlier(locate(str(tmp_path)))
    with pytest.raises(UserError, match=r"thesis\.tex: cannot be read as a directory"):
        output_directory.earlier(locate(str(tmp_path / "thesis.tex")))


@pytest.mark.parametrize("name", ["run.yaml", "manifest.parquet"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    out = locate(str(tmp_path))
    output_directory.claim(out, RUN)
    (tmp_path / name).write_text("[damaged")
    with pytest.raises(UserError, match="cannot be read"):
        output_directory.earlier(out)


def test_fresh_directories_do_not_collide(tmp_path: Path) -> None:
    first = output_directory.fresh_directory("caption", str(tmp_path))
    Path(first).mkdir()
    assert output_directory.fresh_directory("caption", str(tmp_path)) != first
