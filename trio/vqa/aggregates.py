"""From the answers of a data set to its published figures.

Every figure is made of ratios of sums: an item (a row; for MME the two rows of a picture, for
MMBench all rotations of a question) adds to the two sides of some ratios. Sums can be added up in
any order and drawn again by a bootstrap; `Metric.figures` makes of them what papers print.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from trio.errors import UserError
from trio.vqa import open_answers
from trio.vqa.boxes import box_iou, center_inside, is_box, parse_box
from trio.vqa.caption_scores import ORDERS, bleu_counts, bleu_of, cider, rouge_l
from trio.vqa.caption_tokens import caption_tokens
from trio.vqa.choices import choice_letter, yes_no
from trio.vqa.rules import are_texts, letters_of

Row = Mapping[str, Any]
Sum = Any
"""A number, or an array of one for each draw of a bootstrap."""

_YES_OR_NO = ("yes", "no")
_POPE = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
_ROTATION = 1_000_000
_FOUR = tuple("ABCD")
_TEXT_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_IOU_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NO_BOX = (0.0, 0.0, 0.0, 0.0)
_TEXTS = are_texts, "a list of texts"
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prediction": (lambda value: isinstance(value, str), "a text"),
    "answer": (lambda value: isinstance(value, str | int), "a text or a whole number"),
    "answers": _TEXTS,
    "references": _TEXTS,
    "choices": _TEXTS,
    "mentioned": _TEXTS,
    "present": _TEXTS,
    "box": (is_box, "x1, y1, x2, y2"),
}
"""What a field must be, and that in words."""
_MAY_BE_EMPTY = ("mentioned", "present", "prediction", "answer")


class Ratio(NamedTuple):
    """Two sums; their quotient is a share or a mean, and 0 over nothing."""

    above: Sum
    below: Sum = 1.0

    @property
    def value(self) -> Sum:
        return _over(self.above, self.below)


Ratios = dict[str, Ratio]


class Item(NamedTuple):
    """Rows that are right or wrong together."""

    rows: Sequence[int]
    """Their places in the data set."""
    adds: Ratios
    scores: Sequence[float] = ()
    """Of each row alone, as `Metric.score` gives it; nothing where it gives none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How a data set is scored."""

    fields: tuple[str, ...]
    """That each row must have."""
    items: Callable[[Sequence[Row]], Iterator[Item]]
    """A row whose `prediction` is None failed, and counts as a wrong answer."""
    figures: Callable[[Ratios], dict[str, Sum]]
    """Of the sums over all items."""
    score: Callable[[Row], float] | None
    """What a row is worth alone, 0 to 1; None where rows alone are worth nothing."""
    headline: str = "accuracy"
    """The figure to quote first."""
    incomplete: Callable[[Sequence[Row]], list[int]] = lambda rows: []
    """Places of rows that cannot count, as others that count together with them are missing."""
    of_all: bool = False
    """Whether what a row adds depends on all others, so that a part is to be scored anew."""

    @property
    def truth(self) -> tuple[str, ...]:
        """The fields but for those that are made of the answer."""
        return tuple(name for name in self.fields if name not in ("prediction", "mentioned"))


def aggregate(metric: str, rows: Iterable[Row]) -> dict[str, float]:
    """The figures of a data set, as its official script computes them.

    Args:
        metric: one of `METRICS`.
        rows: the fields that the metric needs, and any others; read once, in any order.

    Returns:
        Shares from 0 to 1, MME scores of 0 to 200 a category, OCRBench points; `n`, the rows; for
        yes or no, letters and boxes `unparsed`, the share of answers in which none is found.

    Raises:
        UserError: unknown metric, no rows, or a row that cannot be scored.
    """
    known = metric_named(metric)
    rows = checked(metric, rows)
    figures = known.figures(total(item.adds for item in known.items(rows)))
    return {"n": float(len(rows))} | {name: float(value) for name, value in figures.items()}


def metric_named(metric: str) -> Metric:
    """How a metric is computed; UserError if there is none of that name."""
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    return METRICS[metric]


def row_score(metric: str, row: Row) -> float | None:
    """What a row is worth alone: its accuracy, ANLS or IoU, or right or wrong.

    A question of MME or MMBench counts without its picture's other one and without its rotations.

    Args:
        metric: one of `METRICS`.
        row: the fields that the metric needs.

    Returns:
        0 to 1; None of captions and objects, which are scored as a whole.

    Raises:
        UserError: unknown metric, or a row that cannot be scored.
    """
    score = metric_named(metric).score
    return None if score is None else score(checked(metric, [row])[0])


def checked(metric: str, rows: Iterable[Row]) -> list[Row]:
    """The rows, whose fields are there and of their kind.

    Raises:
        UserError: no rows, or a field that is neither.
    """
    fields, rows = metric_named(metric).fields, list(rows)
    if not rows:
        raise UserError(f"metric {metric!r}: there are no rows")
    for number, row in enumerate(rows):
        for name in fields:
            if (fault := _fault(name, row.get(name))) is not None:
                raise UserError(f"metric {metric!r}, row {number}: {fault}")
    return rows


def _fault(name: str, value: Any) -> str | None:
    fits, expected = _KINDS.get(name, (lambda value: True, ""))
    if value is None:
        return f"no field {name!r}, or null"
    if not fits(value):
        return f"{name} must be {expected}, not {value!r:.60}"
    if name in _KINDS and name not in _MAY_BE_EMPTY and not len(value):
        return f"{name} is empty"
    return None


@contextmanager
def _of_row(number: int) -> Iterator[None]:
    """Says in which row something is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {number}: {error}") from error


