"""Scores of one open answer against what people answered.

Each function follows a published evaluator to the letter, its quirks included: figures are only
comparable if they are made alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from trio.errors import UserError
from trio.vqa.rules import rule_named, table, texts, without_punctuation

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"} | {
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_DELETED = 32  # the VQA API passes a flag where the count stands
_HANDWRITTEN_FORMULAS = "HME100k"


def normalize_answer(text: str, *, rule: str = "textvqa") -> str:
    """An answer as the VQA evaluators compare it.

    Args:
        rule: `vqav2`, as the VQA API does it (Agrawal et al. 2015, arXiv 1505.00468); `textvqa`,
            with the steps that mmf's EvalAI processor does before.
    """
    return rule_named(_NORMALISED, rule)(text)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, rule: str = "textvqa") -> float:
    """Agreement with the annotators of VQAv2, TextVQA or VizWiz, 0 to 1.

    The mean over the annotators of min(1, k / 3), where k counts the others who gave the predicted
    answer (arXiv 1505.00468, section 3). It was made for ten: a single answer always scores 0.

    Args:
        rule: `textvqa`, `vqav2`: texts are normalised by that rule. `vqav2_official`: as the VQA
            API, which compares texts as they are if all answers are the same.
    """
    same = rule_named(_COMPARED, rule)(prediction, texts(answers))
    n, m = len(same), sum(same)
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n


def exact_match(prediction: str, answers: Sequence[str], *, rule: str = "gqa") -> float:
    """1.0 if the prediction is one of the answers, else 0.0.

    Args:
        rule: `gqa`: without the prediction's trailing periods and capitals, as LLaVA prepares it
            for GQA's script. `ignore_punctuation`: without capitals and ASCII punctuation on both
            sides, as lmms-eval.
    """
    clean_prediction, clean_answer = rule_named(_MATCHED, rule)
    text = clean_prediction(prediction.strip())
    return float(any(text == clean_answer(answer) for answer in texts(answers)))


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Levenshtein similarity to the nearest answer (ANLS, arXiv 1905.13648), 0 to 1.

    As the ICDAR script: distances of cleaned texts, divided by the length of the uncleaned ones.

    Args:
        threshold: of a score; below it, 0 is given.
    """
    score = 1 - min(_distance(prediction, answer) for answer in texts(answers))
    return score if score >= threshold else 0.0


def relaxed_accuracy(prediction: str, answer: str, *, tolerance: float = 0.05) -> float:
    """1.0 if numbers differ by at most a share `tolerance`, or texts not at all (ChartQA, arXiv
    2203.10244, section 5.1), as pix2struct computes it; else 0.0."""
    given, true = _number(prediction), _number(answer)
    if given is not None and true:
        return float(abs(given - true) / abs(true) <= tolerance)
    return float(prediction.lower() == answer.lower())


def ocrbench(prediction: str, answers: Sequence[str], *, dataset: str = "") -> float:
    """1.0 if the prediction contains an answer (OCRBench, arXiv 2305.07895), else 0.0.

    Args:
        dataset: the row's; formulas of `HME100k` are compared without spaces.
    """
    clean = _formula if dataset == _HANDWRITTEN_FORMULAS else _line
    text = clean(prediction)
    return float(any(clean(answer) in text for answer in texts(answers)))


def _vqav2(text: str) -> str:
    text = _PERIOD.sub("", _without_marks(_one_line(text)), count=_PERIODS_DELETED)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    whole = table("contractions")["map"]
    return " ".join(whole.get(word, word) for word in words if word not in _ARTICLES)


def _textvqa(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _vqav2(text.strip())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    """Each mark goes if the text has it beside a space, or has a comma within a number; otherwise
    it becomes a space. What was done for one mark does not count for the next."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    left = text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if beside or number else " ")
    return left


def _compared(prediction: str, answers: Sequence[str], rule: str) -> list[bool]:
    text = normalize_answer(prediction, rule=rule)
    return [text == normalize_answer(answer, rule=rule) for answer in answers]


def _officially(prediction: str, answers: Sequence[str]) -> list[bool]:
    raw = [_one_line(answer) for answer in answers]
    if len(set(raw)) > 1:
        return _compared(prediction, answers, "vqav2")
    return [_one_line(prediction) == answer for answer in raw]


def _distance(prediction: str, answer: str) -> float:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise UserError("anls needs rapidfuzz; install it with: pip install 'trio-vlm[vqa]'") from (
            error
        )
    length = max(len(prediction.upper()), len(answer.upper()))
    clean = (" ".join(text.lower().split()) for text in (prediction, answer))
    return Levenshtein.distance(*clean) / length if length else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


_NORMALISED: dict[str, Callable[[str], str]] = {"textvqa": _textvqa, "vqav2": _vqav2}
_COMPARED: dict[str, Callable[[str, Sequence[str]], list[bool]]] = {
    "textvqa": partial(_compared, rule="textvqa"),
    "vqav2": partial(_compared, rule="vqav2"),
    "vqav2_official": _officially,
}
_MATCHED: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "gqa": (lambda text: text.rstrip(".").lower(), str),
    "ignore_punctuation": (without_punctuation, without_punctuation),
}
"""What a rule does to the prediction, and to an answer."""
