"""Charts of a run as plotly figures, without colours of their own: the page gives them its theme.

INPUT figures; OUTPUT objects for JSON, a few hundred numbers each.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from trio.job.output.summary import phases
from trio.report.found_run import FoundRun
from trio.report.headline import AUDIT
from trio.report.histogram import Histogram
from trio.report.row_figures import RowFigures, SettingFigures
from trio.report.unit_figures import LINES, UnitFigures
from trio.vqa.intervals import wilson_interval

HEIGHT = 280
"""Pixels."""
LEAST = 20
"""Answers of a bin of `sureness`, below which its share is not drawn."""
ASKED = {
    "score": ("Score, by how sure", "Mean score of answers"),
    "audit": ("As unpruned, by how sure (audit)", "Share of audited answers that stay the same"),
    "compare": ("As unpruned, by how sure", "Share of answers that are the unpruned model's"),
}
"""By what sureness is held against: a title, and what is drawn."""
LABELS = {"wait": "wait for images", "choose": "choose tokens", "audit": AUDIT}
"""Of phases that are not told of by their names."""
LEAST_WIDTH = 1 / 80
"""Of an axis; a narrower bar is not seen and is drawn this wide."""
FEW_DECADES = 2.5
"""Up to which a logarithmic axis of seconds has three ticks in each."""
AXIS = {"title": {"text": ""}, "automargin": True, "fixedrange": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure with what it says."""

    key: str
    """Of its place in the page."""
    title: str
    note: str
    figure: dict[str, Any]
    """`data` and `layout`, as plotly.js takes them."""
    wide: bool = False
    """Whether it takes a line of its own."""


def speed_charts(figures: UnitFigures) -> list[Chart]:
    """The rate over time, and where the engines' time went."""
    return [one for one in (_throughput(figures), _phases(figures)) if one is not None]


def _throughput(figures: UnitFigures) -> Chart | None:
    if not len(figures.edges):
        return None
    moments = [
        datetime.datetime.fromtimestamp(edge, datetime.UTC).replace(tzinfo=None)
        for edge in figures.edges[:-1].tolist()
    ]
    data = [
        go.Scatter(
            x=moments,
            y=np.round(one.rate, 4).tolist(),
            name=name,
            mode="lines",
            line={"width": 1, "shape": "hv"},
            stackgroup="rate",
            hovertemplate="%{y:.3g} images/s",
        )
        for one, name in zip(
            figures.rates, _short_names([one.name for one in figures.rates]), strict=True
        )
    ]
    more = max(0, figures.engine_count - LINES)
    note = "Images answered per second, engines on top of each other. UTC."
    if more:
        note += f" {more} engines are drawn as one."
    return _chart(
        "throughput", "Throughput over time", note, data,
        yaxis={"rangemode": "tozero", "title": {"text": "images / s"}},
        hovermode="x unified", wide=True, showlegend=len(data) > 1,
    )  # fmt: skip


def _short_names(names: Sequence[str]) -> Sequence[str]:
    """Of engines, without what their run is called, where that tells none apart."""
    short = [name[max(0, name.find("pass ")) :] for name in names]
    return short if len(set(short)) == len(names) else names


def _phases(figures: UnitFigures) -> Chart | None:
    found = phases(figures.totals).items()
    spent = [(LABELS.get(phase, phase), seconds) for phase, seconds in found if seconds > 0]
    whole = sum(seconds for _, seconds in spent)
    if not whole:
        return None
    lines = [(name, seconds, f"{100 * seconds / whole:.0f} %") for name, seconds in spent]
    if (prepare := figures.totals.prepare_s) > 0:
        lines.insert(0, ("read and prepare", prepare, "on other CPUs"))
    names, seconds, texts = zip(*lines, strict=True)
    bars = go.Bar(
        x=[float(f"{one:.4g}") for one in seconds],
        y=names,
        text=texts,
        textposition="auto",
        orientation="h",
        hovertemplate="%{y}: %{x:,} s<extra></extra>",
        marker={"opacity": [0.75 if name == "read and prepare" else 1.0 for name in names]},
    )
    return _chart(
        "phases", "Time by phase", "Seconds, summed over engines.", [bars],
        height=60 + 34 * len(lines), wide=True, bargap=0.3,
        xaxis={"ticksuffix": " s"}, yaxis={"autorange": "reversed"},
    )  # fmt: skip


