"""Output directories: new, unfinished, finished, somebody else's."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from trio.errors import UserError
from trio.pipeline import outdir
from trio.pipeline.config import JobConfig, from_mapping
from trio.pipeline.manifest import Manifest, Shard
from trio.pipeline.storage import locate

CONFIG = JobConfig(input=("x",), output="o", retention=0.5, rows_per_file=8)
SHARD = Shard(number=0, path="/x.parquet", size=10, rows=3, row_groups=(3,))
MANIFEST = Manifest(shards=(SHARD,))


def test_a_claimed_directory_is_found_again(tmp_path: Path) -> None:
    out = locate(str(tmp_path / "o"))
    assert outdir.earlier(out) is None
    outdir.claim(out, CONFIG, MANIFEST, "run1")
    found = outdir.earlier(out)
    assert found is not None
    assert (found.run_id, found.manifest, found.config) == ("run1", MANIFEST, CONFIG)
    names = sorted(p.name for p in (tmp_path / "o").iterdir())
    assert names == ["manifest.parquet", "rows", "run.yaml", "stats"]


def test_files_of_a_run(tmp_path: Path) -> None:
    out = locate(str(tmp_path))
    outdir.claim(out, CONFIG, MANIFEST, "run1")
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert from_mapping(values, "run.yaml") == CONFIG
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table.column_names == ["shard", "path", "size", "rows", "row_groups"]
    assert table.schema.metadata[b"trio.run"] == b"run1"
    assert yaml.safe_load(table.schema.metadata[b"trio.units"])["size"] == "bytes"
    assert not outdir.finished(out)
    outdir.close(out, {"rows": 3})
    assert outdir.finished(out) and outdir.read_summary(out) == {"rows": 3}


def test_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    out = locate(str(tmp_path))
    outdir.claim(out, CONFIG, MANIFEST, "run1")
    old = outdir.earlier(out)
    assert old is not None
    outdir.check_same(old, CONFIG.replace(actors=3), MANIFEST, "o")
    with pytest.raises(UserError, match=r"retention: 0\.5, now 0\.25"):
        outdir.check_same(old, CONFIG.replace(retention=0.25), MANIFEST, "o")
    longer = Manifest(
        shards=(Shard(number=0, path="/x.parquet", size=11, rows=4, row_groups=(4,)),)
    )
    with pytest.raises(UserError, match="had 3 rows"):
        outdir.check_same(old, CONFIG, longer, "o")


def test_a_run_stopped_during_its_comparison_goes_on(tmp_path: Path) -> None:
    """The unpruned run lies inside and comes first; a hidden file may be left of a killed write."""
    outdir.claim(locate(str(tmp_path / "o" / "unpruned")), CONFIG, MANIFEST, "run1")
    (tmp_path / "o" / ".run.yaml.1234.tmp").write_text("")
    assert outdir.earlier(locate(str(tmp_path / "o"))) is None


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        outdir.claim(locate(str(tmp_path / "file" / "o")), CONFIG, MANIFEST, "run1")


def test_an_output_that_cannot_be_looked_at_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        outdir.finished(locate("/" + "x" * 300))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        outdir.earlier(locate(str(tmp_path)))
    with pytest.raises(UserError, match="is a file"):
        outdir.earlier(locate(str(tmp_path / "thesis.tex")))


@pytest.mark.parametrize("name", ["run.yaml", "manifest.parquet"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    out = locate(str(tmp_path))
    outdir.claim(out, CONFIG, MANIFEST, "run1")
    (tmp_path / name).write_text("[damaged")
    with pytest.raises(UserError, match="cannot be read"):
        outdir.earlier(out)


def test_fresh_directories_do_not_collide(tmp_path: Path) -> None:
    first = outdir.fresh_directory("caption", str(tmp_path))
    Path(first).mkdir()
    assert outdir.fresh_directory("caption", str(tmp_path)) != first
