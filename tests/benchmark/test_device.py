"""`benchmark.py targets` in parts: what they find on a CPU; one that fails costs itself alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch

from trio.benchmark.speed import device
from trio.benchmark.speed.device import Bench, Figure
from trio.benchmark.speed.targets import parity_row

TINY = ["targets", "--device", "cpu", "--shape", "tiny"]


def figures(file: Path) -> list[dict[str, Any]]:
    found = json.loads(file.read_text())["figures"]
    assert isinstance(found, list)
    return found


@pytest.mark.slow
def test_parts_yield_their_figures_and_parity_is_held_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "DTYPES", (torch.float32,))  # the other is as long
    file = tmp_path / "x.json"
    parts = "env,parity,paged,prefill,fill,fused,profile,decode,graphs,admission"
    assert benchmark.main([*TINY, "--parts", parts, "--json", str(file)]) == 0
    found = figures(file)
    assert list(dict.fromkeys(one["part"] for one in found)) == list(device.PARTS)
    of = {part: [one for one in found if one["part"] == part] for part in device.PARTS}
    (exact,) = of["parity"]
    names = ("as_generate", "graphs_as_eager", "batch_as_single")
    assert [exact[name] for name in names] == [6] * 3
    unpruned, pruned = of["prefill"]
    assert pruned["speed_up"] == unpruned["total_s"] / pruned["total_s"]
    assert unpruned["prune_ms_per_image"] == 0 < pruned["prune_ms_per_image"]
    assert [one["decode_steps"] for one in of["decode"]] == [3, 3]
    assert all(one["largest_difference"] < 1e-5 for one in of["paged"])
    assert [one["layers"] for one in of["fused"]] == ["as transformers has them", "fused"]
    (mixed,) = of["admission"]
    assert mixed["requests"] == 32 and 0 < mixed["running_mean"] <= 8
    assert all(one["dearest"] and one["operations_ms"] > 0 for one in of["profile"])
    printed = capsys.readouterr().out
    assert "parity, float32" in printed and "missed" not in printed
    assert "dearest" not in printed


def test_answers_that_differ_are_a_target_that_is_missed() -> None:
    exact = {"requests": 6, "as_generate": 6, "graphs_as_eager": 5, "batch_as_single": 6}
    row = parity_row(exact)
    assert (row["figure"], row["value"], row["met"]) == ("graphs_as_eager", 5, False)
    assert parity_row(exact | {"graphs_as_eager": 6})["met"]


def test_each_figure_is_written_at_once_and_a_failure_costs_its_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    seen: list[int] = []

    def good(bench: Bench) -> Iterator[Figure]:
        yield {"a": 1}
        seen.append(len(figures(file)))
        yield {"a": 2}

    def bad(bench: Bench) -> Iterator[Figure]:
        yield {"b": 1}
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(
        device, "PARTS", {"env": (good, 0.0), "fill": (bad, 0.0), "decode": (good, 1e9)}
    )
    command = [*TINY, "--parts", "env,fill,decode", "--seconds", "60", "--json", str(file)]
    assert benchmark.main(command) == 1
    found = figures(file)
    assert seen == [1]
    assert [(one["part"], one.get("a"), one.get("b")) for one in found[:3]] == [
        ("env", 1, None),
        ("env", 2, None),
        ("fill", None, 1),
    ]
    assert found[3]["failed"] == "CUDA error: no kernel image" and "trace" in found[3]
    assert "s left" in found[4]["skipped"] and len(found) == 5
    told = capsys.readouterr()
    assert "failed: fill" in told.err and "no kernel image" in told.out
    assert "Traceback" not in told.out + told.err


def test_no_comparison_begins_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    command = [*TINY, "--parts", "goals", "--seconds", "1e-9", "--json", str(file)]
    assert benchmark.main(command) == 0
    assert {one["part"] for one in figures(file)} == {"goals"}
    assert "left out, as --seconds" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--parts", "all"], ["--seconds", "0"], ["--shape", "huge"]])
def test_mistakes_end_with_code_2_and_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["targets", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: ") and error.count("\n") == 1