def total(added: Iterable[Ratios]) -> Ratios:
    """Both sums of each ratio, over everything that adds to it."""
    above: dict[str, float] = defaultdict(float)
    below: dict[str, float] = defaultdict(float)
    for ratios in added:
        for name, ratio in ratios.items():
            above[name] += ratio.above
            below[name] += ratio.below
    return {name: Ratio(above[name], below[name]) for name in above}


def _over(above: Sum, below: Sum) -> Sum:
    below = np.asarray(below, np.float64)
    empty = below == 0
    return np.where(empty, 0.0, above / np.where(empty, 1.0, below))


def _values(ratios: Ratios) -> dict[str, Sum]:
    return {name: ratio.value for name, ratio in ratios.items()}


def _failed(row: Row) -> bool:
    return "prediction" in row and row["prediction"] is None


def _each(
    score: Callable[[Row], Ratios], wrong: Callable[[Row], Ratios], row_ratio: str | None
) -> Callable[[Sequence[Row]], Iterator[Item]]:
    """Rows that count alone."""

    def items(rows: Sequence[Row]) -> Iterator[Item]:
        for number, row in enumerate(rows):
            with _of_row(number):
                adds = wrong(row) if _failed(row) else score(row)
            scores = () if row_ratio is None else (adds[row_ratio.format_map(row)].above,)
            yield Item((number,), adds, scores)

    return items


def _by(row: Row, ratio: Ratio, *fields: str) -> Ratios:
    """The ratio under each of the row's classes, as `field/class`; a field may be absent."""
    return {f"{name}/{row[name]}": ratio for name in fields if row.get(name) is not None}


def _text(row: Row, field: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"{field} must be a text, not {row[field]!r:.60}")
    return str(row[field])


def _whole(row: Row, field: str) -> int:
    value = row[field]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        return int(value)
    raise UserError(f"{field} {value!r:.60} is no whole number")


def _one_of(row: Row, field: str, allowed: Sequence[str]) -> str:
    if row[field] not in allowed:
        raise UserError(f"{field} {row[field]!r} is none of {', '.join(allowed)}")
    return str(row[field])


# Open answers


def _vqa(rule: str) -> Callable[[Row], Ratios]:
    def score(row: Row) -> Ratios:
        value = Ratio(open_answers.vqa_accuracy(row["prediction"], row["answers"], rule=rule))
        return {"accuracy": value} | _by(row, value, "question_type", "answer_type")

    return score


def _gqa(row: Row) -> Ratios:
    right = open_answers.exact_match(row["prediction"], [_text(row, "answer")])
    is_open = row["structural"] == "query"
    return {
        "accuracy": Ratio(right),
        "binary": Ratio(right * (not is_open), float(not is_open)),
        "open": Ratio(right * is_open, float(is_open)),
    }


def _docvqa(row: Row) -> Ratios:
    return {"anls": Ratio(open_answers.anls(row["prediction"], row["answers"]))}


def _chartqa(row: Row) -> Ratios:
    right = Ratio(open_answers.relaxed_accuracy(row["prediction"], _text(row, "answer")))
    return {"accuracy": right, "human" if row["type"] == "human_test" else "augmented": right}


def _ocrbench(row: Row) -> Ratios:
    right = open_answers.ocrbench(row["prediction"], row["answers"], dataset=row["dataset"])
    recognition = float(row["question_type"] in _TEXT_RECOGNITION)
    return {
        "accuracy": Ratio(right),
        f"points/{row['question_type']}": Ratio(right),
        "points/Text Recognition": Ratio(right * recognition, recognition),
    }


