"""The summary and its table."""

import json
from typing import Any

import pytest

from trio.job.output.summary import bottleneck, of_setting, summarise, table
from trio.job.output.totals import SECONDS, Totals

TOTALS = Totals(
    rows=20, errors=2, error_kinds={"image_empty": 2}, images=18, output_tokens=90, scored=20,
    right=15, score_sum=15.0, captions=4, object_share_sum=3.0, retention_sum=2.0,
    retention_rows=18, prefill_flops=10, prefill_flops_unpruned=66, reading_flops=20,
    reading_flops_unpruned=50, kv_bytes=10, kv_bytes_unpruned=51, preprocess_wait_s=9.0,
    decode_s=1.0,
)  # fmt: skip


def made(
    totals: Totals = TOTALS, before: Totals | None = None, score: str = "objects", **more: Any
) -> dict[str, Any]:
    return summarise(
        totals,
        name="trio",
        score=score,
        run_id="r",
        wall_s=75.0,
        done_before=before or Totals(),
        work_s=9.0,
        resources="1 node",
        **more,
    )


def test_totals_rates_and_ratios() -> None:
    summary = made()
    assert summary["images_per_s"] == 2.0 and summary["output_tokens_per_s"] == 10.0
    assert summary["flops_ratio"] == 6.6 and summary["kv_ratio"] == 5.1
    assert summary["accuracy"] == 0.75 and summary["error_rate"] == 0.1
    assert summary["bottleneck"] == "waiting for images 90 %"
    assert summary["phases"] == {name: getattr(TOTALS, name) for name in SECONDS}
    assert json.loads(json.dumps(summary)) == summary


def test_an_earlier_attempts_rows_are_not_todays_speed() -> None:
    summary = made(before=Totals(rows=10, images=9, output_tokens=45))
    assert summary["images_per_s"] == 1.0 and summary["rows"] == 20 and summary["rows_before"] == 10


def compared(*settings: tuple[str, Totals], score: str = "objects") -> str:
    """The table of a run that compares these."""
    parts = [of_setting(totals, name, engines=1, score=score) for name, totals in settings]
    return table(made(settings=parts))


def test_settings_stand_side_by_side() -> None:
    other = Totals(rows=20, scored=20, right=18, score_sum=18.0, images=20, encode_s=4.0)
    text = compared(("trio", TOTALS), ("unpruned", other))
    *rows, last = text.splitlines()
    lines = {line[:30].strip(): line.split() for line in rows}
    assert rows[0].split() == ["trio", "unpruned"]
    assert "15/20 = 75.0 %" in text and "18/20 = 90.0 %" in text
    assert "6.60 x fewer" in text and "2.50 x fewer" in text
    assert lines["images/s"][-2:] == ["18.00", "5.00"]
    assert lines["engines' time"][2:] == [
        "waiting",
        "for",
        "images",
        "90",
        "%",
        "encoder",
        "100",
        "%",
    ]
    assert len({len(line) for line in rows}) == 1 and last == "the whole job took 1:15"


def test_a_run_of_one_setting_says_how_long_it_took() -> None:
    lines = {line[:30].strip(): line.split() for line in table(made()).splitlines()}
    assert list(lines).index("wall time") == list(lines).index("images/s") + 1
    assert lines["wall time"][-1] == "1:15"


def test_objects_are_told_of_only_where_asked() -> None:
    lines = {line[:30].strip(): line.split() for line in table(made()).splitlines()}
    assert lines["objects named rightly"][-2:] == ["75.0", "%"]
    assert "objects" not in table(made(score="exact"))


def test_how_often_memory_ran_out_is_told() -> None:
    text = compared(*((str(n), Totals(rows=3, out_of_memory=n)) for n in (0, 1, 2)))
    (line,) = [line for line in text.splitlines() if line.startswith("out of memory")]
    assert line.split()[-5:] == ["-", "1", "time", "2", "times"]


def test_lines_that_say_nothing_are_left_out() -> None:
    text = table(made(Totals(rows=3)))
    assert "engines' time" not in text and made(Totals(rows=3))["bottleneck"] is None
    assert "right" not in text and "FLOPs" not in text
    assert [line.split() for line in text.splitlines()][2] == ["rows", "in", "error", "0"]


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        ({}, None),
        ({"prepare_s": 99.0}, None),
        ({"preprocess_wait_s": 9.0, "encode_s": 1.0}, "waiting for images 90 %"),
        ({"prefill_s": 4.0, "prune_s": 3.5, "decode_s": 6.0}, "decode 60 %"),
        ({"prefill_s": 4.0, "encode_s": 1.0, "idle_s": 3.0}, "prefill 50 %"),
    ],
)
def test_the_bottleneck_counts_each_second_once(spent: dict[str, Any], expected: Any) -> None:
    assert bottleneck(Totals(**spent)) == expected
