"""Totals of a run as ``summary.json`` and as the table printed at its end. No Ray, no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from trio.job.output.totals import SECONDS, Totals, ratio
from trio.tables import aligned, counted
from trio.version import VERSION, of_library

PACKAGES = ("torch", "transformers", "ray", "pyarrow")
PHASES = {
    "waiting for images": "preprocess_wait_s",
    "encoder": "encode_s",
    "prefill": "prefill_s",
    "decode": "decode_s",
    "idle": "idle_s",
}
"""Of an engine, each instant in one of them; `prune_s` is part of prefill."""
Summary = Mapping[str, Any]


def summarise(
    totals: Totals,
    *,
    run_id: str,
    wall_s: float,
    done_before: Totals,
    work_s: float,
    resources: str,
    memory_plan: Mapping[str, Any] | None = None,
    score: str | None = None,
) -> dict[str, Any]:
    """The object of ``summary.json``.

    Args:
        totals: of all rows, earlier attempts of this run included.
        run_id: the run's id.
        wall_s: of this attempt, from start to end, in seconds.
        done_before: what earlier attempts had committed.
        work_s: from when the first engine was ready to the last row [s]: what rates refer to.
        resources: what it ran on, in words.
        memory_plan: of the engine that answered first; None where no engine was needed.
        score: how responses were compared with answers; objects are told of with "objects" only.
    """
    per_s = 1.0 / work_s if work_s > 0 else 0.0
    sums = totals.values()
    phases = {name: sums.pop(name) for name in SECONDS}
    share_of_objects = ratio(sums.pop("object_share_sum"), totals.captions)
    del sums["retention_sum"], sums["retention_rows"]
    return {
        "run": run_id,
        **sums,
        "error_rate": totals.error_rate,
        "rows_before": done_before.rows,
        "images_per_s": (totals.images - done_before.images) * per_s,
        "output_tokens_per_s": (totals.output_tokens - done_before.output_tokens) * per_s,
        "retention": totals.retention,
        "flops_ratio": ratio(totals.prefill_flops_unpruned, totals.prefill_flops),
        "reading_flops_ratio": ratio(totals.reading_flops_unpruned, totals.reading_flops),
        "kv_ratio": ratio(totals.kv_bytes_unpruned, totals.kv_bytes),
        "score": score,
        "accuracy": ratio(totals.right, totals.scored),
        "object_share": share_of_objects if score == "objects" else None,
        "wall_s": wall_s,
        "work_s": work_s,
        "resources": resources,
        "memory_plan": memory_plan,
        "phases": phases,
        "bottleneck": bottleneck(totals),
        "versions": {"python": platform.python_version(), "trio-vlm": VERSION}
        | {name: of_library(name) for name in PACKAGES},
    }


def table(columns: Sequence[tuple[str, Summary]]) -> str:
    """Summaries side by side under their headings, as text."""
    kinds = sorted({kind for _, summary in columns for kind in summary["error_kinds"]})
    shown = [_shown(summary, kinds) for _, summary in columns]
    lines = [["", *(heading for heading, _ in columns)]]
    for label in shown[0]:
        cells = [column[label] for column in shown]
        if any(cells):
            lines.append([label, *(cell or "-" for cell in cells)])
    return aligned(lines)


def _shown(of: Summary, kinds: Sequence[str]) -> dict[str, str | None]:
    """What a column says in each line; None where that does not apply."""
    right = f"{of['right']}/{of['scored']} = {share(of['accuracy'])}" if of["scored"] else None
    retention, out_of_memory = of["retention"], of["out_of_memory"]
    return {
        "rows": str(of["rows"]),
        "rows in error": str(of["errors"]),
        **{f"  {kind}": str(of["error_kinds"].get(kind, 0)) for kind in kinds},
        "right responses (exact match)": right,
        "objects named rightly": share(of["object_share"]),
        "visual tokens kept, layer average": None if retention is None else f"{retention:.4f}",
        "FLOPs of prompts, with encoder and choosing": _fewer(of["reading_flops_ratio"]),
        "  in the decoder's layers alone": _fewer(of["flops_ratio"]),
        "KV cache bytes": _fewer(of["kv_ratio"]),
        "images/s": f"{of['images_per_s']:.2f}",
        "wall time": duration(of["wall_s"]),
        "engines' time": of["bottleneck"],
        "output tokens/s": f"{of['output_tokens_per_s']:.1f}",
        "out of memory, made do with less": counted(out_of_memory, "time") if out_of_memory else "",
    }


def share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def bottleneck(totals: Totals) -> str | None:
    """Where most of the engines' time went, as in "waiting for images 90 %"."""
    spent = {phase: getattr(totals, name) for phase, name in PHASES.items()}
    longest = max(spent, key=spent.__getitem__)
    part = ratio(spent[longest], sum(spent.values()))
    return None if part is None else f"{longest} {100 * part:.0f} %"


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _fewer(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f} x fewer" if ratio > 1.005 else "as unpruned"