def _points(ratios: Ratios) -> dict[str, Sum]:
    points = {name: ratio.above for name, ratio in ratios.items() if name.startswith("points/")}
    accuracy = ratios["accuracy"]
    return {"points": accuracy.above, "accuracy": accuracy.value} | points


def _exact(row: Row) -> Ratios:
    right = open_answers.exact_match(row["prediction"], row["answers"], rule="ignore_punctuation")
    return {"accuracy": Ratio(right)}


# Yes or no


def _pope(row: Row) -> Ratios:
    true = _one_of(row, "answer", _YES_OR_NO) == "yes"
    given = yes_no(row["prediction"]) == "yes"
    both = float(true and given)
    category = row["category"]
    return {
        f"{category}/accuracy": Ratio(float(true == given)),
        f"{category}/precision": Ratio(both, float(given)),
        f"{category}/recall": Ratio(both, float(true)),
        f"{category}/yes_ratio": Ratio(float(given)),
        "unparsed": Ratio(float(not any(word in row["prediction"].lower() for word in _YES_OR_NO))),
    }


def _pope_wrong(row: Row) -> Ratios:
    """POPE takes an empty answer for yes, so none is the opposite of the truth."""
    return _pope({**row, "prediction": "no" if row["answer"] == "yes" else "yes"})


def _pope_figures(ratios: Ratios) -> dict[str, Sum]:
    figures = _values(ratios)
    categories = [name.removesuffix("/recall") for name in ratios if name.endswith("/recall")]
    for category in categories:
        precision, recall = figures[f"{category}/precision"], figures[f"{category}/recall"]
        figures[f"{category}/f1"] = _over(2 * precision * recall, precision + recall)
    means = {
        name: sum(figures[f"{category}/{name}"] for category in categories) / len(categories)
        for name in _POPE
    }
    return means | figures


def _mme_pictures(rows: Sequence[Row]) -> dict[tuple[Any, Any], list[int]]:
    pictures = defaultdict(list)
    for number, row in enumerate(rows):
        pictures[row["category"], row["question_id"]].append(number)
    return pictures


def _mme_unpaired(rows: Sequence[Row]) -> list[int]:
    return [numbers[0] for numbers in _mme_pictures(rows).values() if len(numbers) == 1]


def _mme(row: Row) -> tuple[str | None, float]:
    """What is answered, and whether it is right."""
    true = _one_of(row, "answer", ("Yes", "No")).lower()
    given = None if _failed(row) else yes_no(row["prediction"], rule="mme")
    return given, float(given == true)


def _mme_pairs(rows: Sequence[Row]) -> Iterator[Item]:
    for (category, picture), numbers in _mme_pictures(rows).items():
        if len(numbers) != 2:
            raise UserError(
                f"question_id {picture!r} of category {category!r} has {len(numbers)} rows; a "
                "picture has two questions"
            )
        given, right = [], []
        for number in numbers:
            with _of_row(number):
                answer, is_right = _mme(rows[number])
            given.append(answer)
            right.append(is_right)
        yield Item(
            numbers,
            {
                f"{category}/accuracy": Ratio(sum(right), 2.0),
                f"{category}/accuracy_plus": Ratio(float(all(right))),
                "unparsed": Ratio(float(given.count(None)), 2.0),
            },
            right,
        )


def _mme_figures(ratios: Ratios) -> dict[str, Sum]:
    """Categories that are not MME's have figures of their own, and no part in the total."""
    figures = _values(ratios)
    scores = {
        name.removesuffix("/accuracy"): 100 * (value + figures[f"{name}_plus"])
        for name, value in figures.items()
        if name.endswith("/accuracy")
    }
    sums = {
        name: sum(scores[category] for category in categories if category in scores)
        for name, categories in (("perception", _PERCEPTION), ("cognition", _COGNITION))
        if not scores.keys().isdisjoint(categories)
    }
    return sums | {"total": sum(sums.values())} | scores | figures


# Multiple choice


def _lettered(given: str | None, true: str) -> Ratios:
    return {"accuracy": Ratio(float(given == true)), "unparsed": Ratio(float(given is None))}


def _index(row: Row) -> str:
    """The letter of an answer that is the place of a choice."""
    letters = letters_of(row["choices"])
    place = _whole(row, "answer")
    if not 0 <= place < len(letters):
        raise UserError(f"answer {row['answer']!r} is no place of {len(letters)} choices")
    return letters[place]


