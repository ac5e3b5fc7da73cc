"""Pruned settings beside unpruned ones, against plain scripts."""

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from trio.errors import UserError
from trio.vqa.figures.answered import Answered
from trio.vqa.figures.benchmark_average import average_over
from trio.vqa.figures.comparison_table import comparison_table
from trio.vqa.figures.run_comparison import PairedScores, compare_metrics, paired_scores
from trio.vqa.figures.run_metrics import run_metrics
from trio.vqa.relative_score import compare


def rows_of(
    right: Sequence[float | None], *, pictures: int = 1, truth: bool = True
) -> list[Answered]:
    """Yes or no; None failed; `pictures` rows of each picture."""
    return [
        Answered(
            key=(number, 0),
            picture=f"p{number // pictures}",
            prediction=None if one is None else "yes" if one else "no",
            fields={"answers": ["yes"]} if truth else {},
        )
        for number, one in enumerate(right)
    ]


def compared(metric: str | None, *runs: list[Answered]) -> dict[str, Any]:
    found = compare_metrics(metric, *map(iter, runs))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def drawn(
    benchmarks: Sequence[tuple[Sequence[float], Sequence[float], Sequence[str]]],
    together: bool,
    draws: int,
) -> list[float]:
    """Mean relative scores, sorted, by plain loops."""
    rng = random.Random(5)
    means = []
    for _ in range(draws):
        shared = sorted({one for _, _, pictures in benchmarks for one in pictures})
        times = dict.fromkeys(shared, 0)
        for _ in shared:
            times[rng.choice(shared)] += 1
        relatives = []
        for x, y, pictures in benchmarks:
            if not together:
                own = sorted(set(pictures))
                times = dict.fromkeys(own, 0)
                for _ in own:
                    times[rng.choice(own)] += 1
            below = sum(times[picture] * score for picture, score in zip(pictures, x, strict=True))
            above = sum(times[picture] * score for picture, score in zip(pictures, y, strict=True))
            relatives.append(above / below)
        means.append(sum(relatives) / len(relatives))
    return sorted(means)


def test_a_headline_by_hand() -> None:
    rng = random.Random(4)
    x = [float(rng.random() < 0.8) for _ in range(150)]
    y = [one * (rng.random() < 0.8) if one else float(rng.random() < 0.2) for one in x]
    found = compared("exact_match", rows_of(x, pictures=3), rows_of(y, pictures=3)[::-1])
    headline = found["headline"]
    assert headline["of"] == "rows"
    assert headline["relative"] == pytest.approx(sum(y) / sum(x))
    assert headline["difference_points"] == pytest.approx(100 * (sum(y) - sum(x)) / 150)
    lost = sum(a > b for a, b in zip(x, y, strict=True))
    won = sum(b > a for a, b in zip(x, y, strict=True))
    assert lost > won > 0
    assert (headline["only_unpruned"], headline["only_pruned"]) == (lost, won)
    assert (headline["interval_by"], headline["few_changes"]) == ("bootstrap", False)
    means = drawn([(x, y, [f"p{number // 3}" for number in range(150)])], False, 3000)
    ends = means[75], means[2925]
    assert headline["relative_interval"] == pytest.approx(ends, abs=0.1 * (ends[1] - ends[0]))
    assert (found["n"], found["left_out"], headline["pictures"]) == (150, 0, 50)
    figure = found["figures"]["accuracy"]
    assert figure["relative_interval"] == pytest.approx(headline["relative_interval"])
    assert found["agreement"]["value"] == pytest.approx((150 - lost - won) / 150)


def test_only_rows_that_both_answered_count() -> None:
    x, y = rows_of([1, 1, 0, None, 1, 1]), rows_of([1, 0, None, 1, 1])
    found = compared("exact_match", x, y)
    assert (found["n"], found["left_out"]) == (3, 3)
    assert (found["headline"]["unpruned"], found["headline"]["pruned"]) == (1, pytest.approx(2 / 3))
    assert found["headline"]["interval_by"] == "wilson"
    assert found["headline"]["few_changes"] is True


def test_nothing_right_before_is_no_relative_score() -> None:
    found = compared("exact_match", rows_of([0] * 4), rows_of([1] * 4))
    assert found["headline"]["relative"] is None
    assert found["headline"]["relative_interval"] is None
    assert found["headline"]["difference_points"] == 100


