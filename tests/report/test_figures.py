"""What is read of rows, statistics and gallery, beside loops over the same rows."""

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.report.made_runs import PATCHES, STAGES, VISUAL, MadeRun, kept_of, thumbnail
from trio.report import gallery_cards, row_figures
from trio.report.found_run import find_run
from trio.report.gallery_cards import NOWHERE, cards_of, gallery_keys
from trio.report.row_figures import RowFigures
from trio.report.unit_figures import _rates, unit_figures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    made = MadeRun(tmp_path_factory.mktemp("run"), rows=90, compare=("1", "given", "fastv:1/2"))
    return made.commit().gallery(10).close()


def read(run: MadeRun) -> RowFigures:
    found = find_run(str(run.path))
    return row_figures.row_figures(found, gallery_keys(found))


@pytest.mark.parametrize("batch", [4, 7, 1 << 15])
def test_rows_are_counted_whatever_the_batches(
    run: MadeRun, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_figures, "BATCH", batch)
    made = read(run)
    assert made.rows == len(run.rows) == 270
    of = {(row["row"], row["setting"]): row for row in run.rows}
    for setting, one in enumerate(made.settings):
        good = [row for (_, s), row in of.items() if s == setting and row["error"] is None]
        assert one.before.n == len(good)
        assert one.answers.mean == np.mean([row["output_tokens"] for row in good])
        after = [row["visual_tokens_stages"][-1:] or [VISUAL] for row in good]
        assert one.after.mean == np.mean(after)
        assert one.by_stage == [VISUAL, VISUAL, *(STAGES if setting else ())]
        n, hits = one.sureness.n.get("compare"), one.sureness.hits.get("compare")
        if setting == 0:
            assert n is None
            continue
        assert n is not None and hits is not None
        same = [
            (
                int(math.exp(row["logprob_mean"]) * 10),
                row["response"] == of[row["row"], 0]["response"],
            )
            for row in good
        ]
        assert n.tolist() == [sum(place == b for place, _ in same) for b in range(10)]
        assert hits.tolist() == [sum(hit for place, hit in same if place == b) for b in range(10)]


def test_extremes_and_examples(run: MadeRun) -> None:
    made = read(run)
    good = [row for row in run.rows if row["error"] is None]
    longest = sorted(good, key=lambda row: -row["output_tokens"])[:5]
    found = made.extremes["longest answers"]
    assert [value for value, _ in found] == [row["output_tokens"] for row in longest]
    assert {row["id"] for _, row in found} == {row["id"] for row in longest}
    assert all(row["response"].endswith(row["id"].removeprefix("id-")) for _, row in found)
    lowest = [value for value, _ in made.extremes["lowest retention"]]
    assert lowest == sorted(row["retention"] for row in good)[:5]
    assert list(made.error_examples) == ["image_invalid"]
    assert [row["id"] for row in made.error_examples["image_invalid"]] == ["id-5", "id-17", "id-29"]


def test_the_chart_alone_is_cut_to_the_first_stages(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_figures, "STAGES", len(STAGES) - 1)
    made = read(run)
    pruned = made.settings[1]
    assert pruned.after.mean == STAGES[-1]
    assert pruned.by_stage == [VISUAL, VISUAL, *STAGES[:-1]]
    assert made.of_gallery[0, 0, 1]["stages"] == len(STAGES)
    assert made.of_gallery[0, 0, 0]["stages"] == 0


def test_one_retention_for_all_is_no_extreme(tmp_path: Path) -> None:
    made = MadeRun(tmp_path, rows=1).commit()
    assert "lowest retention" not in read(made).extremes


