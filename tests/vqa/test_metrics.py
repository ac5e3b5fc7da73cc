"""Metrics against recorded values of the official evaluators, and what they refuse."""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from trio.errors import UserError
from trio.vqa import metrics
from trio.vqa.aggregates import METRICS, total
from trio.vqa.caption_scores import bleu
from trio.vqa.objects import read_objects

VECTORS = sorted(Path(__file__).with_name("vectors").glob("*.json"))
AGGREGATES = [
    (case["call"]["metric"], case["call"]["rows"])
    for file in VECTORS
    for case in json.loads(file.read_text())["cases"]
    if case["function"] == "aggregate"
]


def same(given: Any, wanted: Any, tolerance: float) -> bool:
    """Numbers to the tolerance; of a mapping the wanted keys; everything else exactly."""
    if isinstance(wanted, Mapping):
        return all(name in given and same(given[name], wanted[name], tolerance) for name in wanted)
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return len(given) == len(wanted) and all(
            same(*pair, tolerance) for pair in zip(given, wanted, strict=True)
        )
    if isinstance(wanted, float | int) and not isinstance(wanted, bool):
        return math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return bool(given == wanted)


@pytest.mark.parametrize("file", VECTORS, ids=lambda file: file.stem)
def test_official_values(file: Path) -> None:
    recorded = json.loads(file.read_text())
    missed = {}
    for case in recorded["cases"]:
        given = getattr(metrics, case["function"])(**case["call"])
        if not same(given, case["expected"], case.get("tolerance", recorded["tolerance"])):
            missed[case["id"]] = given, case["expected"]
    assert not missed
    assert recorded["cases"]


@pytest.mark.parametrize(("metric", "rows"), AGGREGATES[::2])
def test_figures_do_not_depend_on_the_order_of_rows(metric: str, rows: list[Any]) -> None:
    shuffled = random.Random(0).sample(rows, len(rows))
    assert metrics.aggregate(metric, iter(shuffled)) == pytest.approx(
        metrics.aggregate(metric, rows), abs=1e-12
    )


@pytest.mark.parametrize("metric", METRICS)
def test_sums_of_parts_give_the_figures_of_the_whole(metric: str) -> None:
    """What a bootstrap and a job in many files rely on."""
    rows = next(rows for name, rows in AGGREGATES if METRICS[name].fields == METRICS[metric].fields)
    known = METRICS[metric]
    items = list(known.items(rows))
    assert sorted(row for item in items for row in item.rows) == list(range(len(rows)))
    parts = [total(item.adds for item in items[start::3]) for start in range(3)]
    figures = known.figures(total(part for part in parts if part))
    whole = metrics.aggregate(metric, rows)
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(
        {name: value for name, value in whole.items() if name != "n"}
    )
    assert whole["n"] == len(rows)


