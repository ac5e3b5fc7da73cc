"""The figures of `trio.benchmark.quality.comparison` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from trio.demo.scenes import KINDS
from trio.tables import aligned, markdown

NOTE = (
    "±: half a 95 % interval. %: right answers over those of the unpruned model on the same "
    "requests, with a 95 % interval by bootstrap over scenes; where that has no width, those still "
    "right of those that the unpruned model gets right, with Wilson's interval. agree, overlap, KL "
    "(nats): with the unpruned model's own answers. FLOPs: unpruned over pruned, encoder and "
    "choosing included. "
    "own: share of choosing in the time of encoder and prefill."
)
FROM_START = " from layer 0"
"""Behind the label of a setting whose first stage had to be brought forward."""
QUESTIONS = tuple(kind for kind in KINDS if kind != "caption")
HEAD = (
    "setting",
    "kept",
    "all",
    "±",
    "%, of unpruned",
    "%, questions",
    "%, captions",
    *QUESTIONS,
    "objects",
    "agree",
    "overlap",
    "KL",
    "FLOPs",
    "ms/image",
    "own",
)


def table(rows: Sequence[Mapping[str, Any]], *, as_markdown: bool = False) -> str:
    """One line per setting, the most kept first.

    Args:
        rows: of the JSON file, in any order.
        as_markdown: for a README; otherwise aligned text with a gap between retentions.
    """
    ordered = sorted(rows, key=lambda row: (-row["retention"], row["number"]))
    lines = [list(HEAD), *map(_line, ordered)]
    if as_markdown:
        return markdown(lines)
    text = aligned(lines).splitlines()
    out = text[:1]
    for place, (row, line) in enumerate(zip(ordered, text[1:], strict=True)):
        if place and row["retention"] != ordered[place - 1]["retention"]:
            out.append("")
        out.append(line)
    return "\n".join(out)


STAGES_HEAD = (
    "setting",
    "kept",
    "stages",
    "unlike + filled up",
    "questions, %",
    "still right",
    "captions, %",
    "still right",
    "how many",
    "FLOPs",
    "choosing, ms",
)
STAGES_NOTE = (
    "stages: layer:tokens kept of the largest image. unlike + filled up: of the tokens that stay "
    "after each stage, those that the suppression of near-duplicates left (TRIO's own) and those "
    "that made up the number, means per image. %: as above. still right: of those that the "
    "unpruned model gets right, with Wilson's 95 % interval. how many: right of all. choosing: "
    "per request."
)


def stages_table(rows: Sequence[Mapping[str, Any]], *, as_markdown: bool = False) -> str:
    """What schedules keep, one line per setting.

    Args: as of `table`.
    """
    ordered = sorted(rows, key=lambda row: (-row["retention"], row["number"]))
    lines = [list(STAGES_HEAD), *map(_stages_line, ordered)]
    return markdown(lines) if as_markdown else aligned(lines)


def _stages_line(row: Mapping[str, Any]) -> list[str]:
    filled, count = row["fill_up_share"], row["by_kind"]["count"]
    parts = zip(filled["suppressed_to"], filled["filled_up"], strict=True) if filled else ()
    return [
        row["label"],
        share(row["retention"]),
        (row["schedule"] or "").replace(",", ", "),
        ", ".join(f"{unlike:.1f} + {more:.1f}" for unlike, more in parts),
        *(
            cell
            for part in ("questions", "captions")
            for cell in (_relative(row[part]), _still_right(row[part]))
        ),
        "" if count is None else f"{count['right']} of {count['n']}",
        f"{row['flops']['ratio']:.2f}×",
        f"{row['ms']['prune']:.1f}",
    ]


def _still_right(score: Mapping[str, Any]) -> str:
    if not score["right_unpruned"]:
        return ""
    low, high = score["still_right_interval"]
    return (
        f"{score['still_right']} of {score['right_unpruned']} [{100 * low:.1f}, {100 * high:.1f}]"
    )


def share(value: float) -> str:
    """A share as people write it: 1/9, where it is such a fraction."""
    near = Fraction(value).limit_denominator(99)
    return str(near) if abs(float(near) - value) < 1e-6 else f"{value:.4g}"


def _line(row: Mapping[str, Any]) -> list[str]:
    low, high = row["all"]["interval"]
    kinds = [row["by_kind"][kind] for kind in QUESTIONS]
    agreement = row["agreement"]
    return [
        row["label"],
        share(row["retention"]),
        f"{row['all']['accuracy']:.3f}",
        f"{(high - low) / 2:.3f}",
        *(_relative(row[part]) for part in ("all", "questions", "captions")),
        *("" if kind is None else f"{kind['accuracy']:.3f}" for kind in kinds),
        f"{row['caption_objects']:.3f}",
        f"{agreement['exact']:.3f}",
        f"{agreement['overlap']:.3f}",
        f"{agreement['kl']:.3f}",
        f"{row['flops']['ratio']:.2f}×",
        f"{row['ms']['image']:.1f}",
        f"{row['own_time_share']:.1%}",
    ]


def _relative(score: Mapping[str, Any]) -> str:
    if score["relative"] is None:
        return ""
    low, high = score["relative_interval"]
    if low == high and "still_right" in score:  # as many right in every scene: no width to resample
        return _still_right(score)
    return f"{100 * score['relative']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