def distribution_charts(found: FoundRun, rows: RowFigures) -> list[Chart]:
    """Visual tokens, retention, lengths and latency."""
    made = [_visual_tokens(found, rows), _by_stage(found, rows)]
    for key, title, note, name in (
        ("retention", "Retention", "Visual tokens present, averaged over the layers.", "retention"),
        ("prompts", "Prompt length", "Tokens, all visual tokens included.", "prompts"),
        ("answers", "Answer length", "Tokens of the answer.", "answers"),
        ("latency", "Latency", "Seconds from entering the engine to the last token.", "latency"),
    ):
        pairs = [
            (label, getattr(one, name))
            for label, one in zip(found.names, rows.settings, strict=True)
        ]
        # Prompts are the same in all settings.
        made.append(_histogram(key, title, note, pairs[:1] if key == "prompts" else pairs))
    return [one for one in made if one is not None]


def _visual_tokens(found: FoundRun, rows: RowFigures) -> Chart | None:
    before: list[tuple[str, Histogram]] = [("before", rows.settings[0].before)]
    several = len(found.names) > 1
    after = [
        (f"after, {name}" if several else "after", one.after)
        for name, one in zip(found.names, rows.settings, strict=True)
        if not np.array_equal(one.after.counts, one.before.counts)
    ]
    note = "Of each prompt, from the vision encoder and after the last pruning stage."
    return _histogram("visual", "Visual tokens before and after", note, before + after)


def _by_stage(found: FoundRun, rows: RowFigures) -> Chart | None:
    lines = [
        (name, one.by_stage)
        for name, one in zip(found.names, rows.settings, strict=True)
        if len(one.by_stage) > 1
    ]
    if not any(len(means) > 2 or means[1] < means[0] for _, means in lines):
        return None
    data = [
        go.Scatter(
            x=_stage_names(means),
            y=[round(mean, 2) for mean in _shown(means)],
            name=name,
            mode="lines+markers",
            line={"shape": "hv"},
            hovertemplate="%{x}: %{y:.1f} tokens",
        )
        for name, means in lines
    ]
    return _chart(
        "stages", "Visual tokens by stage", "Means over the rows.", data,
        yaxis={"rangemode": "tozero"}, xaxis={"type": "category"}, showlegend=len(data) > 1,
    )  # fmt: skip


def _shown(means: Sequence[float]) -> Sequence[float]:
    """Without what enters the decoder, where no encoder's reduction changed it."""
    return means if means[1] < means[0] else [means[0], *means[2:]]


def _stage_names(means: Sequence[float]) -> list[str]:
    first = ["encoder", "reduced"] if means[1] < means[0] else ["encoder"]
    return first + [f"stage {number}" for number in range(1, len(means) - 1)]


def _histogram(
    key: str, title: str, note: str, parts: Sequence[tuple[str, Histogram]]
) -> Chart | None:
    parts = [(name, one) for name, one in parts if one.n]
    if not parts:
        return None
    axis: dict[str, Any] = {}
    data = []
    drawn = [(name, one.bars()) for name, one in parts]
    ends = [end for _, bars in drawn for end in (bars.middle[0], bars.middle[-1])]
    span = max(ends) - (0 if key == "retention" else min(ends))
    for name, bars in drawn:
        places, width = bars.middle, np.maximum(bars.width, span * LEAST_WIDTH)
        if bars.log:  # plotly has no equally wide bars on its logarithmic axes
            places, width = np.log10(bars.middle), bars.width
        data.append(
            go.Bar(
                x=[float(f"{value:.5g}") for value in places.tolist()],
                y=bars.count.tolist(),
                width=[float(f"{value:.5g}") for value in width.tolist()],
                customdata=[f"{value:.3g}" for value in bars.middle.tolist()],
                name=name,
                opacity=1.0 if len(parts) == 1 else 0.65,
                hovertemplate="%{customdata}: %{y:,} rows",
            )
        )
    if drawn[0][1].log:
        axis = _seconds_axis(ends)
    if key == "retention":
        axis = {"range": [0, 1.03 if span > 0.9 else 1.25 * span]}
    told = [
        f"Median {one.quantile(0.5):.4g}, 95 % up to {one.quantile(0.95):.4g}"
        + (f" ({name})" if len(parts) > 1 else "")
        for name, one in parts
    ]
    note = f"{note} {'; '.join(told)}."
    return _chart(
        key, title, note, data,
        barmode="overlay", bargap=0.04, showlegend=len(data) > 1,
        xaxis=axis,
        yaxis={"title": {"text": "rows"}},
    )  # fmt: skip


