"""Objects that a caption names, for object hallucination (CHAIR, arXiv 1809.02156)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from trio.errors import UserError

_WORD = re.compile(r"'s\b|--+|\w+(?:[/-](?!-)\w*)*|[^\w\s]")
_IRREGULAR = {
    "people": "person", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "oxen": "ox", "knives": "knife", "wives": "wife", "lives": "life",
    "leaves": "leaf", "loaves": "loaf", "wolves": "wolf", "shelves": "shelf", "halves": "half",
    "calves": "calf", "scarves": "scarf", "hooves": "hoof", "elves": "elf", "buses": "bus",
    "gases": "gas", "men": "man",
}  # fmt: skip
_COMPOUNDS = ("men", "children", "knives", "wives", "buses")
"""Of these, ends of longer words too."""
_UNCHANGED = frozenset(("scissors", "series", "species", "news", "specimen", "omen", "abdomen"))
_IES = ("cookies", "movies", "brownies", "hoodies", "smoothies", "zombies", "selfies", "collies")
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal",
    "cub",
)  # fmt: skip
_VEHICLES = ("jet", "train")
_NO_OBJECT = ""


def objects_in(caption: str, objects: Mapping[str, str]) -> list[str]:
    """Classes that a caption names, in order, with repeats.

    Args:
        objects: from a word, or a pair of words, in the singular, to its class; a pair whose class
            is "" is no object.
    """
    words = [_singular(word) for word in _WORD.findall(caption.lower())]
    named: list[str] = []
    place = 0
    while place < len(words):
        length = 2 if " ".join(words[place : place + 2]) in objects else 1
        named.append(objects.get(" ".join(words[place : place + length]), _NO_OBJECT))
        place += length
    return [name for name in named if name != _NO_OBJECT]


def read_objects(path: str | Path) -> dict[str, str]:
    """The `objects` of a vocabulary file as CHAIR has it: a class a line, behind it its synonyms.

    With the pairs that CHAIR adds: "baby" or "adult" before an animal, "passenger" before jet and
    train, "toilet seat", "bow tie"; and those that are no object, "home plate" and "train track".
    Other than there, capitals and runs of spaces in the file do not keep a word from being found,
    and a seat in a caption with a toilet is one.

    Raises:
        UserError: no such file, or a word with two classes.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"objects {str(path)!r}: {error}") from error
    objects: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = [word.strip().lower() for word in line.split(",") if word.strip()]
        for word in words:
            if objects.setdefault(word, words[0]) != words[0]:
                raise UserError(
                    f"objects {str(path)!r}, line {number}: {word!r} is of class {words[0]!r} and "
                    f"of {objects[word]!r}"
                )
    same = dict.fromkeys(("home plate", "train track"), _NO_OBJECT)
    same |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
    same |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
    same |= {"toilet seat": "toilet", "bow tie": "tie"}
    return {pair: objects.get(word, _NO_OBJECT) for pair, word in same.items()} | objects


def _singular(word: str) -> str:
    """By simple rules, with what the official code makes of some words: no vocabulary has its "bu"
    for bus, "ty" for ties or "cano" for canoes."""
    if word in _UNCHANGED or word.endswith(("ss", "'s")):
        return word
    plural = next(filter(word.endswith, _COMPOUNDS), word)
    if plural in _IRREGULAR:
        return word.removesuffix(plural) + _IRREGULAR[plural]
    if word.endswith("ies") and word not in _IES:
        return f"{word[:-3]}y"
    if word.endswith("oes") and not word.endswith("shoes"):
        return word[:-2]
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word.removesuffix("s")
