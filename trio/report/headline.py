"""The figures that stand first, and what the run would have cost unpruned. Text, no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trio.job.comparing.compared import UNPRUNED
from trio.job.output.summary import PHASES, duration
from trio.job.output.totals import Totals, ratio
from trio.report.figure_tables import bounds_text, figure_text
from trio.report.found_run import FoundRun
from trio.report.unit_figures import UnitFigures
from trio.tables import counted, percent

THOUSANDS = ("", "k", "M", "G", "T", "P", "E", "Z")
WHOLE = 0.005
"""Below it a ratio is as good as 1."""
AUDIT = "unpruned, for the audit"
ADVICE = {
    AUDIT: "Most time goes into asking rows unpruned as well: a smaller share of --audit takes"
    " less.",
    "waiting for images": "Engines wait for images: more CPUs to decode them (--prepare-cpus, or"
    " further nodes) would help, a faster engine would not.",
    "encoder": "Most time goes into the vision encoder, which pruning in the decoder leaves as it"
    " is; --encoder reduces what leaves it.",
    "prefill": "Most time goes into reading prompts: a lower retention makes it shorter.",
    "decode": "Most time goes into writing answers: shorter answers (--max-new-tokens) or more at a"
    " time (--max-running) help, fewer visual tokens hardly do.",
    "idle": "Engines had nothing to do for most of their time: fewer of them would do, or there"
    " were few rows.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A figure with its name and a line below."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Focus:
    """The setting that the figures of pruning are told of."""

    name: str | None
    """None: there is one setting, which needs no name."""
    totals: Totals
    measured: Totals | None
    """Of the unpruned model on the same rows; None where it was not asked."""


def focus_of(found: FoundRun, figures: UnitFigures) -> Focus:
    """The only setting, or of several the one that keeps least."""
    pairs = list(zip(found.names, figures.by_setting, strict=True))
    if len(pairs) == 1:
        return Focus(name=None, totals=figures.totals, measured=None)
    pruned = [pair for pair in pairs if pair[0] != UNPRUNED] or pairs
    name, totals = min(pruned, key=lambda pair: pair[1].retention or 1.0)
    measured = dict(pairs).get(UNPRUNED) if name != UNPRUNED else None
    return Focus(name=name, totals=totals, measured=measured)


def tiles(found: FoundRun, figures: UnitFigures) -> list[Tile]:
    """The headline figures, as far as there are any."""
    totals, focus = figures.totals, focus_of(found, figures)
    of = "" if focus.name is None else f"{focus.name}: "
    made = [_rows(found, totals), _errors(totals)]
    if (rate := _rate(found, figures)) is not None:
        made.append(rate)
    pruned = focus.totals
    if (kept := pruned.retention) is not None:
        made.append(
            Tile(
                label="Visual tokens kept",
                value=percent(kept),
                note=f"{of}mean over the decoder's layers",
            )
        )
    reading = ratio(pruned.reading_flops_unpruned, pruned.reading_flops)
    if reading is not None:
        alone = ratio(pruned.prefill_flops_unpruned, pruned.prefill_flops) or 1.0
        note = f"{of}encoder and choosing counted; decoder alone {_times(alone)}"
        made.append(Tile(label="FLOPs of prompts", value=_fewer(reading), note=note))
    kept_bytes = ratio(pruned.kv_bytes_unpruned, pruned.kv_bytes)
    if kept_bytes is not None:
        note = f"{of}{si(pruned.kv_bytes, 'B')} in all"
        made.append(Tile(label="KV cache", value=_fewer(kept_bytes), note=note))
    return made + _trust(found, focus)


def unpruned(found: FoundRun, figures: UnitFigures) -> list[str]:
    """What the same rows cost without pruning, in sentences; none where nothing was pruned."""
    focus = focus_of(found, figures)
    own = focus.totals
    fewer = ratio(own.reading_flops_unpruned, own.reading_flops)
    if fewer is None or fewer < 1 + WHOLE:
        return []
    lines = [
        f"Prompts would have taken {si(own.reading_flops_unpruned, 'FLOP')} instead of"
        f" {si(own.reading_flops, 'FLOP')}, vision encoder and choosing of tokens counted; keys and"
        f" values {si(own.kv_bytes_unpruned, 'B')} instead of {si(own.kv_bytes, 'B')}."
    ]
    if focus.measured is not None:
        lines.append(
            f"Measured in this run: engines worked {duration(_engine_s(focus.measured))} on the"
            f" unpruned setting and {duration(_engine_s(own))} on {focus.name}."
        )
    elif (estimate := _unpruned_s(own)) is not None:
        lines.append(
            f"At most: engines would have worked {duration(estimate)} instead of"
            f" {duration(_engine_s(own))}, if the time of prefill grew as the decoder's FLOPs do"
            " and all else stayed. A small model's grows less; --compare 1,given measures it."
        )
    return lines


def _engine_s(totals: Totals) -> float:
    return totals.encode_s + totals.prefill_s + totals.decode_s


def _unpruned_s(own: Totals) -> float | None:
    """Of engines' work, estimated; None where prefill took none."""
    fewer = ratio(own.prefill_flops_unpruned, own.prefill_flops)
    if fewer is None or not own.prefill_s:
        return None
    return own.encode_s + (own.prefill_s - own.prune_s) * fewer + own.decode_s