def _any_index(row: Row) -> str:
    """The letter of an answer that is the place, the letter or the text of a choice.

    Raises:
        UserError: it is none of these, or two of them that are different choices.
    """
    letters, answer = letters_of(row["choices"]), row["answer"]
    named = {
        letter
        for letter, choice in zip(letters, row["choices"], strict=False)
        if answer in (letter, choice)
    }
    if isinstance(answer, Integral) or re.fullmatch(r"\s*\d+\s*", answer):
        named |= {letter for place, letter in enumerate(letters) if place == int(answer)}
    if len(named) != 1:
        fault = "names several" if named else "is neither place, letter nor text of any"
        raise UserError(f"answer {answer!r:.60} {fault} of the choices {row['choices']!r:.120}")
    return named.pop()


def _multiple_choice(row: Row) -> Ratios:
    return _lettered(choice_letter(row["prediction"], row["choices"]), _any_index(row))


def _scienceqa(row: Row) -> Ratios:
    letter = choice_letter(row["prediction"], row["choices"], rule="scienceqa")
    ratios = _lettered(letter, _index(row))
    seen = float(bool(row["image"]))
    return ratios | {"image_accuracy": Ratio(ratios["accuracy"].above * seen, seen)}


def _ai2d(row: Row) -> Ratios:
    return _lettered(choice_letter(row["prediction"], row["choices"], rule="ai2d"), _index(row))


def _seed(row: Row) -> Ratios:
    letter = choice_letter(row["prediction"], _FOUR, rule="seed")
    ratios = _lettered(letter, _one_of(row, "answer", _FOUR))
    right = ratios["accuracy"]
    return ratios | {str(row["data_type"]): right} | _by(row, right, "question_type")


def _mmstar(row: Row) -> Ratios:
    letter = choice_letter(row["prediction"], _FOUR, rule="mmstar")
    ratios = _lettered(letter, _one_of(row, "answer", _FOUR))
    return ratios | _by(row, ratios["accuracy"], "category", "l2_category")


def _mmbench_rotations(rows: Sequence[Row]) -> dict[int, dict[int, int]]:
    """The place of each rotation of each question."""
    groups: dict[int, dict[int, int]] = defaultdict(dict)
    for number, row in enumerate(rows):
        with _of_row(number):
            rotation, base = divmod(_whole(row, "index"), _ROTATION)
        if rotation in groups[base]:
            raise UserError(f"index {row['index']} stands in two rows")
        groups[base][rotation] = number
    return groups


def _mmbench_baseless(rows: Sequence[Row]) -> list[int]:
    groups = _mmbench_rotations(rows).values()
    return [number for group in groups if 0 not in group for number in group.values()]


def _mmbench(row: Row) -> tuple[str | None, float]:
    """The letter that is chosen, and whether it is right."""
    true = _one_of(row, "answer", letters_of(row["choices"]))
    letter = None if _failed(row) else choice_letter(row["prediction"], row["choices"])
    return letter, float(letter == true)


def _mmbench_groups(rows: Sequence[Row]) -> Iterator[Item]:
    for base, numbers in _mmbench_rotations(rows).items():
        if 0 not in numbers:
            raise UserError(f"index {base} has rotations, but is no row itself")
        right, unparsed = {}, 0
        for rotation, number in numbers.items():
            with _of_row(number):
                letter, right[rotation] = _mmbench(rows[number])
            unparsed += letter is None
        all_right = Ratio(float(all(right.values())))
        yield Item(
            list(numbers.values()),
            {
                "accuracy": all_right,
                "vanilla": Ratio(right[0]),
                "rows": Ratio(sum(right.values()), float(len(right))),
                "unparsed": Ratio(float(unparsed), float(len(right))),
            }
            | _by(rows[numbers[0]], all_right, "category", "l2_category"),
            list(right.values()),
        )


# Boxes, captions, objects


def _refcoco(row: Row) -> Ratios:
    box = parse_box(row["prediction"])
    iou = box_iou(box or _NO_BOX, row["box"])
    hits = {f"accuracy@{least}": Ratio(float(iou >= least)) for least in _IOU_THRESHOLDS}
    return hits | {
        "iou": Ratio(iou),
        "accuracy": hits["accuracy@0.5"],
        "center_accuracy": Ratio(float(center_inside(box or _NO_BOX, row["box"]))),
        "unparsed": Ratio(float(box is None)),
    }