PAIR = {"category": "count", "question_id": "7", "prediction": "Yes", "answer": "Yes"}
SEED = {"prediction": "A", "answer": "A", "data_type": "image", "question_type": 1}
TURNED = {"prediction": "A", "answer": "A", "choices": ["one", "two"]}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.normalize_answer("a", rule="vqa"), "rule 'vqa'; known: textvqa, vqav2"),
        (lambda: metrics.vqa_accuracy("a", ["a"], rule="gqa"), "rule 'gqa'"),
        (lambda: metrics.vqa_accuracy("a", []), "answers is empty"),
        (lambda: metrics.vqa_accuracy("a", "a"), "answers: a list of texts is needed, not 'a'"),
        (lambda: metrics.exact_match("a", []), "answers is empty"),
        (lambda: metrics.anls("a", []), "answers is empty"),
        (lambda: metrics.ocrbench("a", []), "answers is empty"),
        (lambda: metrics.rouge_l("a", []), "references is empty"),
        (lambda: metrics.yes_no("yes", rule="vqa"), "rule 'vqa'"),
        (lambda: metrics.choice_letter("A", []), "not 0"),
        (lambda: metrics.choice_letter("A", ["a"], rule="vqa"), "rule 'vqa'"),
        (lambda: metrics.parse_box("[0, 0, 1, 1]", rule="vqa"), "rule 'vqa'"),
        (lambda: metrics.box_iou((0, 0, 1), (0, 0, 1, 1)), "x1, y1, x2, y2"),
        (lambda: metrics.cider(["a"], []), "1 predictions"),
        (lambda: bleu(["a"], [["a"]], order=5), "order 5"),
        (lambda: metrics.wilson_interval(2, 1), "2 successes of 1"),
        (lambda: metrics.wilson_interval(0, 0), "0 successes of 0"),
        (lambda: metrics.aggregate("vqa", []), "unknown metric 'vqa'"),
        (lambda: metrics.aggregate("gqa", []), "no rows"),
        (lambda: metrics.aggregate("gqa", [{"prediction": "a", "answer": "a"}]), "'structural'"),
        (lambda: metrics.aggregate("pope", [PAIR | {"answer": "Yes"}]), "row 0: answer 'Yes'"),
        (lambda: metrics.aggregate("mme", [PAIR] * 3), "'7' of category 'count' has 3 rows"),
        (lambda: metrics.aggregate("ai2d", [TURNED | {"answer": "2"}]), "no place of 2 choices"),
        (
            lambda: metrics.aggregate("mmbench", [TURNED | {"index": "nan"}]),
            "'nan' is no whole number",
        ),
        (lambda: metrics.aggregate("mmbench", [TURNED | {"index": 1000003}]), "index 3 has rota"),
        (lambda: metrics.aggregate("mmbench", [TURNED | {"index": 3}] * 2), "stands in two rows"),
        (
            lambda: metrics.aggregate("mmbench", [TURNED | {"index": 3, "answer": "nan"}]),
            "row 0: answer 'nan'",
        ),
        (lambda: metrics.aggregate("mmbench", [TURNED | {"index": 3.5}]), "3.5 is no whole"),
        (lambda: metrics.aggregate("ai2d", [TURNED | {"answer": 1.5}]), "not 1.5"),
        (lambda: metrics.aggregate("ai2d", [TURNED | {"choices": []}]), "choices is empty"),
        (lambda: metrics.aggregate("ai2d", [TURNED | {"prediction": 3}]), "must be a text, not 3"),
        (
            lambda: metrics.aggregate("vqav2", [{"prediction": "a", "answers": [{"answer": "a"}]}]),
            "row 0: answers must be a list of texts",
        ),
        (
            lambda: metrics.aggregate("refcoco", [{"prediction": "", "box": [0, 0, 1, math.nan]}]),
            "box must be x1",
        ),
        (
            lambda: metrics.aggregate("chair", [{"mentioned": "dog", "present": []}]),
            "mentioned must be",
        ),
        (
            lambda: metrics.aggregate("seed", [SEED | {"answer": "AB"}]),
            "row 0: answer 'AB' is none of A, B, C, D",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(call: Any, named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        call()


def test_categories_that_are_not_of_mme_have_no_part_in_the_total() -> None:
    figures = metrics.aggregate("mme", [PAIR, PAIR, *[PAIR | {"category": "mine"}] * 2])
    assert figures["mine"] == figures["perception"] == figures["total"] == 200
    assert "cognition" not in figures


def test_a_vocabulary_of_objects(tmp_path: Path) -> None:
    file = tmp_path / "objects.txt"
    file.write_text("dog, puppy\ntrain, railway train\ntie\ntoilet\n\n")
    objects = read_objects(file)
    caption = "Adult dogs on a train track, by a passenger train; a baby dog in a bow tie, puppies"
    assert metrics.objects_in(caption, objects) == ["dog", "train", "dog", "tie", "dog"]
    assert metrics.objects_in("a baby giraffe by the home plate", objects) == []
    file.write_text("dog, puppy\ncat, puppy\n")
    with pytest.raises(UserError, match="line 2: 'puppy' is of class 'cat' and of 'dog'"):
        read_objects(file)
    with pytest.raises(UserError, match="No such file"):
        read_objects(tmp_path / "none.txt")


def test_a_box_of_numbers_past_all_bounds_is_none() -> None:
    """A model that repeats a digit must not spoil the mean of a file."""
    endless = f"[{'9' * 400}, 0, {'9' * 400}, 1]"
    assert metrics.parse_box(endless) is None
    assert metrics.aggregate("refcoco", [{"prediction": endless, "box": [0, 0, 1, 1]}])["iou"] == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    # What the Stanford tokeniser answers, without the punctuation that is dropped.
    [
        ("a sign saying '10:30' here", "a sign saying 10:30 here"),
        ("A 3.5-inch disk, 1/2 cup & 3-4 eggs", "a 3.5-inch disk 1/2 cup & 3-4 eggs"),
        ("y'all rock'n'roll 'tis o'clock", "y' all rock 'n' roll 't is o'clock"),
        ("AT&T and black&white at 4:30pm", "at&t and black & white at 4:30 pm"),
        ("£5, #1 and #tag: WOW!!!", "# 5 # 1 and #tag wow !!!"),
        ("J. Smith of St. Louis, no. 7. No.", "j. smith of st. louis no. 7 no"),
        ("a--b c---d, hmm.. the end.The", "a b c d hmm the end.the"),
    ],
)
def test_tokens_of_captions(text: str, wanted: str) -> None:
    assert " ".join(metrics.caption_tokens(text)) == wanted
