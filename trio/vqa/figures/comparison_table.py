"""Settings of a run beside each other, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trio.tables import markdown, percent

_HEAD = (
    "setting",
    "score",
    "relative score",
    "difference in points",
    "right only unpruned / only pruned",
)
_OPTIONAL = {"retention": "visual tokens kept", "images_per_s": "images/s"}
_OWN_SCALE = ("total", "cider", "points")
_NONE = "–"


def comparison_table(settings: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table, a line per setting.

    Args:
        settings: their names, and what `run_metrics` gives of them, with `comparison` (of
            `compare_metrics`), `retention` (0 to 1) and `images_per_s` where they are known; a
            column that no setting has is left out.
    """
    extra = [key for key in _OPTIONAL if any(one.get(key) is not None for _, one in settings)]
    lines = [[*_HEAD, *(_OPTIONAL[key] for key in extra)]]
    for name, one in settings:
        found = (one.get("comparison") or {}).get("headline") or {}
        lines.append(
            [
                name.replace("|", r"\|"),
                _score(one),
                percent(found.get("relative"), found.get("relative_interval")),
                _points(found),
                _changed(found),
                *(_extra(key, one.get(key)) for key in extra),
            ]
        )
    return markdown(lines)


def _score(one: Mapping[str, Any]) -> str:
    name = one.get("headline")
    figure = one.get("figures", {}).get(name)
    if figure is None:
        return _NONE
    if name in _OWN_SCALE:
        return f"{name} {figure['value']:.4g}{_bounds(figure['interval'], 1, '.4g')}"
    return f"{name} {percent(figure['value'], figure['interval'])}"


def _points(found: Mapping[str, Any]) -> str:
    if (value := found.get("difference_points")) is None:
        return _NONE
    return f"{value:+.1f}{_bounds(found['difference_points_interval'], 1, '+.1f')}"


def _bounds(interval: Sequence[float] | None, times: float, form: str) -> str:
    if interval is None:
        return ""
    return f" [{', '.join(format(times * bound, form) for bound in interval)}]"


def _changed(found: Mapping[str, Any]) -> str:
    if found.get("only_unpruned") is None:
        return _NONE
    return f"{found['only_unpruned']} / {found['only_pruned']}"


def _extra(key: str, value: float | None) -> str:
    if value is None:
        return _NONE
    return percent(value) if key == "retention" else f"{value:.3g}"
