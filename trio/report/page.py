"""The page as one HTML file: template, styles, scripts and figures, nothing from elsewhere."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trio.job.output.summary import DONE, FAILED, RUNNING
from trio.report.charts import distribution_charts, speed_charts, sureness_charts
from trio.report.figure_tables import trust_tables
from trio.report.found_run import STOPPED, FoundRun, find_run
from trio.report.gallery_cards import JSON, Cards, cards_of, gallery_keys
from trio.report.headline import bottleneck_line, counted_in, tiles, unpruned
from trio.report.row_figures import RowFigures, row_figures
from trio.report.unit_figures import UnitFigures, unit_figures
from trio.tables import percent
from trio.version import VERSION

LABELS = {DONE: "finished", RUNNING: "running", FAILED: "failed", STOPPED: "stopped"}
TRIES = 3
"""Where files go while they are read, as units are put together."""
MOST_KINDS = 12
"""Of errors, that are told of."""


def page_of(place: str) -> str:
    """The page about the run in a directory.

    Raises:
        UserError: there is no such run, or its files are damaged.
        OSError: the storage does not answer.
    """
    for tried in range(1, TRIES + 1):
        try:
            return _page(find_run(place))
        except FileNotFoundError:
            if tried == TRIES:
                raise
    raise AssertionError


def _page(found: FoundRun) -> str:
    units = unit_figures(found)
    found = found.with_settings(len(units.by_setting))
    kinds = [kind for kind, _ in _by_count(units.totals.error_kinds)[:MOST_KINDS]]
    rows = row_figures(found, gallery_keys(found), kinds)
    return rendered(found, units, rows, cards_of(found, rows.of_gallery))


def rendered(found: FoundRun, units: UnitFigures, rows: RowFigures, cards: Cards) -> str:
    """The page's text."""
    errors = _errors(units, rows)
    groups = {
        "trust": sureness_charts(found, rows),
        "speed": speed_charts(units),
        "distributions": distribution_charts(found, rows),
    }
    return _template().render(
        title=_title(found),
        state=found.state,
        label=LABELS[found.state],
        status=_status(found, units),
        progress=_progress(found, units),
        made=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M UTC}",
        version=VERSION,
        place=found.output.uri,
        facts=_facts(found),
        tiles=tiles(found, units),
        unpruned=unpruned(found, units),
        bottleneck=bottleneck_line(units.totals),
        tables=trust_tables(found, units),
        metrics_error=found.metrics.get("error"),
        groups=groups,
        engines=units.engines,
        engine_count=units.engine_count,
        errors=errors[:MOST_KINDS],
        more_kinds=max(0, len(errors) - MOST_KINDS),
        extremes=_extremes(found, rows),
        several=len(found.names) > 1,
        names=list(found.names),
        card_count=len(cards.cards),
        left_out=cards.left_out,
        damaged=cards.damaged,
        gallery_on=bool(found.settings.get("gallery")),
        config=found.config,
        commands=_commands(found),
        data={
            "charts": {one.key: one.figure for group in groups.values() for one in group},
            "cards": cards.cards,
            "boxes": cards.boxes,
            "names": list(found.names),
            "again": _again(found),
        },
        style=_source("page.css"),
        script=_source("page.js"),
        plotly=Markup(get_plotlyjs()),
        notice=_notice(),
        charted=any(groups.values()),
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # What `tojson` writes of text has no <, > and &, so it ends no script.
    environment.policies["json.dumps_kwargs"] = dict(JSON)
    return environment.from_string(_source("page.html.j2"))


def _source(name: str) -> Markup:
    """A file of this package: like plotly's script it holds no text of a run."""
    return Markup((resources.files("trio.report") / name).read_text(encoding="utf-8"))


def _notice() -> Markup:
    """The licence that plotly's script asks to go with it, fit for a comment."""
    files = metadata.files("plotly") or []
    for file in files:
        if file.name == "LICENSE.txt" and "dist-info" in str(file):
            return Markup(file.read_text(encoding="utf-8").replace("--", "- -").strip())
    return Markup("MIT License, Copyright (c) Plotly Technologies Inc.")


