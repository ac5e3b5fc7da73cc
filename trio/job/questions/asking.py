"""What is asked about a row of a data set, and what is written beside the answer. No torch.

INPUT a row's columns under their names with a dot before them; OUTPUT its prompts with what their
metric needs, and once answered the columns of `rows/` that `jobs/vqa.py` adds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from trio.engine.request import Result
from trio.errors import UserError
from trio.job.images.policy import RowError
from trio.job.input.columns import OWN
from trio.job.input.kinds.saved_datasets import WHOLE, Part
from trio.job.output.output_rows import Ask, Source
from trio.job.output.totals import as_pairs
from trio.job.questions.keep_if import Condition
from trio.job.questions.question_settings import LIKELIHOOD, TOKENS, Questions
from trio.vqa.aggregates import METRICS, row_score
from trio.vqa.objects import read_objects
from trio.vqa.presets.column_expressions import column_expression
from trio.vqa.presets.preset import Preset
from trio.vqa.presets.preset_file import preset_named
from trio.vqa.presets.prompt_template import PromptTemplate
from trio.vqa.rules import LETTERS

CHOICES = "choices"
OPTIONAL = ("category", "l2_category", "question_type", "answer_type")
"""Fields by which metrics break their figures down, where a data set has them."""
LETTERED = ("seed", "mmstar")
"""Metrics that read a letter, and do not need the choices for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How rows are asked about; travels to the workers."""

    preset: Preset
    questions: Questions

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the input that are read beside images, ids and prompts."""
        return tuple(sorted({*self.preset.columns, *self.questions.group_by}))

    @property
    def without_picture(self) -> bool:
        """Whether a row without a picture is asked about all the same, as its metric tells."""
        expressions = self.preset.fields.values()
        return any(self.preset.image in expression.columns for expression in expressions)

    def roles(self) -> dict[str, str]:
        """Columns of the roles, as `--columns` names them, where a preset says which."""
        if not self.questions.preset:
            return {}
        name = self.preset.id[0] if len(self.preset.id) == 1 else "none"
        return {"id": name} | ({} if self.preset.images else {"image": self.preset.image})

    def check(self, schemas: Sequence[pa.Schema], paths: Sequence[str]) -> None:
        """UserError: a shard lacks columns."""
        for schema, path in zip(schemas, paths, strict=True):
            if self.questions.preset:
                self.preset.check(schema, path)
            for name in self.columns:
                if name not in schema.names and name not in self.preset.optional:
                    have = ", ".join(schema.names) or "none"
                    raise UserError(f"{path}: no column {name!r}; it has {have}")

    def asks(self, source: Source) -> tuple[Ask, ...]:
        """A row's prompts.

        Raises:
            RowError: it has none, or what it holds cannot be asked or scored.
        """
        there = source.own_columns()
        row = there | {self.preset.image: True if source.picture is not None else None}
        try:
            found = self.preset.questions(row)
        except UserError as error:
            raise RowError("question_invalid", str(error)) from error
        if not found:
            raise RowError("question_missing", f"column {self.preset.explode!r} is empty")
        groups = {name: _said(there.get(name)) for name in self.questions.group_by}
        return tuple(
            Ask(
                prompt=question.prompt,
                fields=self._checked(question.fields),
                groups=groups,
                candidates=self._candidates(question.fields),
            )
            for question in found
        )

    def key(self, source: Source) -> str | None:
        """A row's id where several columns make it; None where its place does.

        Raises:
            RowError: one of them is null.
        """
        if len(self.preset.id) < 2:
            return None
        try:
            return str(self.preset.key({n: source.cell(OWN + n) for n in self.preset.id}))
        except UserError as error:
            raise RowError("id_missing", str(error)) from error

    def columns_of(self, ask: Ask, source: Source, outcome: Result | RowError) -> dict[str, Any]:
        """What `rows/` gets of an answer, or of an error, beside what all runs write."""
        fields = dict(ask.fields)
        if "box_pixels" in fields and source.size is not None:
            corners = fields.pop("box_pixels")
            fields["box"] = [value / source.size[n % 2] for n, value in enumerate(corners)]
        row: dict[str, Any] = {
            "answers": _answers(fields),
            "metric": self.preset.metric,
            "fields": json.dumps(fields, ensure_ascii=False),
            "groups": as_pairs(ask.groups),
        }
        if self.questions.mode == LIKELIHOOD:
            row["choices"] = list(ask.candidates) or None
        if isinstance(outcome, Result) and outcome.finish_reason != "error":
            row |= self._answered(ask, outcome)
            row["score"] = self.score(row, fields)
        if self.questions.keep_if is not None:
            row["keep"] = Condition(self.questions.keep_if).holds(_figures(row, outcome))
        return row

    def score(self, row: Mapping[str, Any], fields: Mapping[str, Any]) -> float | None:
        """Of an answered row, by the metric; None where that has none for a row alone, or the data
        set no right answer."""
        metric = self.preset.metric
        if metric is None or not scorable(metric, fields):
            return None
        prediction = metric_prediction(metric, row, fields)
        return row_score(metric, {**fields, "prediction": prediction})

    def _answered(self, ask: Ask, result: Result) -> dict[str, Any]:
        if self.questions.mode != LIKELIHOOD:
            return {"prediction": result.response or ""}
        return likelihoods(
            ask.candidates, result.candidate_logprobs, by_tokens=self.questions.normalise == TOKENS
        )

    def _candidates(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        if self.questions.mode != LIKELIHOOD:
            return ()
        given = self.questions.candidates or fields.get(CHOICES, ())
        if not isinstance(given, list | tuple):
            raise RowError("choices_invalid", f"choices are no list: {given!r:.60}")
        if len(given) < 2:
            raise RowError("choices_missing", f"the row has {len(given)} choices; two are needed")
        if len(given) > len(LETTERS) and _wants_letter(self.preset.metric, given, fields):
            raise RowError("choices_invalid", f"{len(given)} choices, but {len(LETTERS)} letters")
        return tuple(given)

    def _checked(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields, if they can be scored: found out before a model answers."""
        metric = self.preset.metric
        told = fields if "box_pixels" not in fields else {**fields, "box": fields["box_pixels"]}
        if metric is not None and scorable(metric, told):
            try:
                row_score(metric, {**told, "prediction": ""})
            except UserError as error:
                raise RowError("truth_invalid", str(error)) from error
        return fields


def asking_of(
    questions: Questions,
    template: PromptTemplate | None = None,
    names: Sequence[str] = (),
    part: Part = WHOLE,
) -> Asking:
    """How rows are asked about by some settings.

    Args:
        questions: the settings.
        template: of the prompt, if one is given.
        names: columns of the input, where there is no preset.
        part: of the preset's data set, if not the one it says itself.

    Raises:
        UserError: the preset cannot be read, or a metric needs columns that are not there.
    """
    metric = questions.scored_by
    if questions.preset is None:
        preset = _without_preset(questions, template, names)
    else:
        preset = preset_named(questions.preset)
        preset = dataclasses.replace(
            preset,
            metric=metric,
            config=part.subset or preset.config,
            split=part.split or preset.split,
        )
        if template is not None:
            preset = dataclasses.replace(preset, prompt=template)
    _check(preset, questions)
    return Asking(preset=preset, questions=questions)


def _check(preset: Preset, questions: Questions) -> None:
    """UserError: every row would fail, or a figure be absent."""
    by_choices = questions.mode == LIKELIHOOD and questions.candidates is None
    if by_choices and CHOICES not in preset.fields:
        raise UserError(
            f"--mode likelihood: preset {preset.name} has no field {CHOICES!r}; give --candidates,"
            " as in Yes,No"
        )
    names = Condition(questions.keep_if).names if questions.keep_if else frozenset()
    if "score" in names and preset.metric is None:
        raise UserError("--keep-if: there is no score without --metric")
    if questions.objects is not None:
        read_objects(questions.objects)


def _without_preset(
    questions: Questions, template: PromptTemplate | None, names: Sequence[str]
) -> Preset:
    """The columns under their own names."""
    metric = questions.scored_by
    needed = list(METRICS[metric].truth) if metric else []
    if questions.mode == LIKELIHOOD and questions.candidates is None:
        needed.append(CHOICES)
    lacking = [name for name in needed if name not in names]
    if lacking:
        what = f"--metric {metric}" if metric and lacking != [CHOICES] else "--mode likelihood"
        raise UserError(
            f"{what} needs a column {lacking[0]!r}; the input has {', '.join(names) or 'none'}."
            " Give a preset of your own (--preset FILE.yaml) that says of which columns to make it"
        )
    wanted = dict.fromkeys((*needed, *(name for name in OPTIONAL if name in names and metric)))
    lists = ("answers", "references", CHOICES, "present")
    fields = {name: column_expression(f"{name}[]" if name in lists else name) for name in wanted}
    return Preset(
        name="",
        prompt=template or PromptTemplate(f"{{{_prompt_column(names)}}}"),
        fields=fields,
        metric=metric,
        optional=OPTIONAL,
        dotted=frozenset(name for name in names if "." in name),
    )


def _prompt_column(names: Sequence[str]) -> str:
    for name in ("prompt", "question"):
        if name in names:
            return name
    raise UserError(
        f"the input has no column prompt or question; it has {', '.join(names) or 'none'}. Give"
        " --prompt-template '{COLUMN} ...'"
    )


def scorable(metric: str, fields: Mapping[str, Any]) -> bool:
    """Whether the fields hold what a metric needs beside the answer."""
    return all(name in fields for name in METRICS[metric].truth)


def metric_prediction(metric: str | None, row: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """What a metric takes for the answer: of a choice among the row's own, its letter, where it
    wants one."""
    if row.get("choices") and _wants_letter(metric, row["choices"], fields):
        return LETTERS[row["p_choice"].index(max(row["p_choice"]))]
    return str(row["prediction"])


def _wants_letter(metric: str | None, candidates: Sequence[str], fields: Mapping[str, Any]) -> bool:
    own = list(candidates) == list(fields.get(CHOICES, ()))
    return own and metric is not None and (CHOICES in METRICS[metric].fields or metric in LETTERED)


def likelihoods(
    candidates: Sequence[str], logprobs: Sequence[Sequence[float]], *, by_tokens: bool
) -> dict[str, Any]:
    """Columns of an answer by likelihood.

    Args:
        candidates: two or more.
        logprobs: of each, the log-probability of each token.
        by_tokens: a candidate's score is their mean rather than their sum.
    """
    sums = [math.fsum(own) for own in logprobs]
    scores = [s / len(own) for s, own in zip(sums, logprobs, strict=True)] if by_tokens else sums
    best, second = sorted(scores, reverse=True)[:2]
    weights = [math.exp(score - best) for score in scores]
    return {
        "choice_logprobs": sums,
        "choice_tokens": list(map(len, logprobs)),
        "p_choice": [weight / sum(weights) for weight in weights],
        "p_first": math.exp(sums[0]),
        "prediction": candidates[scores.index(best)],
        "margin": best - second,
    }


def _answers(fields: Mapping[str, Any]) -> list[str] | None:
    """The right ones, for people who read the rows."""
    for name in ("answers", "answer", "references"):
        if name in fields:
            found = fields[name]
            return list(map(str, found if isinstance(found, list) else [found]))
    return None


def _figures(row: Mapping[str, Any], outcome: Result | RowError) -> dict[str, float | None]:
    """What a condition may speak of."""
    return {
        "p_first": row.get("p_first"),
        "p_best": max(row["p_choice"]) if row.get("p_choice") else None,
        "margin": row.get("margin"),
        "score": row.get("score"),
        "logprob_mean": outcome.logprob_mean if isinstance(outcome, Result) else None,
    }


def _said(value: Any) -> str:
    return "" if value is None else str(value)
