"""What settings keep over what they cost, as a picture. matplotlib is an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trio.benchmark.quality_table import share
from trio.errors import UserError

PARTS = ("questions", "captions")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Line and marker of each encoder in turn."""
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
    FLOPs of reading a prompt; questions and captions apart.

    Args:
        rows: of the JSON file, in any order.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(len(PARTS), 2, sharey="row", sharex="col")
    lines = _lines(rows)
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(m for m, _ in lines))}
    encoders = dict.fromkeys(encoder for _, encoder in lines)
    styles = {encoder: STYLES[i % len(STYLES)] for i, encoder in enumerate(encoders)}
    for part, (by_retention, by_flops) in zip(PARTS, panels, strict=True):
        by_retention.set_ylabel(f"{part}: right, % of unpruned")
        for panel, places in (
            (by_retention, lambda row: row["retention"]),
            (by_flops, lambda row: row["flops"]["total"] / 1e9),
        ):
            panel.axhline(100, color="0.6", linewidth=0.8)
            panel.grid(alpha=0.25)
            for number, ((method, encoder), own) in enumerate(lines.items()):
                line, marker = styles[encoder]
                aside = 1 + ASIDE * (number - len(lines) / 2) if panel is by_retention else 1.0
                panel.errorbar(
                    [places(row) * aside for row in own],
                    *_heights([row[part] for row in own]),
                    color=colours[method],
                    linestyle=line,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    elinewidth=0.7,
                    capsize=2,
                )
    _name_places(panels[-1], rows)
    _add_legend(figure, colours, styles)
    figure.savefig(path, dpi=120)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[Line, list[Mapping[str, Any]]]:
    """The pruned settings that differ in retention alone, the most kept first."""
    lines: dict[Line, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["retention"], row["number"])):
        if row["number"] == 0:
            continue
        method = row["label"].removeprefix(row["encoder"]).removeprefix(" + ").strip()
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


def _name_places(panels: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    by_retention, by_flops = panels
    retentions = sorted({row["retention"] for row in rows if row["number"]})
    by_retention.set_xscale("log")
    by_retention.set_xticks(retentions, [share(value) for value in retentions])
    by_retention.minorticks_off()
    by_retention.set_xlabel("visual tokens kept, average over the layers")
    by_flops.set_xlabel("GFLOPs to read a prompt: decoder, encoder, choosing")


def _add_legend(
    figure: Any, colours: Mapping[str, str], styles: Mapping[str, tuple[str, str]]
) -> None:
    """Colours for methods, lines for encoders."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if len(styles) > 1:
        handles += [
            Line2D([], [], color="0.3", linestyle=line, marker=marker, label=f"encoder: {name}")
            for name, (line, marker) in styles.items()
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles) or 1))
