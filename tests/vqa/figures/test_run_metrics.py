"""Figures of a run against plain scripts that know nothing of the code."""

import json
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from trio.errors import UserError
from trio.vqa.aggregates import METRICS, row_score
from trio.vqa.figures.answered import Answered
from trio.vqa.figures.run_metrics import run_metrics


def answered(number: int, prediction: str | None, picture: str = "", **fields: Any) -> Answered:
    groups = fields.pop("groups", {})
    return Answered(
        key=(number, 0),
        picture=picture,
        prediction=prediction,
        error=None if prediction is not None else "decode",
        fields=fields,
        groups=groups,
    )


def run(metric: str | None, rows: list[Answered]) -> dict[str, Any]:
    """Of any order, and fit for JSON."""
    found = run_metrics(metric, iter(rows), about={"rule": "x"})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    mixed = random.Random(0).sample(rows, len(rows))
    values = {name: figure["value"] for name, figure in found["figures"].items()}
    again = run_metrics(metric, mixed, about={})["figures"]
    assert {name: figure["value"] for name, figure in again.items()} == pytest.approx(values)
    return found


def exact(number: int, right: bool, picture: str = "", **more: Any) -> Answered:
    return answered(number, "Yes." if right else "no", picture, answers=["yes"], **more)


def test_a_share_of_rows_that_are_pictures() -> None:
    found = run("exact_match", [exact(number, number < 13) for number in range(20)])
    bounds = binomtest(13, 20).proportion_ci(method="wilson")
    figure = found["figures"]["accuracy"]
    assert figure["value"] == 13 / 20
    assert figure["interval"] == pytest.approx([bounds.low, bounds.high])
    assert figure["interval_by"] == "wilson"
    assert (found["rows"], found["answered"], found["failed"]) == (20, 20, 0)
    assert (found["pictures"], found["headline"], found["about"]) == (20, "accuracy", {"rule": "x"})
    assert found["figures_failed_as_wrong"] is None


def test_a_share_of_rows_in_pictures() -> None:
    """Kish's design effect, by hand."""
    rng = random.Random(1)
    rows: list[Answered] = []
    hits = []
    for picture in range(40):
        easy = rng.random() < 0.6
        for _ in range(rng.randint(1, 5)):
            right = easy if rng.random() < 0.9 else not easy
            hits.append((picture, right))
            rows.append(exact(len(rows), right, f"p{picture}"))
    n, p = len(hits), sum(right for _, right in hits) / len(hits)
    squares = 0.0
    for picture in range(40):
        squares += sum(right - p for other, right in hits if other == picture) ** 2
    effect = (40 / 39 * squares / n**2) / (p * (1 - p) / n)
    assert effect > 1.5
    worth, z = n / effect, 1.959963984540054
    half = z * math.sqrt(p * (1 - p) / worth + z * z / (4 * worth**2))
    low, high = ((p + z * z / (2 * worth) + side * half) / (1 + z * z / worth) for side in (-1, 1))
    found = run("exact_match", rows)
    assert found["pictures"] == 40
    assert found["figures"]["accuracy"]["interval"] == pytest.approx([low, high], abs=1e-9)


def test_a_mean_of_parts_is_drawn_by_picture() -> None:
    rng = random.Random(2)
    rows, scores = [], []
    for number in range(120):
        agree = rng.choice([0, 0, 1, 2, 3, 9])
        answers = ["cat"] * agree + [f"other {place}" for place in range(10 - agree)]
        rows.append(answered(number, "cat", f"p{number // 3}", answers=answers))
        scores.append(
            sum(min(1, sum(a == "cat" for a in answers[:i] + answers[i + 1 :]) / 3)
                for i in range(10)) / 10
        )  # fmt: skip
    means = []
    for _ in range(4000):
        drawn = [rng.randrange(40) for _ in range(40)]
        means.append(sum(sum(scores[3 * one : 3 * one + 3]) for one in drawn) / 120)
    means.sort()
    figure = run("textvqa", rows)["figures"]["accuracy"]
    assert figure["value"] == pytest.approx(sum(scores) / 120)
    assert figure["interval_by"] == "bootstrap"
    width = means[3900] - means[100]
    assert figure["interval"] == pytest.approx([means[100], means[3900]], abs=0.08 * width)