def _seconds_axis(ends: Sequence[float]) -> dict[str, Any]:
    """Ticks at round numbers, by their logarithms; `ends`: seconds that are drawn."""
    first, last = np.log10(min(ends)), np.log10(max(ends))
    low, high = int(np.floor(first)), int(np.ceil(last))
    steps = (1, 2, 5) if last - first < FEW_DECADES else (1,)
    ticks = [step * 10.0**decade for decade in range(low, high + 1) for step in steps]
    return {
        "tickvals": [round(float(np.log10(tick)), 4) for tick in ticks],
        "ticktext": [f"{tick:g} s" if tick >= 0.1 else f"{1000 * tick:g} ms" for tick in ticks],
    }


def sureness_charts(found: FoundRun, rows: RowFigures) -> list[Chart]:
    """Whether answers that the model is surer of are right, or as unpruned, more often."""
    made = []
    for asked, (title, share) in ASKED.items():
        lines = [
            (name, one)
            for name, one in zip(found.names, rows.settings, strict=True)
            if (one.sureness.n.get(asked, np.zeros(1)) >= LEAST).sum() > 1
        ]
        if not lines:
            continue
        data = [_sureness(name, one, asked) for name, one in lines]
        margin = lines[0][1].sureness.of == "margin"
        by = (
            "the distance to the second best candidate"
            if margin
            else "the geometric mean of the answer tokens' probabilities"
        )
        note = (
            f"{share}, by {by}, with 95 % intervals (Wilson). Bins of fewer than {LEAST} answers"
            " are left out."
        )
        axis = "margin [nats]" if margin else "mean probability of the answer's tokens"
        chart = _chart(
            f"sure-{asked}", title, note, data,
            yaxis={"range": [0, 1.03], "tickformat": ".0%"},
            xaxis={"title": {"text": axis}, "type": "category" if margin else "linear"},
            showlegend=len(data) > 1,
        )  # fmt: skip
        made.append(chart)
    return made


def _sureness(name: str, one: SettingFigures, asked: str) -> go.Scatter:
    sure = one.sureness
    n, hits = sure.n[asked], np.minimum(sure.hits[asked], sure.n[asked])
    there = np.flatnonzero(n >= LEAST)
    shares = hits[there] / n[there]
    bounds = [wilson_interval(float(hits[place]), float(n[place])) for place in there]
    low, high = np.array([b[0] for b in bounds]), np.array([b[1] for b in bounds])
    places: list[Any] = [
        round(float(sure.edges[place] + sure.edges[place + 1]) / 2, 3) for place in there
    ]
    if sure.of == "margin":
        places = [_span(sure.edges[place], sure.edges[place + 1]) for place in there]
    return go.Scatter(
        x=places,
        y=np.round(shares, 4).tolist(),
        error_y={
            "type": "data",
            "array": np.round(np.maximum(high - shares, 0), 4).tolist(),
            "arrayminus": np.round(np.maximum(shares - low, 0), 4).tolist(),
            "thickness": 1,
        },
        customdata=[f"{int(n[place]):,}" for place in there],
        name=name,
        mode="lines+markers",
        hovertemplate="%{y:.1%} of %{customdata}",
    )


def _span(low: float, high: float) -> str:
    return f"{low:g}–{high:g}" if np.isfinite(high) else f"above {low:g}"


def _chart(
    key: str, title: str, note: str, data: Sequence[Any], *, wide: bool = False, **layout: Any
) -> Chart:
    axes = {name: AXIS | layout.pop(name, {}) for name in ("xaxis", "yaxis")}
    figure = go.Figure(
        data=list(data),
        layout={
            "template": "none",
            "height": HEIGHT,
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "traceorder": "normal",
            },
            "dragmode": False,
            **axes,
            **layout,
        },
    )
    # Its JSON, not its Python: numbers of numpy and times are plain there.
    return Chart(key=key, title=title, note=note, figure=json.loads(figure.to_json()), wide=wide)
