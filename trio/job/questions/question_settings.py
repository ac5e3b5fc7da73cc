"""Settings of `jobs/vqa.py` alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from trio.errors import UserError
from trio.job.questions.keep_if import Condition
from trio.job.storage import check_no_secret
from trio.values import Switch, Text, Value, accepted, listed, many, one_of, text
from trio.vqa.aggregates import METRICS
from trio.vqa.presets.preset_file import preset_named

GENERATE, LIKELIHOOD = "generate", "likelihood"
SUM, TOKENS = "sum", "tokens"


def different_texts(value: Any) -> tuple[str, ...]:
    """Two or more, of text with commas or a list."""
    found = listed(text)(value)
    if len(set(found)) != len(found) or len(found) < 2:
        raise UserError(f"give two or more different answers, as in Yes,No: {value!r}")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What is asked and how it is scored."""

    mode: Annotated[str | None, one_of((GENERATE, LIKELIHOOD))] = None
    """generate: the model answers; likelihood: it says how likely each of given answers is
    (default: generate)."""
    preset: Annotated[str | None, Value(read=accepted(preset_named), unit="NAME|FILE.yaml")] = None
    """Columns, prompt and metric of a data set by its name (pope, mme, gqa, vqav2, ...), or of a
    YAML file of your own; without --input it is read from the Hub."""
    pictures: Annotated[tuple[str, ...], many(accepted(check_no_secret), "PATH")] = ()
    """Parquet files with the pictures that a preset joins, as gqa's (default: in the data set's own
    directory)."""
    metric: Annotated[str | None, one_of((*METRICS, "none"))] = None
    """By which answers are scored, with the columns that it needs (default: the preset's)."""
    group_by: Annotated[tuple[str, ...], many(text, "COLUMN")] = ()
    """Columns by whose values figures are given as well."""
    candidates: Annotated[tuple[str, ...] | None, Value(read=different_texts, unit="TEXT,...")] = (
        None
    )
    """Of --mode likelihood: answers to be scored, the same for all rows, as Yes,No (default: each
    row's list column choices)."""
    with_eos: Switch = False
    """The end of sequence counts as each candidate's last token."""
    normalise: Annotated[str, one_of((SUM, TOKENS))] = SUM
    """A candidate's score: the sum of its tokens' log-probabilities, or their mean."""
    keep_if: Annotated[str | None, Value(read=accepted(Condition.parse), unit="CONDITION")] = None
    """Write a column keep: whether this holds, as in 'p_first > 0.6'; no row is dropped."""
    objects: Text | None = None
    """Of metric chair: file of its vocabulary, a class a line, behind it its synonyms."""

    def __post_init__(self) -> None:
        asked = self.mode == LIKELIHOOD
        of_likelihood = {
            "candidates": self.candidates is not None,
            "with_eos": self.with_eos,
            "normalise": self.normalise != SUM,
        }
        for name, given in of_likelihood.items():
            if given and not asked:
                raise UserError(f"--{name.replace('_', '-')} is for --mode likelihood")
        if self.pictures and self.preset is None:
            raise UserError("--pictures needs --preset")
        if self.keep_if is not None:
            Condition.parse(self.keep_if).check(likelihood=asked)
        if self.objects is not None and self.scored_by != "chair":
            raise UserError("--objects is for metric chair")
        if self.objects is None and self.scored_by == "chair":
            raise UserError("metric chair needs --objects FILE, the vocabulary of its classes")

    @property
    def scored_by(self) -> str | None:
        """The metric, the preset's where none is given."""
        if self.metric is not None:
            return None if self.metric == "none" else self.metric
        return preset_named(self.preset).metric if self.preset else None