def _title(found: FoundRun) -> str:
    what = "Answers" if found.job == "vqa.py" else "Captions"
    model = str(found.settings.get("model") or "").rstrip("/")
    if model.startswith(("/", "file:", ".")):
        model = model.rpartition("/")[2]
    return f"{what} by {model}" if model else what


def _status(found: FoundRun, units: UnitFigures) -> str:
    """In a sentence how the run stands; empty of a finished one."""
    if found.state == RUNNING:
        return "The run goes on: this page shows what was written when it was made."
    if found.state == FAILED:
        why = f": {found.why}" if found.why else ""
        return f"The run has ended before its last row{why}. The same command goes on from here."
    if found.state == STOPPED:
        return (
            "The run is not finished and nobody is at work here: it was stopped or killed. The"
            " same command goes on from here."
        )
    return "" if units.totals.rows else "The input has no rows."


def _progress(found: FoundRun, units: UnitFigures) -> Mapping[str, Any] | None:
    """Of a run that is not finished."""
    if found.state == DONE or not found.planned:
        return None
    done = units.totals.inputs
    return {
        "done": done,
        "of": found.planned,
        "text": f"{done:,} of {counted_in(found.planned, 'input row')}"
        f" ({percent(done / found.planned)})",
    }


def _facts(found: FoundRun) -> list[tuple[str, str]]:
    settings = found.settings
    asked = ", ".join(found.names)
    if len(found.names) == 1:
        for name in ("retention", "schedule"):
            if settings.get(name) is not None:
                asked += f", {name} {_short(settings[name])}"
    facts: list[tuple[str, Any]] = [
        ("asked with", asked),
        ("input", _listed(settings.get("input"))),
        ("ran on", found.summary.get("resources")),
        ("run", found.summary.get("run")),
    ]
    return [(name, _short(value)) for name, value in facts if value]


def _listed(value: Any) -> str | None:
    if isinstance(value, list):
        more = f" and {len(value) - 1} more" if len(value) > 1 else ""
        return f"{value[0]}{more}" if value else None
    return value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _errors(units: UnitFigures, rows: RowFigures) -> list[Mapping[str, Any]]:
    """Kinds with their counts, the most frequent first, and examples."""
    counts = dict(units.totals.error_kinds)
    for kind in rows.error_examples:
        counts.setdefault(kind, len(rows.error_examples[kind]))
    return [
        {"kind": kind, "count": f"{count:,}", "examples": rows.error_examples.get(kind, [])}
        for kind, count in _by_count(counts)
    ]


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _extremes(found: FoundRun, rows: RowFigures) -> list[Mapping[str, Any]]:
    def shown(heading: str, value: float) -> str:
        if "retention" in heading:
            return percent(value)
        return f"{value:.2f} s" if heading == "slowest" else f"{value:,.0f} tokens"

    return [
        {
            "heading": heading,
            "lines": [
                {
                    **row,
                    "value": shown(heading, value),
                    "name": found.names[row["setting"]] if len(found.names) > 1 else "",
                }
                for value, row in lines
            ],
        }
        for heading, lines in rows.extremes.items()
    ]


def _commands(found: FoundRun) -> Sequence[tuple[str, str]]:
    here = shlex.quote(found.output.uri)
    uploads = found.settings.get("push_to_hub")
    replaced = f"; it replaces the uploaded data set {uploads}" if uploads else ""
    made = [
        (f"the whole run once more{replaced}", _command(found, "--output NEW")),
        ("one row once more, by its number in the column row", _again(found)),
        ("this page anew", f"python jobs/report.py {here}"),
    ]
    if found.state != DONE:
        made.insert(0, ("go on with this run", _command(found, f"--output {here}")))
    return made


def _again(found: FoundRun) -> str:
    """One row again, as all rows were; ROW stands for its number."""
    return _command(found, "--only-row ROW --output NEW")


def _command(found: FoundRun, rest: str) -> str:
    """Jobs read settings from local files only."""
    config = "run.yaml"
    if found.output.local:
        config = shlex.quote(f"{found.output.uri.rstrip('/')}/{config}")
    return f"python jobs/{found.job} --config {config} {rest}"
