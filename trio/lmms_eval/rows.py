"""Rows of lmms-eval as the engine takes them: their names, pictures and answers to be scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from trio.engine.request import Result
from trio.errors import UserError

_log = logging.getLogger(__name__)
_MARK = "<image>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A prompt about the pictures of one document."""

    prompt: str
    task: str
    split: str
    doc_id: Any

    def __str__(self) -> str:
        return f"task {self.task}, row {self.doc_id}"

    def pictures(self, documents: Mapping[str, Any], look: Callable[[Any], Any]) -> tuple[Any, ...]:
        """What the task shows for this row.

        Args:
            documents: of each task and split.
            look: lmms-eval's doc_to_visual.

        Raises:
            UserError: it shows something else than PIL images.
        """
        shown = look(documents[self.task][self.split][self.doc_id]) if callable(look) else None
        visuals = shown if isinstance(shown, list | tuple) else [] if shown is None else [shown]
        for visual in visuals:
            if not isinstance(visual, Image):
                raise UserError(
                    f"{self}: {_kind(visual)} is not read: only PIL images are, no video or audio"
                )
        return tuple(visuals)


@dataclass(kw_only=True, slots=True)
class Question:
    """A row with all answers that are to be scored for it."""

    row: Row
    look: Callable[[Any], Any]
    places: list[tuple[int, str]] = field(default_factory=list)
    """Of each answer: where its score goes, and its text."""

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for _, text in self.places))


def grouped(asked: Iterable[tuple[Row, Callable[[Any], Any], str]]) -> list[Question]:
    """Answers about the same row together, so that its prompt is read once for all."""
    questions: dict[Row, Question] = {}
    for place, (row, look, answer) in enumerate(asked):
        question = questions.setdefault(row, Question(row=row, look=look))
        question.places.append((place, answer))
    return list(questions.values())


def served(result: Result, row: Row) -> Result:
    """The result of a row, which is none if the engine could not serve it.

    Raises:
        UserError: it could not: an empty answer would be scored as a wrong one.
    """
    if result.finish_reason == "error":
        raise UserError(f"{row}: {result.error}")
    return result


def warn_of_marks(prompts: Sequence[str]) -> None:
    """Say it where a task writes places for images into its texts."""
    marked = sum(_MARK in prompt for prompt in prompts)
    if marked:
        _log.warning(
            "%s of %s prompts say %s: to the model that is text, and its images come first",
            marked,
            len(prompts),
            _MARK,
        )


def _kind(visual: Any) -> str:
    name = type(visual).__name__
    return f"{name} {visual!r:.80}" if isinstance(visual, str) else name
