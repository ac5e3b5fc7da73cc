"""Finished comparisons side by side: each benchmark relative to unpruned, and the average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trio.errors import UserError
from trio.job import run_yaml
from trio.job.comparing.compared import UNPRUNED
from trio.job.comparing.metrics_file import Rows, rows_of
from trio.job.output import output_directory
from trio.job.output.output_directory import CONFIG
from trio.job.settings import FIELDS, Settings, made_of
from trio.job.storage import locate, read_bytes
from trio.tables import markdown, percent
from trio.vqa.figures.benchmark_average import average_over
from trio.vqa.figures.run_comparison import PairedScores, paired_scores

ALIKE = ("model", "pruning", "sampling")
"""Groups of settings that averaged runs share."""


def benchmark_table(outputs: Sequence[str]) -> str:
    """As Markdown: a line per setting that all have, a column per benchmark.

    Args:
        outputs: directories of finished runs of `jobs/vqa.py` with `--compare`.

    Raises:
        UserError: one is none, or they have no setting in common.
    """
    if len(set(outputs)) != len(outputs):
        raise UserError("one directory is given twice")
    _check_alike({name: _settings(name) for name in outputs})
    found = {name: _compared(name) for name in outputs}
    first, *others = found.values()
    names = [name for name in first if all(name in other for other in others)]
    if not names:
        raise UserError(f"{', '.join(outputs)}: no setting is compared in all of them")
    lines = [["setting", *(_title(name) for name in outputs), "average"]]
    for setting in names:
        whole = average_over({name: of_run[setting] for name, of_run in found.items()})
        each = [percent(whole["benchmarks"][name]) for name in outputs]
        lines.append([setting, *each, percent(whole["relative"], whole["relative_interval"])])
    return markdown(lines)


def _check_alike(settings: Mapping[str, Settings]) -> None:
    """UserError: the runs differ in more than what they ask."""
    (first, *_), values = settings, {name: one.results() for name, one in settings.items()}
    names = [name for name in values[first] if FIELDS[name].group in ALIKE]
    for other, of_run in values.items():
        for name in names:
            if of_run[name] != values[first][name]:
                raise UserError(
                    f"{name} is {values[first][name]!r} in {first} and {of_run[name]!r} in {other}:"
                    " these are no figures of one model"
                )


def _compared(output: str) -> dict[str, PairedScores]:
    """Of each setting but the unpruned one, what its rows and the unpruned ones are worth."""
    place = locate(output)
    if not output_directory.finished(place):
        raise UserError(f"{output}: no finished run lies there")
    config = _settings(output)
    metric = config.questions.scored_by
    if metric is None or config.output.compare is None:
        raise UserError(f"{output}: no run of vqa.py with --compare and a metric")
    names = [one.name for one in config.compared]
    rows = rows_of(place, config.questions, metric, scored=True)
    before = _answers(rows, names.index(UNPRUNED))
    made = {
        name: paired_scores(metric, before, _answers(rows, number))
        for number, name in enumerate(names)
        if name != UNPRUNED
    }
    lacking = [name for name, scores in made.items() if scores is None]
    if lacking:
        raise UserError(
            f"{output}: by metric {metric} rows alone have no score, or none has a right answer"
        )
    return {name: scores for name, scores in made.items() if scores is not None}


def _settings(output: str) -> Settings:
    source = f"{output}/{CONFIG}"
    return made_of(**run_yaml.parse(read_bytes(locate(output).join(CONFIG)), source))


def _answers(rows: Mapping[int, Rows], setting: int) -> list[Any]:
    return [answered for answered, _ in rows.get(setting, [])]


def _title(output: str) -> str:
    return output.rstrip("/").rpartition("/")[2]