def test_images_of_units_are_spread_over_their_time(run: MadeRun) -> None:
    units = unit_figures(find_run(str(run.path)))
    width = np.diff(units.edges)
    images = sum((one.rate * width).sum() for one in units.rates)
    good = [row for row in run.rows if row["error"] is None]
    assert images == pytest.approx(len(good)) and units.totals.images == len(good)
    assert [one.name for one in units.rates] == [one.name for one in units.engines]
    (first,) = [one for one in units.engines if one.name == "e0"]
    assert first.rows == sum(row["row"] // 8 % 2 == 0 for row in run.rows)
    # An image of each of three settings in two seconds.
    assert np.sum([one.rate for one in units.rates], axis=0)[3] == pytest.approx(3 / 2, rel=0.2)


def test_units_that_end_in_bursts_are_no_peaks() -> None:
    """Ten images at 10, 20 and 30 s; each unit is told to have begun when the one before ended."""
    ended = (10.0 * np.arange(1, 4)[:, None] + 0.01 * np.arange(5)).ravel()
    began = np.append(0, ended[:-1])
    table = pa.table({"images": [2] * 15, "actor": ["e0"] * 15})
    edges, (only,) = _rates(table, began, ended)
    assert (only.rate * np.diff(edges)).sum() == pytest.approx(30)
    assert only.rate == pytest.approx(1.0, rel=0.1)


def unpack(text: str, kind: str = "<u1") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_cards_hold_what_the_gallery_holds(run: MadeRun) -> None:
    found = find_run(str(run.path))
    cards = cards_of(found, read(run).of_gallery)
    assert [int(one["row"]) for one in cards.cards] == list(range(10)) and not cards.left_out
    assert len(cards.boxes) == 1, "all images have the same geometry"
    boxes = unpack(cards.boxes[0], "<u2").reshape(-1, 4)
    assert boxes[1].tolist() == [
        round((NOWHERE - 1) / PATCHES),
        0,
        round((NOWHERE - 1) / 4),
        boxes[1][3],
    ]
    assert boxes[-1].tolist() == [NOWHERE] * 4
    for card in cards.cards:
        if card["answers"][0]["error"] is not None:
            assert (card["kind"], card["images"]) == ("error", [])
            continue
        index = int(card["row"])
        assert card["images"][0]["src"].endswith(base64.b64encode(thumbnail(index)).decode())
        assert card["kind"] == ("disagreement" if index % 4 == 1 else "sample")
        assert [one["setting"] for one in card["answers"]] == [0, 1, 2]
        assert card["answers"][1]["latency_s"] == pytest.approx(0.5 + 0.1 * index)
        kept = [
            np.flatnonzero(np.unpackbits(unpack(mask), bitorder="little")).tolist()
            for mask in card["answers"][1]["kept"]
        ]
        assert kept == kept_of(index) and card["answers"][1]["counts"] == list(STAGES)
        first, second, _ = map(unpack, card["answers"][1]["scores"])
        assert first.tolist() == sorted(first.tolist()) and (first[0], first[-1]) == (0, 254)
        assert set(np.flatnonzero(second != 255)) == set(kept_of(index)[0])


def test_what_an_encoder_kept_stands_before_the_stages() -> None:
    row: dict[str, Any] = dict.fromkeys(("id", "prompt", "response", "error"))
    row |= {"row": 0, "prompt_number": 0, "setting": 0, "finish_reason": "stop", "visual_tokens": 9}
    row |= {"kept_tokens": [[0, None, 4], [4]], "saliency": [[0.5] * 9]}
    told = gallery_cards._answer(row, {(0, 0, 0): {"latency_s": 1.0, "stages": 1}})
    assert told["reduced"] and told["scores"][0] is None and told["scores"][1] is not None
    assert told["counts"] == [3, 1]
    assert not gallery_cards._answer(row, {(0, 0, 0): {"stages": 2}})["reduced"]


def test_there_is_room_for_some_of_each_kind(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_run(str(run.path))
    whole = cards_of(found, {})
    monkeypatch.setattr(gallery_cards, "MOST_BYTES", sum(len(repr(c)) for c in whole.cards) // 2)
    some = cards_of(found, {})
    kinds = [one["kind"] for one in some.cards]
    assert set(kinds) == {"sample", "disagreement", "error"}
    assert some.left_out == 10 - len(kinds) > 0
    size = sum(len(repr(card)) for card in some.cards) + sum(map(len, some.boxes))
    assert size <= gallery_cards.MOST_BYTES + 100
