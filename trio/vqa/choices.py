"""Yes or no, or a letter, as published evaluators read it from a model's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from trio.errors import UserError
from trio.vqa.rules import LETTERS, letters_of, rule_named, table, without_punctuation

_NO = frozenset(("No", "no", "not"))
_SCIENCEQA = "ABCDE"
_SCIENCEQA_PHRASE = re.compile(r"The answer is ([A-Z]).")
_MMBENCH_PHRASE = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
_LAST_WORDS = 4  # among which MMBench believes a letter
_AI2D_LETTER = re.compile(r"\s*([A-Z])\.")


def yes_no(prediction: str, *, rule: str = "pope") -> str | None:
    """`"yes"`, `"no"`, or None where the text says neither.

    Args:
        rule: `pope` (arXiv 2305.10355, official script): no if a word before the first period is
            "No", "no" or "not", else yes. `mme` (arXiv 2306.13394, official script): what the first
            four characters contain.
    """
    return rule_named(_YES_NO, rule)(prediction)


def choice_letter(prediction: str, choices: Sequence[str], *, rule: str = "mmbench") -> str | None:
    """The letter that a text chooses: "A" for the first choice; None where it chooses none.

    Args:
        choices: their texts, at most 26.
        rule: `mmbench` (VLMEvalKit's heuristics without a judge), `scienceqa` (LLaVA's script),
            `seed` (lmms-eval), `mmstar` (official script), `ai2d` (lmms-eval).
    """
    if not 0 < len(choices) <= len(LETTERS):
        raise UserError(f"choices: 1 to {len(LETTERS)} are needed, not {len(choices)}")
    letter = rule_named(_LETTERS, rule)(prediction, choices)
    return letter if letter in letters_of(choices) else None


def _pope(text: str) -> str:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "yes" if _NO.isdisjoint(words) else "no"


def _mme(text: str) -> str | None:
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def _scienceqa(text: str, choices: Sequence[str]) -> str | None:
    text = text.strip()
    if len(text) == 1:
        return text if text in _SCIENCEQA else None
    if len(text) >= 3 and text[0] in _SCIENCEQA and text[1:3] == ". ":
        return text[0]
    found = _SCIENCEQA_PHRASE.findall(text)
    return found[0] if len(found) == 1 and found[0] in _SCIENCEQA else None


def _seed(text: str, choices: Sequence[str]) -> str:
    return text.strip()[:1].upper()


def _mmstar(text: str, choices: Sequence[str]) -> str | None:
    text = text.lower().strip().replace("\n", " ")
    for start in ("", "(", "option ", "the answer is "):
        letter = text.removeprefix(start)[:1].upper() if text.startswith(start) else ""
        if letter in letters_of(choices):
            return letter
    return None


def _ai2d(text: str, choices: Sequence[str]) -> str:
    found = _AI2D_LETTER.match(text)
    text = found[1] if found else text
    return without_punctuation(text.strip()).upper()


def _mmbench(text: str, choices: Sequence[str]) -> str | None:
    known = table("mmbench")
    if known["api_failure"] not in text:
        if any(refusal in text for refusal in known["refusals"]):
            return None
        letters = letters_of(choices)
        marks = known["marks_to_space"]
        words = text.translate(str.maketrans(marks, " " * len(marks))).split()
        named = [letter for letter in letters if letter in words]
        if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
            return named[0]
        if not named and "Z" in words:
            return None
        if (phrase := _MMBENCH_PHRASE.search(text)) and phrase[1].upper() in letters:
            return phrase[1].upper()
    return _named_by_text(text.lower(), choices)


def _named_by_text(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice whose text a text that is not too long contains."""
    if len(text) > 2 * sum(map(len, choices)):
        return None
    named = [
        letter
        for letter, choice in zip(letters_of(choices), choices, strict=True)
        if choice.lower() in text
    ]
    return named[0] if len(named) == 1 else None


_YES_NO: dict[str, Callable[[str], str | None]] = {"pope": _pope, "mme": _mme}
_LETTERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "mmbench": _mmbench,
    "scienceqa": _scienceqa,
    "seed": _seed,
    "mmstar": _mmstar,
    "ai2d": _ai2d,
}