def _captions(rows: Sequence[Row]) -> Iterator[Item]:
    predictions = [_tokens(row["prediction"] or "") for row in rows]
    references = [list(map(_tokens, row["references"])) for row in rows]
    for number, score in enumerate(cider(predictions, references)):
        prediction, of_image = predictions[number], references[number]
        counts = bleu_counts(prediction, of_image)
        grams = {f"{n}-grams": Ratio(counts.matches[n - 1], counts.grams[n - 1]) for n in ORDERS}
        yield Item(
            (number,),
            {
                "cider": Ratio(score),
                "rouge_l": Ratio(rouge_l(prediction, of_image)),
                "words": Ratio(counts.words, counts.reference_words),
            }
            | grams,
        )


def _tokens(text: str) -> str:
    return " ".join(caption_tokens(text))


def _caption_figures(ratios: Ratios) -> dict[str, Sum]:
    grams = [ratios[f"{n}-grams"] for n in ORDERS]
    bleu = {
        f"bleu_{n}": bleu_of(
            [each.above for each in grams[:n]], [each.below for each in grams[:n]], *ratios["words"]
        )
        for n in ORDERS
    }
    return {name: ratios[name].value for name in ("cider", "rouge_l")} | bleu


def _chair(row: Row) -> Ratios:
    mentioned, present = list(row["mentioned"]), set(row["present"])
    wrong = sum(name not in present for name in mentioned)
    return {
        "chair_i": Ratio(float(wrong), float(len(mentioned))),
        "chair_s": Ratio(float(wrong > 0)),
        "recall": Ratio(float(len(present & set(mentioned))), float(len(present))),
    }


def _rows(
    score: Callable[[Row], Ratios],
    *fields: str,
    figures: Callable[[Ratios], dict[str, Sum]] = _values,
    wrong: Callable[[Row], Ratios] | None = None,
    row_ratio: str | None = "accuracy",
    headline: str = "accuracy",
) -> Metric:
    """Of rows that count alone.

    Args:
        wrong: what a row adds that failed; without it, nothing above.
        row_ratio: whose upper side is the row's own score; may name fields of the row.
    """

    def nothing_right(row: Row) -> Ratios:
        ratios = score({**row, "prediction": ""})
        return {name: Ratio(0.0, ratio.below) for name, ratio in ratios.items()}

    def alone(row: Row) -> float:
        return float(score(row)[str(row_ratio).format_map(row)].above)

    return Metric(
        fields=fields,
        items=_each(score, wrong or nothing_right, row_ratio),
        figures=figures,
        score=None if row_ratio is None else alone,
        headline=headline,
    )


METRICS: dict[str, Metric] = {
    "textvqa": _rows(_vqa("textvqa"), "prediction", "answers"),
    "vizwiz": _rows(_vqa("textvqa"), "prediction", "answers"),
    "vqav2": _rows(_vqa("vqav2"), "prediction", "answers"),
    "gqa": _rows(_gqa, "prediction", "answer", "structural"),
    "exact_match": _rows(_exact, "prediction", "answers"),
    "pope": _rows(
        _pope, "prediction", "answer", "category",
        figures=_pope_figures, wrong=_pope_wrong, row_ratio="{category}/accuracy",
    ),
    "mme": Metric(
        fields=("prediction", "answer", "category", "question_id"),
        items=_mme_pairs,
        figures=_mme_figures,
        score=lambda row: _mme(row)[1],
        headline="total",
        incomplete=_mme_unpaired,
    ),
    "scienceqa": _rows(_scienceqa, "prediction", "choices", "answer", "image"),
    "mmbench": Metric(
        fields=("index", "prediction", "answer", "choices"),
        items=_mmbench_groups,
        figures=_values,
        score=lambda row: _mmbench(row)[1],
        incomplete=_mmbench_baseless,
    ),
    "seed": _rows(_seed, "prediction", "answer", "data_type", "question_type"),
    "mmstar": _rows(_mmstar, "prediction", "answer", "category", "l2_category"),
    "ai2d": _rows(_ai2d, "prediction", "choices", "answer"),
    "multiple_choice": _rows(_multiple_choice, "prediction", "choices", "answer"),
    "docvqa": _rows(_docvqa, "prediction", "answers", row_ratio="anls", headline="anls"),
    "chartqa": _rows(_chartqa, "prediction", "answer", "type"),
    "ocrbench": _rows(
        _ocrbench, "prediction", "answers", "dataset", "question_type", figures=_points
    ),
    "refcoco": _rows(_refcoco, "prediction", "box", row_ratio="iou"),
    "captions": Metric(
        fields=("prediction", "references"),
        items=_captions,
        figures=_caption_figures,
        score=None,
        headline="cider",
        of_all=True,
    ),
    "chair": _rows(
        _chair, "mentioned", "present",
        wrong=lambda row: _chair({**row, "mentioned": []}), row_ratio=None, headline="chair_i",
    ),
}  # fmt: skip