@pytest.mark.parametrize(("metric", "lacking"), [(None, 0), ("exact_match", 9)])
def test_without_a_truth_there_is_agreement(metric: str | None, lacking: int) -> None:
    x, y = [1, 1, 0, 0, 1, 1, 1, 0, 1, None], [1, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    found = compared(metric, rows_of(x, truth=False), rows_of(y, truth=False))
    assert (found["n"], found["left_out"], found["without_truth"]) == (9, 1, lacking)
    assert found["headline"] is None
    assert found["agreement"]["value"] == pytest.approx(7 / 9)
    bounds = binomtest(7, 9).proportion_ci(method="wilson")
    assert found["agreement"]["interval"] == pytest.approx([bounds.low, bounds.high])
    assert compared(metric, [], [])["agreement"] is None
    assert compared(metric, rows_of([None]), rows_of([1]))["left_out"] == 1


def pair(number: int, predictions: tuple[str | None, str | None]) -> list[Answered]:
    return [
        Answered(
            key=(2 * number + place, 0),
            picture=f"p{number}",
            prediction=prediction,
            fields={"answer": ("Yes", "No")[place], "category": "OCR", "question_id": str(number)},
        )
        for place, prediction in enumerate(predictions)
    ]


def test_a_pair_that_one_run_has_not_whole_is_left_out() -> None:
    x = pair(0, ("Yes", "No")) + pair(1, ("Yes", "No"))
    y = pair(0, ("Yes", "Yes")) + pair(1, ("Yes", None))
    found = compared("mme", x, y)
    assert (found["n"], found["left_out"]) == (2, 2)
    assert (found["headline"]["unpruned"], found["headline"]["pruned"]) == (1, 0.5)
    assert (found["figures"]["total"]["unpruned"], found["figures"]["total"]["pruned"]) == (200, 50)


def objects(mentioned: list[list[str]]) -> list[Answered]:
    return [
        Answered(
            key=(number, 0),
            picture="",
            prediction=" and ".join(one),
            fields={"mentioned": one, "present": ["dog"]},
        )
        for number, one in enumerate(mentioned)
    ]


def test_where_rows_are_worth_nothing_alone_a_figure_is_the_headline() -> None:
    x = objects([["dog", "cup"]] * 20)
    y = objects([["dog"]] * 10 + [["cup", "dog"]] * 10)
    headline = compared("chair", x, y)["headline"]
    assert headline["of"] == "chair_i"
    assert headline["relative"] == pytest.approx((10 / 30) / (20 / 40))
    assert headline["difference_points"] == pytest.approx(100 * (1 / 3 - 1 / 2))
    assert (headline["only_unpruned"], headline["interval_by"]) == (None, "bootstrap")
    low, high = headline["relative_interval"]
    assert low < headline["relative"] < high
    assert paired_scores("chair", x, y) is None


def test_two_rows_of_one_key_are_named() -> None:
    rows = rows_of([1, 1])
    with pytest.raises(UserError, match="row 1, prompt 0 stands twice"):
        compare_metrics("exact_match", rows, [*rows, rows[1]])


def paired(x: Sequence[float], y: Sequence[float], pictures: Sequence[Any]) -> PairedScores:
    return PairedScores(unpruned=np.array(x), pruned=np.array(y), pictures=pictures)


def benchmark(
    rng: random.Random, pictures: Sequence[str], lost: set[str]
) -> tuple[list[float], list[float], list[str]]:
    """Of rows that are right, those of the pictures `lost` are not after pruning."""
    x = [float(rng.random() < 0.9) for _ in pictures]
    y = [0.0 if picture in lost else one for picture, one in zip(pictures, x, strict=True)]
    return x, y, list(pictures)


def test_benchmarks_that_share_pictures_are_drawn_together() -> None:
    rng = random.Random(6)
    pictures = [f"p{number}" for number in range(60)]
    lost = {picture for picture in pictures if rng.random() < 0.4}
    first, second = (benchmark(rng, pictures, lost) for _ in range(2))
    ends = {}
    for together in (True, False):
        names = second[2] if together else [f"other {name}" for name in second[2]]
        found = average_over({"a": paired(*first), "b": paired(second[0], second[1], names)})
        means = drawn([first, (second[0], second[1], names)], together, 3000)
        expected = means[75], means[2925]
        width = expected[1] - expected[0]
        assert found["relative_interval"] == pytest.approx(expected, abs=0.1 * width), together
        each = [sum(y) / sum(x) for x, y, _ in (first, second)]
        assert found["relative"] == pytest.approx(sum(each) / 2)
        assert found["drawn_together"] == ([["a", "b"]] if together else [])
        assert (found["few_changes"], found["draws_left_out"]) == ([], 0)
        ends[together] = width
    assert ends[True] > 1.25 * ends[False]


def test_pictures_that_are_not_known_are_never_shared() -> None:
    rows = rows_of([1, 1, 0, 1])
    bare = [
        Answered(key=row.key, picture="", prediction=row.prediction, fields=row.fields)
        for row in rows
    ]
    for scored, together in ((rows, [["a", "b"]]), (bare, [])):
        scores = paired_scores("exact_match", scored, scored)
        assert scores is not None
        found = average_over({"a": scores, "b": scores})
        assert found["drawn_together"] == together
        assert found["few_changes"] == ["a", "b"]


def test_benchmarks_are_tied_over_others() -> None:
    one = [1.0, 1.0]
    found = average_over(
        {
            "a": paired(one, one, ["p", "q"]),
            "b": paired(one, one, ["r", "s"]),
            "c": paired(one, one, ["q", "r"]),
            "d": paired(one, one, ["x", "y"]),
        }
    )
    assert found["drawn_together"] == [["a", "b", "c"]]
    assert found["relative"] == 1
    # Of a, b and c some draws have no row at all.
    assert 0 < found["draws_left_out"] < 10_000


def test_an_average_that_is_not_defined() -> None:
    nothing = paired([0.0, 0.0], [1.0, 1.0], ["p", "q"])
    found = average_over({"a": nothing, "b": paired([1.0], [1.0], ["z"])})
    assert (found["relative"], found["relative_interval"]) == (None, None)
    assert (found["undefined"], found["benchmarks"]) == (["a"], {"a": None, "b": 1})
    with pytest.raises(UserError, match="no benchmarks"):
        average_over({})
    with pytest.raises(UserError, match="benchmark 'a': no row"):
        average_over({"a": paired([], [], [])})


def test_a_table_of_settings() -> None:
    x, y = rows_of([1.0] * 30 + [0.0] * 10), rows_of([1.0] * 27 + [0.0] * 13)
    full = run_metrics("exact_match", x, about={})
    half = run_metrics("exact_match", y, about={}) | {
        "comparison": compare_metrics("exact_match", x, y),
        "retention": 0.5,
    }
    bare = run_metrics(None, y, about={}) | {"comparison": compare_metrics(None, x, y)}
    lines = comparison_table([("unpruned", full), ("half | a", half), ("bare", bare)]).splitlines()
    assert lines[0].endswith("right only unpruned / only pruned | visual tokens kept |")
    bounds = binomtest(27, 40).proportion_ci(method="wilson")
    score = f"accuracy 67.5 % [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]"
    low, high = half["comparison"]["headline"]["relative_interval"]
    assert lines[3].startswith(
        rf"| half \| a | {score} | 90.0 % [{100 * low:.1f}, {100 * high:.1f}] | -7.5 ["
    )
    assert lines[3].endswith("| 3 / 0 | 50.0 % |")
    assert lines[4] == "| bare | – | – | – | – | – |"
    assert (
        comparison_table([("u", full | {"images_per_s": 12.34})])
        .splitlines()[2]
        .endswith("| – | 12.3 |")
    )
    total = run_metrics("mme", pair(0, ("Yes", "No")), about={})
    assert "| total 200 |" in comparison_table([("u", total)])


def test_very_many_pictures_are_drawn_in_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """With intervals as long."""
    rng = np.random.default_rng(7)
    x = rng.random(20_000)
    y = x * (rng.random(20_000) < 0.7)
    whole = compare(x, y, np.arange(20_000))
    monkeypatch.setattr("trio.vqa.relative_score.LOTS", 1_000)
    lots = compare(x, y, np.arange(20_000))
    assert whole.relative_interval is not None
    assert lots.relative_interval is not None
    assert lots.relative_interval != whole.relative_interval
    width = whole.relative_interval[1] - whole.relative_interval[0]
    assert lots.relative_interval == pytest.approx(whole.relative_interval, abs=0.07 * width)
    assert lots.difference_interval == pytest.approx(
        whole.difference_interval,
        abs=0.07 * (whole.difference_interval[1] - whole.difference_interval[0]),
    )
