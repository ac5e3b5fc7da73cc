"""Totals of a run as ``summary.json`` and as the table printed at its end. No Ray, no torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

from trio.job.output.totals import SECONDS, Totals
from trio.tables import aligned, counted
from trio.version import VERSION

PACKAGES = ("torch", "transformers", "ray", "pyarrow")
Summary = Mapping[str, Any]


def versions() -> dict[str, str]:
    """Versions of what the answers depend on; ``unknown`` for what is not installed."""
    out = {"python": platform.python_version(), "trio-vlm": VERSION}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "unknown"
    return out


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
    objects = score == "objects"
    per_s = 1.0 / work_s if work_s > 0 else 0.0
    return {
        "run": run_id,
        "rows": totals.rows,
        "errors": totals.errors,
        "error_kinds": dict(totals.error_kinds),
        "error_rate": totals.error_rate,
        "images": totals.images,
        "visual_tokens": totals.visual_tokens,
        "prompt_tokens": totals.prompt_tokens,
        "output_tokens": totals.output_tokens,
        "rows_before": done_before.rows,
        "images_per_s": (totals.images - done_before.images) * per_s,
        "output_tokens_per_s": (totals.output_tokens - done_before.output_tokens) * per_s,
        "retention": totals.retention,
        "flops_ratio": totals.flops_ratio,
        "reading_flops_ratio": totals.reading_ratio,
        "kv_ratio": totals.kv_ratio,
        "prefill_flops": totals.prefill_flops,
        "prefill_flops_unpruned": totals.prefill_flops_unpruned,
        "kv_bytes": totals.kv_bytes,
        "kv_bytes_unpruned": totals.kv_bytes_unpruned,
        "score": score,
        "scored": totals.scored,
        "right": totals.right,
        "accuracy": totals.accuracy,
        "captions": totals.captions if objects else 0,
        "object_share": totals.object_share if objects else None,
        "wall_s": wall_s,
        "work_s": work_s,
        "resources": resources,
        "memory_plan": memory_plan,
        "phases": {name: getattr(totals, name) for name in SECONDS},
        "bottleneck": bottleneck(totals),
        "out_of_memory": totals.out_of_memory,
        "cuda_graphs": dict(totals.cuda_graphs),
        "versions": versions(),
    }


def table(columns: Sequence[tuple[str, Summary]]) -> str:
    """Summaries side by side under their headings, as text."""
    lines = [["", *(heading for heading, _ in columns)]]
    for label, show in (*_ROWS, *_error_kinds(columns), *_FIGURES):
        cells = [show(summary) for _, summary in columns]
        if any(cell is not None for cell in cells):
            lines.append([label, *(cell if cell is not None else "-" for cell in cells)])
    return aligned(lines)


def _error_kinds(columns: Sequence[tuple[str, Summary]]) -> list[_Line]:
    found = sorted({kind for _, summary in columns for kind in summary["error_kinds"]})
    return [(f"  {kind}", partial(_errors_of_kind, kind)) for kind in found]


def _errors_of_kind(kind: str, summary: Summary) -> str:
    return str(summary["error_kinds"].get(kind, 0))


def share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def bottleneck(totals: Totals) -> str | None:
    """Where most of the engines' time went, as in "waiting for images 90 %"."""
    found = totals.bottleneck
    return None if found is None else f"{found[0]} {100 * found[1]:.0f} %"


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _right(summary: Summary) -> str | None:
    if not summary["scored"]:
        return None
    return f"{summary['right']}/{summary['scored']} = {share(summary['accuracy'])}"


def _ratio(name: str, summary: Summary) -> str | None:
    value = summary.get(name)
    return None if value is None else f"{value:.2f} x fewer" if value > 1.005 else "as unpruned"


def _times(number: int) -> str | None:
    return counted(number, "time") if number else None


def _retention(summary: Summary) -> str | None:
    value = summary["retention"]
    return None if value is None else f"{value:.4f}"


_Line = tuple[str, Callable[[Summary], str | None]]
_ROWS: tuple[_Line, ...] = (
    ("rows", lambda s: str(s["rows"])),
    ("rows in error", lambda s: str(s["errors"])),
)
_FIGURES: tuple[_Line, ...] = (
    ("right responses (exact match)", _right),
    ("objects named rightly", lambda s: share(s["object_share"])),
    ("visual tokens kept, layer average", _retention),
    ("FLOPs of prompts, with encoder and choosing", lambda s: _ratio("reading_flops_ratio", s)),
    ("  in the decoder's layers alone", lambda s: _ratio("flops_ratio", s)),
    ("KV cache bytes", lambda s: _ratio("kv_ratio", s)),
    ("images/s", lambda s: f"{s['images_per_s']:.2f}"),
    ("wall time", lambda s: duration(s["wall_s"])),
    ("engines' time", lambda s: s["bottleneck"]),
    ("output tokens/s", lambda s: f"{s['output_tokens_per_s']:.1f}"),
    ("out of memory, made do with less", lambda s: _times(s["out_of_memory"])),
)
