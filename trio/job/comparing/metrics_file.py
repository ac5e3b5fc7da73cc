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
from trio.job.output.sink import ROWS
from trio.job.plan import Plan
from trio.job.questions.asking import Asking, metric_prediction
from trio.job.questions.question_settings import LIKELIHOOD, Questions
from trio.job.storage import Location
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


def metrics_files(run: Plan, run_id: str, settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`metrics.json` and its table, as text by name; none for a run that scores no questions and
    compares nothing. Arguments as of `metrics_of`.

    Rows that cannot be scored together are no reason to lose them: the file says why then.
    """
    if run.asking is None and run.config.output.compare is None:
        return {}
    try:
        metrics = metrics_of(run, run_id, settings)
    except UserError as error:
        return {METRICS: json.dumps({"run": run_id, ERROR: str(error)}, indent=2) + "\n"}
    return {METRICS: json.dumps(metrics, indent=2) + "\n", TABLE: f"{table_of(metrics)}\n"}


def metrics_of(run: Plan, run_id: str, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The object of `metrics.json`.

    Args:
        run: whose rows are all there.
        run_id: its id.
        settings: figures of each setting as `summary.json` has them.

    Raises:
        UserError: rows that cannot be scored together.
        OSError: they cannot be read.
    """
    questions, asking = run.config.questions, run.asking
    metric = asking.preset.metric if asking else None
    found = rows_of(run.output, questions, scored=run.config.output.score not in (None, "none"))
    about = _about(run.config.questions, asking)
    made = []
    for number, (one, of_setting) in enumerate(zip(run.config.compared, settings, strict=True)):
        rows = found.get(number, [])
        figures = run_metrics(metric, [row for row, _ in rows], seed=run.config.seed, about=about)
        if questions.mode == LIKELIHOOD:
            figures["calibration"] = _calibration(rows)
        shown = {name: of_setting.get(name) for name in ("retention", "images_per_s")}
        made.append({"setting": number, "name": one.name, **shown, **figures})
    names = [one.name for one in run.config.compared]
    if UNPRUNED in names and len(names) > 1:
        unpruned = found.get(names.index(UNPRUNED), [])
        for number, figures in enumerate(made):
            if figures["name"] != UNPRUNED:
                figures["comparison"] = _compared(
                    metric, unpruned, found.get(number, []), run.config.seed
                )
    return {"run": run_id, "mode": questions.mode, "metric": metric, "settings": made}


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
    lines = [
        f"{one['name']}: {_percent(agreement)} of the answers are those of the unpruned model"
        for one in metrics["settings"]
        if (agreement := one.get("comparison", {}).get("agreement"))
    ]
    return "\n".join([text, "", *lines]).rstrip()


def _percent(agreement: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in agreement["interval"])
    return f"{100 * agreement['value']:.1f} % [{low:.1f}, {high:.1f}]"


_Row = tuple[Answered, Mapping[str, Any]]
Rows = list[_Row]
"""As metrics take them, with their columns."""


def rows_of(output: Location, questions: Questions, *, scored: bool = False) -> dict[int, Rows]:
    """The rows of a run by setting; `scored`: captions with a score."""
    names = [*OF_ALL]
    if questions.mode is not None:
        names += (*OF_SCORED, *OF_QUESTIONS)
    elif scored:
        names += OF_SCORED
    if questions.mode == LIKELIHOOD:
        names += OF_LIKELIHOOD
    objects = read_objects(questions.objects) if questions.objects else None
    metric = questions.scored_by
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
        groups=dict(row.get("groups") or ()),
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
