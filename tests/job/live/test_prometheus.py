"""What a run's counters count, and that the dashboard shows every one."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from trio.job.engines.engine_actor import _Running
from trio.job.live import prometheus
from trio.job.live.prometheus import COUNTERS, ERRORS, NAMES, SECONDS, increments, short
from trio.job.output.summary import phases
from trio.job.output.totals import Totals

DASHBOARD = Path(prometheus.__file__).with_name("grafana.json")
CLUSTER = Path(prometheus.__file__).parents[1] / "CLUSTER.md"
PLAIN = {f.name: n for n, f in enumerate(dataclasses.fields(Totals), start=1)}
UNIT = Totals(**(PLAIN | {"error_kinds": {"image_empty": 2, "numeric": 1}, "cuda_graphs": {}}))  # type: ignore[arg-type]


def test_what_a_unit_adds_is_what_the_summary_adds() -> None:
    added = {(name, *tags.values()): by for name, tags, by in increments(UNIT)}
    for counter in COUNTERS:
        assert added.pop((counter.name,)) == getattr(UNIT, counter.field)
    assert added.pop((ERRORS, "image_empty")) == 2 and added.pop((ERRORS, "numeric")) == 1
    assert {(name, phase) for name, phase in added} == {(SECONDS, phase) for phase in phases(UNIT)}


def test_phases_of_engines_do_not_overlap() -> None:
    spent = Totals(
        preprocess_wait_s=1.0, encode_s=8.0, encode_saved_s=3.0, prefill_s=16.0, prune_s=6.0,
        decode_s=32.0, idle_s=64.0, audit_s=128.0,
    )  # fmt: skip
    assert phases(spent) == {
        "wait": 1.0, "encode": 5.0, "prefill": 10.0, "choose": 6.0, "decode": 32.0,
        "audit": 128.0, "idle": 64.0,
    }  # fmt: skip


def test_engines_have_few_names() -> None:
    assert short("captions 0123abcd-ef01 pass 3 engine 12") == "12" and short("driver") == "driver"


def test_requests_that_run_together_are_those_since_the_last_look() -> None:
    running = _Running()
    assert [running.mean(*sums) for sums in ((0, 0), (30, 10), (30, 10), (42, 12))] == [0, 3, 0, 6]


def expressions(board: dict[str, Any]) -> str:
    return "\n".join(t["expr"] for panel in board["panels"] for t in panel["targets"])


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    board = json.loads(DASHBOARD.read_text())
    shown = set(re.findall(r"ray_(\w+)", expressions(board)))
    assert shown == NAMES
    assert all(f"ray_{name}{{" in expressions(board) for name in NAMES)
    of_counters = re.findall(r"(\w+)\(ray_(trio_\w+)", expressions(board))
    assert {name for function, name in of_counters if function == "rate"} <= {
        name for name in NAMES if name.endswith("_total")
    }
    (run,) = (one for one in board["templating"]["list"] if one["name"] == "run")
    assert run["query"]["query"] == "label_values(ray_trio_rows_left, run)"


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23


def test_names_follow_the_rules_of_prometheus_and_stand_in_the_documentation() -> None:
    counters = {counter.name for counter in COUNTERS} | {ERRORS, SECONDS}
    assert {name for name in NAMES if name.endswith("_total")} == counters
    assert all(re.fullmatch(r"trio_[a-z_]+", name) for name in NAMES)
    text = CLUSTER.read_text()
    assert not [name for name in NAMES if f"`ray_{name}" not in text]