def bottleneck_line(totals: Totals) -> str | None:
    """Where most of the engines' time went, and what helps; None where none was spent."""
    spent = {phase: getattr(totals, name) for phase, name in PHASES.items()}
    spent["encoder"] -= totals.encode_saved_s
    spent[AUDIT] = totals.audit_s
    longest = max(spent, key=spent.__getitem__)
    part = ratio(spent[longest], sum(spent.values()))
    if part is None:
        return None
    name = "prefill with choosing" if longest == "prefill" and totals.prune_s else longest
    return f"Bottleneck: {name}, {100 * part:.0f} % of the engines' time. {ADVICE[longest]}"


def _rows(found: FoundRun, totals: Totals) -> Tile:
    note = ""
    if found.planned is not None:
        note = f"of {counted_in(found.planned, 'input row')}"
        if totals.inputs != found.planned:
            note = f"{totals.inputs:,} {note} done"
        elif totals.rows != totals.inputs:
            note = f"{counted_in(found.planned, 'input row')}, each answered several times"
    return Tile(label="Rows written", value=f"{totals.rows:,}", note=note)


def _errors(totals: Totals) -> Tile:
    if not totals.errors:
        return Tile(label="Errors", value="0", note="every row has an answer" * bool(totals.rows))
    kind, count = max(totals.error_kinds.items(), key=lambda item: item[1], default=("", 0))
    note = f"{percent(totals.error_rate)} of the rows"
    if kind:
        note += f", most often {kind} ({count:,})"
    return Tile(label="Errors", value=f"{totals.errors:,}", note=note)


def _rate(found: FoundRun, figures: UnitFigures) -> Tile | None:
    """As the run itself has measured it, else over the time that statistics span."""
    summary, totals = found.summary, figures.totals
    images, tokens, note = summary.get("images_per_s"), summary.get("output_tokens_per_s"), ""
    if not images and figures.began is not None and figures.ended is not None:
        span = figures.ended - figures.began
        if span > 0:
            images, tokens = totals.images / span, totals.output_tokens / span
            note = ", over the time that units span"
    if totals.rows != totals.inputs:
        note += "; an image counts once for each answer"
    if not images:
        return None
    value = f"{images:,.2f}" if images < 100 else f"{images:,.0f}"
    return Tile(label="Images / s", value=value, note=f"{tokens or 0:,.0f} output tokens / s{note}")


def _trust(found: FoundRun, focus: Focus) -> list[Tile]:
    """Score and agreement, where the run has them."""
    made = []
    settings: Sequence[Mapping[str, Any]] = found.metrics.get("settings") or []
    if settings and (name := settings[-1].get("headline")):
        one = settings[-1]
        figure = (one.get("figures") or {}).get(name) or {}
        if figure.get("value") is not None:
            of = f"{one['name']}: " if len(settings) > 1 else ""
            words = dict.fromkeys(word for word in (one.get("metric"), name) if word)
            made.append(
                Tile(
                    label=" ".join(words).replace("_", " "),
                    value=figure_text(name, {"value": figure["value"]}),
                    note=f"{of}95 % interval {bounds_text(name, figure)}",
                )
            )
    elif not settings:
        made += _mean_score(found, focus)
    agreement = (found.summary.get("audit") or {}).get("agreement")
    if agreement is not None:
        bounds = bounds_text("agreement", agreement)
        note = f"of {agreement['rows']:,} audited, 95 % interval {bounds}"
        made.append(Tile(label="Answers as unpruned", value=percent(agreement["value"]), note=note))
    return made


def _mean_score(found: FoundRun, focus: Focus) -> list[Tile]:
    """Of the focus: a mean over several settings is nobody's score."""
    summary: Mapping[str, Any] = found.summary
    if focus.name is not None:
        parts = summary.get("settings") or []
        summary = next((one for one in parts if one["name"] == focus.name), {})
    if summary.get("accuracy") is None:
        return []
    of = "" if focus.name is None else f"{focus.name}: "
    note = f"{of}of {summary.get('scored') or 0:,} rows"
    return [Tile(label="Mean score", value=percent(summary["accuracy"]), note=note)]


def _times(value: float) -> str:
    return f"{value:.1f}×" if value >= 1 + WHOLE else "as unpruned"


def _fewer(value: float) -> str:
    if value < 1 - WHOLE:
        return f"{1 / value:.2f}× more"
    return f"{value:.1f}× fewer" if value >= 1 + WHOLE else "as unpruned"


def counted_in(number: int, noun: str) -> str:
    """As `trio.tables.counted`, with the thousands apart."""
    return counted(number, noun).replace(str(number), f"{number:,}", 1)


def si(value: float, unit: str) -> str:
    """As in ``4.2 TFLOP``, three digits."""
    place = 0
    while value >= 999.5 and place < len(THOUSANDS) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {THOUSANDS[place]}{unit}"
