"""`metrics.json`: a run's figures by setting, with intervals, and what each setting cost.

INPUT the rows of a finished run; OUTPUT an object for JSON and a table. No Ray, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from trio.errors import UserError
from trio.job.comparing import audit
from trio.job.comparing.compared import UNPRUNED
from trio.job.output.scoring import SCORED
from trio.job.output.sink import ROWS
from trio.job.output.totals import from_pairs
from trio.job.plan import Plan
from trio.job.questions.asking import Asking, metric_prediction
from trio.job.questions.question_settings import LIKELIHOOD, Questions
from trio.job.storage import Location
from trio.tables import percent
from trio.vqa.figures.answered import Answered
from trio.vqa.figures.calibration import calibration
from trio.vqa.figures.comparison_table import comparison_table
from trio.vqa.figures.run_comparison import PairedScores, compare_metrics, headline_of
from trio.vqa.figures.run_metrics import run_metrics
from trio.vqa.objects import objects_in, read_objects

METRICS, TABLE = "metrics.json", "metrics.md"
ERROR = "error"
"""Key of `metrics.json` that says why there are no figures."""
OF_ALL = ("row", "prompt_number", "setting", "picture", "error", "response")
OF_SCORED = ("score",)
OF_QUESTIONS = ("prediction", "fields", "groups")
OF_LIKELIHOOD = ("choices", "p_choice")


def metrics_of(
    run: Plan, run_id: str, settings: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The object of `metrics.json`; None for a run that scores no questions and compares nothing.

    Rows that cannot be scored together are no reason to lose them: `ERROR` says why then.

    Args:
        run: whose rows are all there.
        run_id: its id.
        settings: figures of each setting as `summary.json` has them.

    Raises:
        OSError: the rows cannot be read.
    """
    if run.asking is None and run.config.output.compare is None:
        return None
    try:
        return {"run": run_id, **_figures(run, settings)}
    except UserError as error:
        return {"run": run_id, ERROR: str(error)}


def metrics_files(metrics: Mapping[str, Any]) -> dict[str, str]:
    """`metrics.json` and its table, as text by name."""
    table = {} if ERROR in metrics else {TABLE: f"{table_of(metrics)}\n"}
    return {METRICS: json.dumps(metrics, indent=2) + "\n"} | table


