"""`benchmark.py launches` and `questions`: what a prefill asks of a GPU; what questions share."""

import json
from pathlib import Path

import benchmark
import pytest

from trio.benchmark.speed.launches import PRUNINGS, prefill

IMAGES = 5


@pytest.mark.parametrize(("fused", "most"), [(True, 2000), (False, 2600)])
@pytest.mark.parametrize(
    "fill", [pytest.param("nothing filled up", marks=pytest.mark.slow), "filled up"]
)
def test_a_pruned_prefill_asks_little_of_a_gpu(fused: bool, most: int, fill: str) -> None:
    counted = prefill(PRUNINGS[fill], IMAGES, fused=fused)
    assert 500 < counted.launches <= most
    assert counted.syncs <= 8


def test_a_wait_is_counted() -> None:
    unpruned = prefill(PRUNINGS["unpruned"], 1, fused=True)
    pruned = prefill(PRUNINGS["filled up"], 1, fused=True)
    assert unpruned.syncs < pruned.syncs
    assert unpruned.launches < pruned.launches
    assert pruned.by_operation["suppression and fill-up"] == 3


def test_questions_on_an_image_are_answered_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    command = ["questions", "--shape", "tiny", "--images", "2", "--questions", "3"]
    more = ["--first-stage", "0,2", "--rounds", "1", "--json", str(file)]
    assert benchmark.main([*command, *more]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["answered_alike"] for row in rows] == [6, 6]
    assert [row["image_layers"] for row in rows] == [0, 4]
    assert [row["images_encoded"] for row in rows] == [2, 2]
    assert "6 of 6" in capsys.readouterr().out