def test_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a share and of a mean, of rows that come in pictures."""
    monkeypatch.setattr("trio.vqa.relative_score.DRAWS", 300)
    rng = np.random.default_rng(3)
    held = {"exact_match": 0, "chair": 0}
    for _ in range(150):
        rows = []
        for picture in range(60):
            right = rng.random() < 0.7
            rows += [exact(10 * picture + k, right, f"p{picture}") for k in range(2)]
        low, high = run_metrics("exact_match", rows, about={})["figures"]["accuracy"]["interval"]
        held["exact_match"] += low <= 0.7 <= high
        rows = []
        for number in range(60):
            wrong = int(rng.binomial(4, 0.3))
            mentioned = ["cup"] * wrong + ["dog"] * (4 - wrong)
            rows.append(answered(number, "", mentioned=mentioned, present=["dog"]))
        low, high = run_metrics("chair", rows, about={})["figures"]["chair_i"]["interval"]
        held["chair"] += low <= 0.3 <= high
    assert all(135 <= count <= 149 for count in held.values()), held


POPE = {"category": "random"}


def test_failed_rows_of_pope_are_wrong_and_no_yes() -> None:
    rows = [answered(0, "Yes", answer="yes", **POPE), answered(1, "No", answer="no", **POPE)]
    rows += [answered(2, None, answer="yes", **POPE), answered(3, None, answer="no", **POPE)]
    found = run("pope", rows)
    assert found["figures"]["accuracy"]["value"] == 1
    assert (found["answered"], found["failed"]) == (2, 2)
    assert found["error_kinds"] == {"decode": 2}
    wrong = found["figures_failed_as_wrong"]
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert [wrong[f"random/{name}"] for name in names] == [0.5] * 5
    assert "unparsed" not in wrong
    only_true = run("pope", [rows[0], rows[2]])["figures_failed_as_wrong"]
    assert only_true["accuracy"] == 0.5


def test_a_share_over_nothing_has_no_interval() -> None:
    rows = [answered(number, "No", answer="yes", **POPE) for number in range(5)]
    figures = run("pope", rows)["figures"]
    assert figures["random/precision"] == {"value": 0, "interval": None, "interval_by": None}
    assert figures["random/recall"]["interval"] == pytest.approx([0, 0.4344825], abs=1e-6)


def mme(number: int, prediction: str | None, picture: int, answer: str, **more: Any) -> Answered:
    fields = {"category": "count", "question_id": str(picture), "answer": answer}
    return answered(number, prediction, **(fields | more))


def test_a_pair_of_mme_that_is_not_complete_counts_as_failed() -> None:
    rows = [mme(0, "Yes", 1, "Yes"), mme(1, "No", 1, "No")]
    rows += [mme(2, "Yes", 2, "Yes"), mme(3, None, 2, "No"), mme(4, "Yes", 3, "Yes")]
    found = run("mme", rows)
    assert found["figures"]["total"]["value"] == 200
    assert (found["rows"], found["answered"], found["failed"]) == (5, 2, 3)
    assert found["error_kinds"] == {"decode": 1, "pair incomplete": 2}
    # Of two pictures: three of four answers right, one picture fully; the third is no pair.
    assert found["figures_failed_as_wrong"]["count"] == pytest.approx(125)
    assert found["pictures"] == 1


def test_shares_of_questions_in_pairs() -> None:
    rows = []
    for picture in range(30):
        second = "No" if picture % 3 else "Yes"
        rows += [
            mme(2 * picture, "Yes", picture, "Yes"),
            mme(2 * picture + 1, second, picture, "No"),
        ]
    figures = run("mme", rows)["figures"]
    bounds = binomtest(20, 30).proportion_ci(method="wilson")
    assert figures["count/accuracy_plus"]["interval"] == pytest.approx([bounds.low, bounds.high])
    assert figures["count/accuracy"]["value"] == pytest.approx(50 / 60)
    assert figures["count/accuracy"]["interval_by"] == "wilson"
    assert figures["total"]["interval_by"] == "bootstrap"
    low, high = figures["total"]["interval"]
    assert 100 < low < figures["total"]["value"] < high < 200


def mmbench(number: int, index: int, prediction: str | None, **more: Any) -> Answered:
    fields = {"index": index, "answer": "A", "choices": ["one", "two"], **more}
    return answered(number, prediction, **fields)


def test_a_base_row_of_mmbench_takes_its_rotations_with_it() -> None:
    rows = [mmbench(0, 1, "A"), mmbench(1, 1_000_001, "A"), mmbench(2, 2, None)]
    rows += [mmbench(3, 1_000_002, "A"), mmbench(4, 2_000_002, "A")]
    found = run("mmbench", rows)
    assert found["figures"]["accuracy"]["value"] == 1
    assert found["error_kinds"] == {"base row missing": 2, "decode": 1}
    assert found["figures_failed_as_wrong"]["accuracy"] == 0.5
    assert found["figures_failed_as_wrong"]["rows"] == pytest.approx(4 / 5)


def test_failed_rows_are_wrong_by_every_metric() -> None:
    truths: Mapping[str, Mapping[str, Any]] = {
        "ocrbench": {"answers": [""], "dataset": "d", "question_type": "q"},
        "docvqa": {"answers": ["", "a      ", "ß"]},
        "textvqa": {"answers": ["the"] * 10},
        "vqav2": {"answers": [""] * 10},
        "exact_match": {"answers": [""]},
        "gqa": {"answer": "", "structural": "query"},
        "chartqa": {"answer": "", "type": "human_test"},
        "refcoco": {"box": [0, 0, 0, 0]},
        "mmbench": {"index": 1, "answer": "B", "choices": ["one", ""]},
        "multiple_choice": {"answer": 1, "choices": ["one", ""]},
        "ai2d": {"answer": 1, "choices": ["one", "two"]},
        "mmstar": {"answer": "A", "category": "c", "l2_category": "l"},
        "captions": {"references": ["a dog runs"]},
    }
    for metric, fields in truths.items():
        found = run(metric, [answered(0, None, **fields)])
        assert found["figures"] == {}
        values = found["figures_failed_as_wrong"]
        kept = {name: value for name, value in values.items() if name != "center_accuracy"}
        assert kept
        assert all(value == pytest.approx(0, abs=1e-9) for value in kept.values()), (metric, values)


def test_failed_captions_are_empty() -> None:
    rows = [answered(0, "a dog runs", references=["a dog runs"])]
    rows += [answered(1, "a cat on a mat", references=["a cat on a mat"])]
    rows += [answered(2, None, references=["two birds fly away"])]
    found = run("captions", rows)
    assert found["figures"]["rouge_l"]["value"] == pytest.approx(1)
    assert found["figures_failed_as_wrong"]["rouge_l"] == pytest.approx(2 / 3)
    assert found["figures_failed_as_wrong"]["bleu_1"] == pytest.approx(math.exp(1 - 12 / 8))


def test_a_failed_caption_lowers_recall_of_objects_alone() -> None:
    rows = [answered(0, "a dog and a cup", mentioned=["dog", "cup"], present=["dog"])]
    rows += [answered(1, None, present=["tree"])]
    found = run("chair", rows)
    values = {name: figure["value"] for name, figure in found["figures"].items()}
    assert values == {"chair_i": 0.5, "chair_s": 1, "recall": 1}
    assert found["figures_failed_as_wrong"] == {"chair_i": 0.5, "chair_s": 0.5, "recall": 0.5}


def test_rows_without_a_truth_are_counted_and_not_scored() -> None:
    rows = [exact(0, True), answered(1, "no"), answered(2, "no", answers=[]), answered(3, None)]
    found = run("exact_match", rows)
    assert (found["answered"], found["without_truth"], found["failed"]) == (3, 2, 1)
    assert found["figures"]["accuracy"]["value"] == 1
    assert found["figures_failed_as_wrong"] is None


@pytest.mark.parametrize("metric", [None, *METRICS])
def test_nothing_answered_at_all(metric: str | None) -> None:
    found = run(metric, [answered(number, None) for number in range(3)])
    assert (found["rows"], found["answered"], found["failed"]) == (3, 0, 3)
    assert (found["pictures"], found["figures"], found["groups"]) == (0, {}, {})
    assert run(metric, [])["rows"] == 0


def test_without_a_metric_rows_are_counted() -> None:
    rows = [answered(0, "a", "p"), answered(1, "b", "p", groups={"by": "x"}), answered(2, None)]
    found = run(None, rows)
    assert (found["answered"], found["failed"], found["pictures"]) == (2, 1, 1)
    assert found["groups"] == {"by": {"x": {"n": 1}}}


def test_groups_are_runs_of_their_own() -> None:
    rows = [
        answered(
            number,
            "Yes" if number % 3 else "No",
            f"p{number // 2}",
            answer="yes" if number % 2 else "no",
            category=("random", "popular")[number // 2 % 2],
            groups={"kind": ("a", "b")[number // 2 % 2], "all": "x"},
        )
        for number in range(60)
    ]
    found = run("pope", rows)["groups"]
    assert found["kind"].keys() == {"a", "b"}
    for value, group in found["kind"].items():
        alone = run_metrics("pope", [r for r in rows if r.groups["kind"] == value], about={})
        assert group == {"n": 30, "pictures": 15, "figures": alone["figures"]}
        assert not any(name.startswith("popular") for name in found["kind"]["a"]["figures"])
    assert found["all"]["x"]["figures"] == run_metrics("pope", rows, about={})["figures"]


def test_rows_that_count_together_are_in_the_group_of_the_first() -> None:
    rows = [mme(0, "Yes", 1, "Yes", groups={"by": "a"}), mme(1, "No", 1, "No", groups={"by": "b"})]
    groups = run_metrics("mme", rows, about={})["groups"]["by"]
    assert groups.keys() == {"a"}
    assert (groups["a"]["n"], groups["a"]["figures"]["total"]["value"]) == (2, 200)


def test_captions_of_a_group_have_its_document_frequencies() -> None:
    texts = ["a dog runs fast", "a cat on a mat", "a red bus stops", "two birds fly away"]
    rows = [
        answered(number, f"{text} now", references=[text], groups={"by": "ab"[number % 2]})
        for number, text in enumerate(texts)
    ]
    group = run("captions", rows)["groups"]["by"]["a"]
    alone = run_metrics("captions", rows[::2], about={})
    assert group["figures"]["cider"] == alone["figures"]["cider"]
    assert group["figures"]["cider"] != run_metrics("captions", rows, about={})["figures"]["cider"]


def test_a_quotient_of_few_pictures_is_not_drawn_as_nothing() -> None:
    """A class that is missing from a draw has no score in it, rather than 0."""
    rows = [
        answered(number, "cat", answers=["cat"] * 3 + ["dog"] * 7, question_type="many")
        for number in range(50)
    ]
    rows += [
        answered(100 + number, "cat", answers=["cat"] * 3 + ["dog"] * 7, question_type="few")
        for number in range(2)
    ]
    rows += [answered(200, "cat", answers=["cat"] * 3 + ["dog"] * 7, question_type="one")]
    figures = run("vqav2", rows)["figures"]
    assert figures["question_type/few"]["interval"] == pytest.approx([0.9, 0.9])
    assert figures["question_type/one"]["interval"] is None


def test_points_are_no_share() -> None:
    fields: dict[str, Any] = {"answers": ["cat"], "dataset": "d", "question_type": "q"}
    rows = [answered(number, "cat" if number < 20 else "no", **fields) for number in range(30)]
    figures = run("ocrbench", rows)["figures"]
    assert figures["points/q"]["value"] == 20
    low, high = figures["points/q"]["interval"]
    assert 13 <= low < 18
    assert 22 < high <= 27
    assert figures["accuracy"]["interval_by"] == "wilson"
    assert run("ocrbench", rows[:1])["figures"]["points/q"]["interval"] is None


def test_what_cannot_be_figured_is_named() -> None:
    with pytest.raises(UserError, match="row 7, prompt 0 stands twice"):
        run_metrics("exact_match", [exact(7, True), exact(7, True)], about={})
    with pytest.raises(UserError, match="unknown metric 'x'"):
        run_metrics("x", [exact(7, True)], about={})
    pair = [mme(0, "Yes", 1, "Yes"), mme(1, "No", 1, "No")]
    parted = [
        Answered(key=row.key, picture=f"p{row.key[0]}", prediction="No", fields=row.fields)
        for row in pair
    ]
    with pytest.raises(UserError, match=r"rows \[0, 1\] count together"):
        run_metrics("mme", parted, about={})
    with pytest.raises(UserError, match="has 3 rows"):
        run_metrics("mme", [*pair, mme(2, "No", 1, "No")], about={})


@pytest.mark.parametrize(
    ("metric", "row", "score"),
    [
        ("textvqa", {"prediction": "cat", "answers": ["cat"] * 2 + ["dog"] * 8}, 0.6),
        ("pope", {"prediction": "", "answer": "yes", **POPE}, 1),
        (
            "mme",
            {"prediction": "no", "answer": "No", "category": "count", "question_id": 1},
            1,
        ),
        (
            "mmbench",
            {"index": 3_000_001, "prediction": "B", "answer": "A", "choices": ["one", "two"]},
            0,
        ),
        ("docvqa", {"prediction": "abcd", "answers": ["abce"]}, 0.75),
        ("refcoco", {"prediction": "[0, 0, 0.5, 0.5]", "box": [0.25, 0, 0.75, 0.5]}, 1 / 3),
        ("chartqa", {"prediction": "52", "answer": "50", "type": "x"}, 1),
        ("captions", {"prediction": "a", "references": ["a"]}, None),
        ("chair", {"mentioned": [], "present": []}, None),
        ("exact_match", {"prediction": "it's", "answers": ["a", "its"]}, 1),
    ],
)
def test_what_a_row_is_worth(metric: str, row: dict[str, Any], score: float | None) -> None:
    assert row_score(metric, row) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        (1, "B", 1),
        ("1", "B", 1),
        ("B", "the answer is B", 1),
        ("a cat", "a cat", 1),
        ("a cat", "A", 0),
        (0, "A.", 1),
    ],
)
def test_answers_of_multiple_choice(answer: int | str, prediction: str, right: float) -> None:
    row = {"prediction": prediction, "choices": ["a dog", "a cat"], "answer": answer}
    assert row_score("multiple_choice", row) == right


@pytest.mark.parametrize(
    ("answer", "fault"),
    [(2, "neither"), (-1, "neither"), ("C", "neither"), ("1", "names several")],
)
def test_answers_that_are_no_choice(answer: int | str, fault: str) -> None:
    row = {"prediction": "A", "choices": ["1", "2"], "answer": answer}
    with pytest.raises(UserError, match=fault):
        row_score("multiple_choice", row)
