"""Was an answer right? Exact match after normalisation, and objects named rightly in captions.

Captions are lists in the form "a red 7 , a blue 3 and a green 5": their share of objects named
rightly is the size of the multiset intersection over the larger of the two lists, so that naming
too much costs as naming too little does. No torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

SCORED = ("exact", "objects")
"""What --score may ask for."""
_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_SPLIT = re.compile(r"\s*(?:,|;|\band\b)\s*")
_PUNCTUATION = re.compile(r"(?<!\d)[.,;:!?\"'`()]|[.,;:!?\"'`()](?!\d)")


def normalise(text: str) -> str:
    """Lower case, no articles or punctuation (but within numbers), single spaces.

    Text that is nothing but an article stays: the answer may be the option "A".
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = _PUNCTUATION.sub(" ", plain).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def exact_match(response: str, answers: Sequence[str]) -> bool:
    """Whether the response equals one of the answers, both normalised."""
    return normalise(response) in {normalise(answer) for answer in answers}


def objects(caption: str) -> Counter[str]:
    """Objects that a caption names, each without its article."""
    parts = _SPLIT.split(unicodedata.normalize("NFKC", caption).casefold().strip(" .!"))
    named = (_ARTICLE.sub("", " ".join(part.split())) for part in parts)
    return Counter(part for part in named if part)


def object_share(response: str, answers: Sequence[str]) -> float:
    """Share of objects named rightly, for the answer that fits best, in [0, 1]."""
    said = objects(response)
    return max((_overlap(said, objects(answer)) for answer in answers), default=0.0)


def _overlap(said: Counter[str], true: Counter[str]) -> float:
    larger = max(said.total(), true.total())
    return (said & true).total() / larger if larger else 1.0


def is_caption(answers: Sequence[str]) -> bool:
    """Whether the answers list objects, two or more or one with its article."""
    return any(objects(a).total() > 1 or _ARTICLE.match(a.casefold()) is not None for a in answers)
