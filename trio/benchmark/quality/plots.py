"""What settings keep over what they cost, as a picture. matplotlib is an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trio.benchmark.quality.quality_table import FROM_START, share
from trio.errors import UserError

PARTS = ("questions", "captions")
RETENTION, FLOPS = AXES = ("retention", "FLOPs")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ASIDE = 0.008
"""Settings of one retention stand so much beside each other."""
ALONE = "encoder alone"
Line = tuple[str, str]
"""What the decoder prunes with, and the encoder."""


def check(path: Path) -> None:
    """Raise UserError unless a picture can be drawn and written there."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "--plot needs matplotlib: pip install 'trio-vlm[plot]', or in a clone "
            "pip install -e '.[plot]'"
        )
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: name a .png file in a directory that is there")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Right answers over the unpruned model's, with 95 % intervals: over retention and over all
    FLOPs of reading a prompt, questions and captions apart, an encoder in each column.

    Args:
        rows: of the JSON file, in any order.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    lines = _lines(rows)
    if not lines:
        raise UserError(f"--plot {path}: there is no pruned setting to draw")
    encoders = list(dict.fromkeys(encoder for _, encoder in lines))
    methods = list(dict.fromkeys(method for method, _ in lines))
    looks = {method: (f"C{n % 10}", MARKERS[n % len(MARKERS)]) for n, method in enumerate(methods)}
    kinds = [(part, axis) for part in PARTS for axis in AXES]
    figure = Figure(figsize=(2 + 4 * len(encoders), 13), layout="constrained")
    panels = figure.subplots(len(kinds), len(encoders), sharey="row", squeeze=False)
    for (part, axis), row_of_panels in zip(kinds, panels, strict=True):
        row_of_panels[0].set_ylabel(f"{part}: right, % of unpruned")
        for encoder, panel in zip(encoders, row_of_panels, strict=True):
            panel.set_title(f"encoder {encoder}, over {axis}", fontsize="medium")
            panel.axhline(100, color="0.6", linewidth=0.8)
            panel.grid(alpha=0.25)
            own = {method: line for (method, of), line in lines.items() if of == encoder}
            for number, (method, line) in enumerate(own.items()):
                aside = 1 + ASIDE * (number - len(own) / 2) if axis == RETENTION else 1.0
                colour, marker = looks[method]
                panel.errorbar(
                    [_place(row, axis) * aside for row in line],
                    *_heights([row[part] for row in line]),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    elinewidth=0.7,
                    capsize=2,
                )
            _name_places(panel, axis, rows)
    _add_legend(figure, looks)
    figure.savefig(path, dpi=100)


def _place(row: Mapping[str, Any], axis: str) -> float:
    return float(row["retention"] if axis == RETENTION else row["flops"]["total"] / 1e9)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[Line, list[Mapping[str, Any]]]:
    """The pruned settings that differ in retention alone, the most kept first."""
    lines: dict[Line, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["retention"], row["number"])):
        if row["number"] == 0:
            continue
        method = row["label"].removeprefix(row["encoder"]).removeprefix(" + ").strip()
        method = method.removesuffix(FROM_START)
        relative = (row[part]["relative"] for part in PARTS)
        if None not in relative:
            lines.setdefault((method or ALONE, row["encoder"]), []).append(row)
    return lines


def _heights(scores: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Per cent, and the interval's reach below and above."""
    heights = [100 * score["relative"] for score in scores]
    ends = zip(*(score["relative_interval"] for score in scores), strict=True)
    reach = [
        [max(0.0, sign * (100 * end - height)) for end, height in zip(side, heights, strict=True)]
        for sign, side in zip((-1, 1), ends, strict=True)
    ]
    return heights, reach


def _name_places(panel: Any, axis: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if axis == RETENTION:
        retentions = sorted({row["retention"] for row in rows if row["number"]})
        panel.set_xscale("log")
        panel.set_xticks(retentions, [share(value) for value in retentions])
        panel.minorticks_off()
        panel.set_xlabel("visual tokens kept, average over the layers")
    else:
        panel.set_xlabel("GFLOPs to read a prompt: decoder, encoder, choosing")


def _add_legend(figure: Any, looks: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, label=method)
        for method, (colour, marker) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles) or 1))
