"""What an audit says of 1,000 rows, beside both full runs over them; minutes, so by hand."""

import json
from pathlib import Path
from typing import Any

import caption
import numpy as np
import pyarrow.parquet as pq
import pytest

from trio.demo.shard import write_shard
from trio.job.command import main
from trio.job.comparing.audit import COLUMNS, Audit, audit_summary

RETENTION, RATE = "3/100", 0.1
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("ray_local"),
]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "scenes.parquet"
    write_shard(path, scenes=500, seed=11)
    return path


@pytest.fixture(scope="module")
def full(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each row with both answers, of a run that asks all rows both ways."""
    out = tmp_path_factory.mktemp("full") / "out"
    assert run(shard, out, "--compare", f"1,{RETENTION}") == 0
    rows = pq.read_table(out / "rows").to_pylist()
    both = {(one["row"], one["setting"]): one for one in rows}
    assert len(both) == 2000
    return [both[n, 1] | {"unpruned": both[n, 0]["response"]} for n in range(1000)]


def run(shard: Path, out: Path, *flags: str) -> int:
    return main(
        caption.JOB, ["--input", str(shard), "--output", str(out), "--log-interval", "30", *flags]
    )


def selected(rows: list[dict[str, Any]], same: np.ndarray, seed: int) -> dict[str, Any]:
    """What an audit with this seed would say."""
    audit = Audit(rate=RATE, seed=seed)
    kept = [
        dict.fromkeys(COLUMNS) | {"picture": row["picture"], "audit_match": bool(same[n])}
        for n, row in enumerate(rows)
        if audit.chooses(row["row"])
    ]
    return audit_summary(kept, RATE, 0.0, of_rows=len(rows))


@pytest.mark.parametrize("planted", [None, 1, 5, 50, 200])
def test_the_interval_holds_the_share_of_the_full_runs(
    full: list[dict[str, Any]], planted: int | None
) -> None:
    """In 1,000 selections; `planted`: so many rows changed, in place of those that really did."""
    same = np.array([row["response"] == row["unpruned"] for row in full])
    if planted is not None:
        same = np.ones(len(full), bool)
        same[np.random.default_rng(planted).choice(len(full), planted, replace=False)] = False
    found = [selected(full, same, seed)["agreement"]["interval"] for seed in range(1000)]
    held = np.mean([low <= same.mean() <= high for low, high in found])
    width = np.mean([high - low for low, high in found])
    print(f"{(~same).sum()} changed: held in {100 * held:.1f} %, mean width {width:.3f}")
    assert held >= 0.92


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_real_audit_says_what_the_full_runs_do(
    full: list[dict[str, Any]], shard: Path, tmp_path: Path, seed: int
) -> None:
    flags = ["--retention", RETENTION, "--audit", str(RATE), "--seed", str(seed)]
    assert run(shard, tmp_path / "out", *flags) == 0
    rows = pq.read_table(tmp_path / "out" / "rows").sort_by("row").to_pylist()
    audited = {one["row"] for one in rows if one["audit_match"] is not None}
    assert audited == {n for n in range(1000) if Audit(rate=RATE, seed=seed).chooses(n)}
    assert [one["response"] for one in rows] == [one["response"] for one in full]
    for one in rows:
        if one["row"] in audited:
            assert one["audit_response"] == full[one["row"]]["unpruned"]
            assert one["audit_repeat_match"] is not False
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["audit"]
    same = np.array([row["response"] == row["unpruned"] for row in full])
    expected = selected(full, same, seed)["agreement"]
    assert said["agreement"] == expected
    low, high = expected["interval"]
    print(f"seed {seed}: {said['agreement']}, all rows {same.mean():.4f}, {said['seconds']:.1f} s")
    assert low <= same.mean() <= high
