"""CIDEr-D, BLEU and ROUGE-L of captions, as the COCO evaluation computes them.

Texts are tokens joined by single spaces (`caption_tokens`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from trio.errors import UserError
from trio.vqa.rules import texts

ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0  # of the penalty for length, in bigrams
_BETA = 1.2  # of recall beside precision
_TINY, _SMALL = 1e-15, 1e-9  # keep the official quotients finite; part of the rule
_Grams = Counter[tuple[str, ...]]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each image (arXiv 1411.5726, section 6), 0 to 10.

    Document frequencies are those of these references, so a score depends on all of them.
    """
    _same_length(predictions, references)
    grams = [
        [_grams(reference) for reference in texts(of_image, "references")]
        for of_image in references
    ]
    frequency: _Grams = Counter()
    for of_image in grams:
        frequency.update(set().union(*of_image))
    images = math.log(len(grams)) if grams else 0.0
    scores = []
    for prediction, of_image in zip(predictions, grams, strict=True):
        vector = _weighted(_grams(prediction), frequency, images)
        likeness = [
            _likeness(vector, _weighted(reference, frequency, images)) for reference in of_image
        ]
        scores.append(10 * sum(likeness) / len(likeness))
    return scores


@dataclass(frozen=True, slots=True)
class BleuCounts:
    """What BLEU adds up over captions."""

    matches: tuple[int, ...]
    """N-grams that a reference has too, by length; each as often as one reference has it."""
    grams: tuple[int, ...]
    """N-grams of the prediction, by length."""
    words: int
    reference_words: int
    """Of the reference whose length is nearest."""


def bleu_counts(prediction: str, references: Sequence[str]) -> BleuCounts:
    """Of one caption, for every order."""
    most: _Grams = Counter()
    for reference in texts(references, "references"):
        most |= _grams(reference)
    grams = _grams(prediction)
    matches = grams & most
    words = len(prediction.split())
    lengths = [len(reference.split()) for reference in references]
    return BleuCounts(
        tuple(sum(count for gram, count in matches.items() if len(gram) == n) for n in ORDERS),
        tuple(max(0, words - n + 1) for n in ORDERS),
        words,
        min(lengths, key=lambda length: (abs(length - words), length)),
    )


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 4
) -> float:
    """Corpus BLEU (Papineni et al. 2002), 0 to 1.

    Args:
        order: longest n-grams, 1 to 4.
    """
    if order not in ORDERS:
        raise UserError(f"order {order}: BLEU is computed for {', '.join(map(str, ORDERS))}")
    _same_length(predictions, references)
    counts = [bleu_counts(*pair) for pair in zip(predictions, references, strict=True)]
    score: float = bleu_of(
        [sum(one.matches[n] for one in counts) for n in range(order)],
        [sum(one.grams[n] for one in counts) for n in range(order)],
        sum(one.words for one in counts),
        sum(one.reference_words for one in counts),
    )
    return score


def bleu_of(matches: Sequence[Any], grams: Sequence[Any], words: Any, reference_words: Any) -> Any:
    """BLEU of sums of `BleuCounts`, whose order is the length of `matches`; of arrays of sums, an
    array."""
    precisions = math.prod(
        (match + _TINY) / (count + _SMALL) for match, count in zip(matches, grams, strict=True)
    )
    ratio = (words + _TINY) / (reference_words + _SMALL)
    return precisions ** (1 / len(matches)) * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004, section 3), 0 to 1: best precision and best recall over the references."""
    words = prediction.split(" ")
    others = [reference.split(" ") for reference in texts(references, "references")]
    pairs = [(_common(words, other), len(other)) for other in others]
    precision = max(common for common, _ in pairs) / len(words)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _same_length(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    texts(predictions, "predictions")
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions, but references of {len(references)} images"
        )


def _grams(text: str) -> _Grams:
    words = text.split()
    return Counter(
        tuple(words[start : start + n])
        for n, start in product(ORDERS, range(len(words)))
        if start + n <= len(words)
    )


@dataclass(frozen=True, slots=True)
class _Vector:
    weights: tuple[dict[tuple[str, ...], float], ...]
    """By length of the n-grams."""
    norms: tuple[float, ...]
    bigrams: int


def _weighted(grams: _Grams, frequency: _Grams, images: float) -> _Vector:
    weights: tuple[dict[tuple[str, ...], float], ...] = tuple({} for _ in ORDERS)
    for gram, count in grams.items():
        weights[len(gram) - 1][gram] = count * (images - math.log(max(1, frequency[gram])))
    norms = tuple(math.sqrt(sum(weight**2 for weight in each.values())) for each in weights)
    return _Vector(weights, norms, sum(c for gram, c in grams.items() if len(gram) == 2))


def _likeness(prediction: _Vector, reference: _Vector) -> float:
    """Mean over the lengths of n-grams."""
    total = 0.0
    for n, weights in enumerate(prediction.weights):
        others = reference.weights[n]
        dot = sum(
            min(weight, others[gram]) * others[gram]
            for gram, weight in weights.items()
            if gram in others
        )
        total += dot / (prediction.norms[n] * reference.norms[n] or 1.0)
    difference = prediction.bigrams - reference.bigrams
    return math.exp(-(difference**2) / (2 * _SIGMA**2)) * total / len(ORDERS)


def _common(words: Sequence[str], others: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(others) + 1)
    for word in words:
        before = 0
        for place, other in enumerate(others, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == other else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]
