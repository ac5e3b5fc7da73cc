"""Scores, comparison and audit as tables of text: cells of a head and of lines. No HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trio.job.output.summary import duration
from trio.job.output.totals import Totals, ratio
from trio.report.found_run import FoundRun
from trio.report.unit_figures import UnitFigures
from trio.tables import percent

MOST_GROUPS = 60
"""Lines of the table of groups."""
OWN_SCALE = ("total", "cider", "points")
"""Figures that are no shares."""
NONE = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The first column names the line; all others are figures."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""


def trust_tables(found: FoundRun, figures: UnitFigures) -> list[Table]:
    """Whether the answers can be trusted, as far as the run tells."""
    made = []
    if len(found.names) > 1:
        made.append(_cost(found, figures))
    settings: Sequence[Mapping[str, Any]] = found.metrics.get("settings") or []
    if settings and any(one.get("headline") or one.get("comparison") for one in settings):
        made.append(_scores(settings, found.summary.get("settings") or []))
        made += filter(None, [_figures(settings), _groups(settings), _calibration(settings)])
    if found.summary.get("audit"):
        made.append(_audit(found.summary["audit"]))
    return made


def _cost(found: FoundRun, figures: UnitFigures) -> Table:
    lines = [
        _cost_line(name, totals)
        for name, totals in zip(found.names, figures.by_setting, strict=True)
    ]
    return Table(
        title="What each setting took",
        head=(
            "setting", "rows", "errors", "visual tokens kept", "FLOPs of prompts, fewer",
            "KV cache, smaller", "engines' time", "images / s of an engine",
        ),
        lines=lines,
        note="FLOPs with encoder and choosing of tokens. Times as if a setting were alone.",
    )  # fmt: skip


def _cost_line(name: str, totals: Totals) -> list[str]:
    engine_s = totals.encode_s + totals.prefill_s + totals.decode_s
    rate = ratio(totals.images, engine_s)
    return [
        name,
        f"{totals.rows:,}",
        f"{totals.errors:,}",
        percent(totals.retention),
        _times(ratio(totals.reading_flops_unpruned, totals.reading_flops)),
        _times(ratio(totals.kv_bytes_unpruned, totals.kv_bytes)),
        duration(engine_s),
        NONE if rate is None else f"{rate:.3g}",
    ]


def _scores(settings: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]) -> Table:
    accuracies = {one["name"]: one.get("accuracy") for one in summaries}
    lines = []
    for one in settings:
        score = figure_text(
            one.get("headline"), (one.get("figures") or {}).get(one.get("headline"))
        )
        if score == NONE:  # of captions that were compared with answers
            score = percent(accuracies.get(one["name"]))
        comparison = one.get("comparison") or {}
        found = comparison.get("headline") or {}
        same = comparison.get("agreement") or {}
        changed = NONE
        if found.get("only_unpruned") is not None:
            changed = f"{found['only_unpruned']} / {found['only_pruned']}"
        lines.append(
            [
                one["name"],
                score,
                percent(found.get("relative"), found.get("relative_interval")),
                _points(found),
                changed,
                percent(same.get("value"), same.get("interval")),
            ]
        )
    head: Sequence[str] = (
        "setting", "score", "relative to unpruned", "difference in points",
        "right only unpruned / only pruned", "same answer as unpruned",
    )  # fmt: skip
    lines, head = _without_empty(lines, head)
    return Table(
        title="Scores",
        head=head,
        lines=lines,
        note="In brackets 95 % intervals; those beside the unpruned model are paired.",
    )


def _without_empty(
    lines: list[list[str]], head: Sequence[str]
) -> tuple[list[list[str]], Sequence[str]]:
    kept = [place for place in range(len(head)) if any(line[place] != NONE for line in lines)]
    return [[line[place] for place in kept] for line in lines], [head[place] for place in kept]


def _figures(settings: Sequence[Mapping[str, Any]]) -> Table | None:
    """All figures but the headline, a line for each."""
    names = list(dict.fromkeys(name for one in settings for name in one.get("figures") or {}))
    if len(names) < 2:
        return None
    lines = [
        [name.replace("_", " "), *(figure_text(name, one["figures"].get(name)) for one in settings)]
        for name in names
    ]
    return Table(
        title="All figures", head=("figure", *(one["name"] for one in settings)), lines=lines
    )


def _groups(settings: Sequence[Mapping[str, Any]]) -> Table | None:
    keys = [
        (column, value)
        for column, values in (settings[0].get("groups") or {}).items()
        for value in values
    ]
    if not keys:
        return None
    lines = []
    for column, value in keys[:MOST_GROUPS]:
        line = [f"{column}: {value}"]
        for one in settings:
            group = one["groups"].get(column, {}).get(value) or {}
            name = one.get("headline")
            shown = figure_text(name, (group.get("figures") or {}).get(name))
            line.append(f"{shown} of {group['n']}" if group else NONE)
        lines.append(line)
    left = len(keys) - len(lines)
    return Table(
        title="By group",
        head=("group", *(one["name"] for one in settings)),
        lines=lines,
        note=f"{left} more groups stand in metrics.json." if left else "",
    )


def _calibration(settings: Sequence[Mapping[str, Any]]) -> Table | None:
    lines = [
        [one["name"], f"{one['calibration']['n']:,}", percent(one["calibration"]["ece"])]
        for one in settings
        if one.get("calibration")
    ]
    if not lines:
        return None
    return Table(
        title="Calibration",
        head=("setting", "rows", "expected calibration error"),
        lines=lines,
        note="How far the share right is from how sure the model was, over 15 bins.",
    )


def _audit(audit: Mapping[str, Any]) -> Table:
    found, floor = audit.get("agreement"), audit.get("noise_floor")
    lines = [["rows asked unpruned as well", f"{audit['rows']:,} of {audit['of_rows']:,}"]]
    if found is not None:
        lines.append(["answers that stay the same", percent(found["value"], found["interval"])])
    if floor is not None:
        same = percent(floor["value"], floor["interval"])
        lines.append(["the unpruned model twice, in other batches", f"{same} of {floor['rows']}"])
    for label, name in (
        ("tokens in common", "overlap"),
        ("the unpruned model's own next token", "top1"),
    ):
        if audit.get(name) is not None:
            lines.append([label, percent(audit[name])])
    if audit.get("kl") is not None:
        lines.append(["KL divergence of the first token", f"{audit['kl']:.4f} nats"])
    if audit.get("not_auditable"):
        lines.append(["not auditable", f"{audit['not_auditable']:,}"])
    return Table(
        title="Audit",
        head=("", "figure"),
        lines=lines,
        note="In brackets 95 % intervals, for all answered rows of the run.",
    )


def figure_text(name: str | None, figure: Mapping[str, Any] | None) -> str:
    """A figure of ``metrics.json`` with its interval: shares as percentages, others as they are."""
    if name is None or figure is None or figure.get("value") is None:
        return NONE
    value, interval = figure["value"], figure.get("interval")
    if _own_scale(name, value):
        return f"{value:.4g}{_bounds(interval, '.4g')}"
    return percent(value, interval)


def bounds_text(name: str, figure: Mapping[str, Any]) -> str:
    """Its interval alone, in words."""
    interval = figure.get("interval")
    if interval is None:
        return "unknown"
    if _own_scale(name, figure["value"]):
        return f"{interval[0]:.4g} to {interval[1]:.4g}"
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _own_scale(name: str, value: float) -> bool:
    return name in OWN_SCALE or not 0 <= value <= 1


def _points(found: Mapping[str, Any]) -> str:
    value = found.get("difference_points")
    if value is None:
        return NONE
    return f"{value:+.1f}{_bounds(found.get('difference_points_interval'), '+.1f')}"


def _bounds(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" [{', '.join(format(one, form) for one in interval)}]"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"