def _figures(run: Plan, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config, questions, asking = run.config, run.config.questions, run.asking
    metric = asking.preset.metric if asking else None
    scored = asking is not None or config.output.score in SCORED
    found = rows_of(run.output, questions, metric, scored=scored)
    about = _about(questions, asking)
    made = []
    for number, (one, of_setting) in enumerate(zip(config.compared, settings, strict=True)):
        rows = found.get(number, [])
        figures = run_metrics(metric, [row for row, _ in rows], seed=config.seed, about=about)
        if questions.mode == LIKELIHOOD:
            figures["calibration"] = _calibration(rows)
        shown = {name: of_setting.get(name) for name in ("retention", "images_per_s")}
        made.append({"setting": number, "name": one.name, **shown, **figures})
    if config.output.compare is not None:
        names = [one.name for one in config.compared]
        unpruned = found.get(names.index(UNPRUNED), [])
        for number, figures in enumerate(made):
            if figures["name"] != UNPRUNED:
                figures["comparison"] = _compared(
                    metric, unpruned, found.get(number, []), config.seed
                )
    return {"mode": questions.mode, "metric": metric, "settings": made}


def audit_of(run: Plan, seconds: float) -> dict[str, Any]:
    """What the audit of a run found; `seconds`: that engines spent on it."""
    rate = run.config.output.audit
    assert rate is not None
    answered, kept = 0, []
    for row in _read(run.output.join(ROWS), ["error", "picture", *audit.COLUMNS]):
        answered += row["error"] is None
        if row["audit_match"] is not None or row["audit_error"] is not None:
            kept.append(row)
    return audit.audit_summary(kept, rate, seconds, of_rows=answered)


def table_of(metrics: Mapping[str, Any]) -> str:
    """As Markdown, a line per setting."""
    text = comparison_table([(one["name"], one) for one in metrics["settings"]])
    lines = []
    for one in metrics["settings"]:
        if (agreement := one.get("comparison", {}).get("agreement")) is not None:
            same = percent(agreement["value"], agreement["interval"])
            lines.append(f"{one['name']}: {same} of the answers are those of the unpruned model")
    return "\n".join([text, "", *lines]).rstrip()


_Row = tuple[Answered, Mapping[str, Any]]
Rows = list[_Row]
"""As metrics take them, with their columns."""


def rows_of(
    output: Location, questions: Questions, metric: str | None, *, scored: bool
) -> dict[int, Rows]:
    """The rows of a run by setting; `scored`: whether they have a score."""
    names = [*OF_ALL, *(OF_SCORED if scored else ())]
    if questions.mode is not None:
        names += OF_QUESTIONS
    if questions.mode == LIKELIHOOD:
        names += OF_LIKELIHOOD
    objects = read_objects(questions.objects) if questions.objects else None
    found: dict[int, Rows] = {}
    for row in _read(output.join(ROWS), names):
        found.setdefault(row["setting"], []).append((_answered(metric, row, objects), row))
    return found


def _read(rows: Location, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    dataset = ds.dataset(rows.path, filesystem=rows.filesystem, format="parquet")
    for batch in dataset.to_batches(columns=list(columns)):
        yield from batch.to_pylist()


def _answered(
    metric: str | None, row: Mapping[str, Any], objects: Mapping[str, str] | None
) -> Answered:
    fields = json.loads(row.get("fields") or "{}")
    prediction: str | None = None
    if row["error"] is None:
        asked = row.get("prediction") is not None
        prediction = metric_prediction(metric, row, fields) if asked else row["response"]
        if objects is not None:
            fields["mentioned"] = objects_in(prediction, objects)
    elif "box_pixels" in fields:  # of a picture that could not be read: no box is right
        fields["box"] = fields["box_pixels"]
    return Answered(
        key=(row["row"], row["prompt_number"]),
        picture=row["picture"] or "",
        prediction=prediction,
        error=None if row["error"] is None else row["error"].partition(":")[0],
        fields=fields,
        groups=from_pairs(row.get("groups")),
    )


def _about(questions: Questions, asking: Asking | None) -> dict[str, Any]:
    """What figures depend on."""
    if asking is None:
        return {}
    about: dict[str, Any] = {"mode": questions.mode, "prompt": asking.preset.prompt.text}
    if questions.mode == LIKELIHOOD:
        about |= {"normalise": questions.normalise, "with_eos": questions.with_eos}
    if asking.preset.metric == "captions":
        about["tokenizer"] = "trio.vqa.caption_tokens"
    return about


def _calibration(rows: Sequence[_Row]) -> dict[str, Any]:
    """Of the rows whose answer is right or wrong."""
    told = [row for _, row in rows if row["error"] is None and row["score"] in (0.0, 1.0)]
    sure = [max(row["p_choice"]) for row in told]
    return calibration(sure, [row["score"] == 1 for row in told])


def _compared(
    metric: str | None, unpruned: Sequence[_Row], pruned: Sequence[_Row], seed: int
) -> dict[str, Any]:
    before, after = ([row for row, _ in rows] for rows in (unpruned, pruned))
    found = compare_metrics(metric, before, after, seed=seed)
    if found["headline"] is None and (scores := _scores(unpruned, pruned)) is not None:
        found["headline"] = headline_of(scores, seed)
    return found


def _scores(unpruned: Sequence[_Row], pruned: Sequence[_Row]) -> PairedScores | None:
    """Of rows that were scored in another way than by a metric."""
    others = {row.key: told for row, told in pruned}
    pairs = [
        (row, told["score"], others[row.key]["score"])
        for row, told in unpruned
        if row.key in others and told.get("score") is not None
    ]
    pairs = [pair for pair in pairs if pair[2] is not None]
    if not pairs:
        return None
    return PairedScores(
        unpruned=np.array([before for _, before, _ in pairs]),
        pruned=np.array([after for *_, after in pairs]),
        pictures=np.array([row.picture or str(row.key) for row, *_ in pairs]),
    )
