"""Totals of a run as ``summary.json`` and as the table printed at its end. No Ray, no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from trio.job.output.scoring import SCORED
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
DONE, RUNNING, FAILED = "done", "running", "failed"
"""States of a run. One that was killed says that it is running: `_SUCCESS` alone marks the end."""


def summarise(
    totals: Totals,
    *,
    name: str,
    run_id: str,
    wall_s: float,
    done_before: Totals,
    work_s: float,
    resources: str,
    memory_plan: Mapping[str, Any] | None = None,
    score: str | None = None,
    settings: Sequence[Mapping[str, Any]] = (),
    state: str = DONE,
) -> dict[str, Any]:
    """The object of ``summary.json``.

    Args:
        totals: of all rows, earlier attempts of this run included.
        name: heading of these figures.
        run_id: the run's id.
        wall_s: of this attempt, from start to end, in seconds.
        done_before: what earlier attempts had committed.
        work_s: from when the first engine was ready to the last row [s]: what rates refer to.
        resources: what it ran on, in words.
        memory_plan: of the engine that answered first; None where no engine was needed.
        score: how responses were compared with answers; objects are told of with "objects" only.
        settings: where several are compared, `of_setting` of each.
        state: of the run: DONE, RUNNING or FAILED.
    """
    per_s = 1.0 / work_s if work_s > 0 else 0.0
    return {
        "run": run_id,
        "state": state,
        **_figures(totals, name, score),
        "rows_before": done_before.rows,
        "images_per_s": (totals.images - done_before.images) * per_s,
        "output_tokens_per_s": (totals.output_tokens - done_before.output_tokens) * per_s,
        "wall_s": wall_s,
        "work_s": work_s,
        "resources": resources,
        "memory_plan": memory_plan,
        **({"settings": list(settings)} if settings else {}),
        "versions": {"python": platform.python_version(), "trio-vlm": VERSION}
        | {package: of_library(package) for package in PACKAGES},
    }


def of_setting(
    totals: Totals, name: str, *, engines: int, score: str | None = None
) -> dict[str, Any]:
    """Figures of one of several settings, its rates as if it were alone: per second in which the
    engines worked on it, an image that another setting had them encode included.

    Args:
        totals: of its rows.
        name: its heading.
        engines: that worked side by side.
        score: as for `summarise`.
    """
    engine_s = totals.encode_s + totals.prefill_s + totals.decode_s
    per_s = engines / engine_s if engine_s > 0 else 0.0
    return {
        **_figures(totals, name, score, alone=True),
        "engine_s": engine_s,
        "images_per_s": totals.images * per_s,
        "output_tokens_per_s": totals.output_tokens * per_s,
    }


def _figures(
    totals: Totals, name: str, score: str | None, *, alone: bool = False
) -> dict[str, Any]:
    """What does not depend on the clock of the job."""
    sums = totals.values()
    phases = {phase: sums.pop(phase) for phase in SECONDS}
    share_of_objects = ratio(totals.object_share_sum, totals.captions)
    for spread in ("object_share_sum", "score_sum", "retention_sum", "retention_rows"):
        del sums[spread]
    return {
        "name": name,
        **sums,
        "error_rate": totals.error_rate,
        "retention": totals.retention,
        "flops_ratio": ratio(totals.prefill_flops_unpruned, totals.prefill_flops),
        "reading_flops_ratio": ratio(totals.reading_flops_unpruned, totals.reading_flops),
        "kv_ratio": ratio(totals.kv_bytes_unpruned, totals.kv_bytes),
        "score": score,
        "accuracy": ratio(totals.score_sum, totals.scored),
        "object_share": share_of_objects if score == "objects" else None,
        "phases": phases,
        "bottleneck": bottleneck(totals, alone=alone),
    }


def table(summary: Summary) -> str:
    """A run's figures as text; settings that were compared side by side."""
    columns = summary.get("settings") or [summary]
    kinds = sorted({kind for column in columns for kind in column["error_kinds"]})
    shown = [_shown(column, kinds) for column in columns]
    lines = [["", *(column["name"] for column in columns)]]
    for label in shown[0]:
        cells = [column[label] for column in shown]
        if any(cells):
            lines.append([label, *(cell or "-" for cell in cells)])
    if columns == [summary]:
        return aligned(lines)
    return f"{aligned(lines)}\nthe whole job took {duration(summary['wall_s'])}"


def _shown(of: Summary, kinds: Sequence[str]) -> dict[str, str | None]:
    """What a column says in each line; None where that does not apply."""
    right, of_metric = None, None
    if of["scored"] and of["score"] in SCORED:
        right = f"{of['right']}/{of['scored']} = {share(of['accuracy'])}"
    elif of["scored"]:
        of_metric = f"{share(of['accuracy'])} of {of['scored']}"
    retention, out_of_memory, looped = of["retention"], of["out_of_memory"], of["looped"]
    return {
        "rows": str(of["rows"]),
        "rows in error": str(of["errors"]),
        **{f"  {kind}": str(of["error_kinds"].get(kind, 0)) for kind in kinds},
        "ended as they repeated themselves": counted(looped, "answer") if looped else "",
        "right responses (exact match)": right,
        f"mean score of rows ({of['score']})": of_metric,
        "objects named rightly": share(of["object_share"]),
        "visual tokens kept, layer average": None if retention is None else f"{retention:.4f}",
        "FLOPs of prompts, with encoder and choosing": _fewer(of["reading_flops_ratio"]),
        "  in the decoder's layers alone": _fewer(of["flops_ratio"]),
        "KV cache bytes": _fewer(of["kv_ratio"]),
        "images/s": f"{of['images_per_s']:.2f}",
        "wall time": duration(of["wall_s"]) if "wall_s" in of else None,
        "engines' time": of["bottleneck"],
        "output tokens/s": f"{of['output_tokens_per_s']:.1f}",
        "out of memory, made do with less": counted(out_of_memory, "time") if out_of_memory else "",
    }


def share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def phases(totals: Totals) -> dict[str, float]:
    """Seconds of engines, each in one phase, where ``summary.json`` has sums that overlap."""
    return {
        "wait": totals.preprocess_wait_s,
        "encode": totals.encode_s - totals.encode_saved_s,
        "prefill": totals.prefill_s - totals.prune_s,
        "choose": totals.prune_s,
        "decode": totals.decode_s,
        "audit": totals.audit_s,
        "idle": totals.idle_s,
    }


def bottleneck(totals: Totals, *, alone: bool = False) -> str | None:
    """Where most of the engines' time went, as in "waiting for images 90 %"; `alone`: what another
    setting's reading of the images has spared is counted as well."""
    spent = {phase: getattr(totals, name) for phase, name in PHASES.items()}
    if not alone:
        spent["encoder"] -= totals.encode_saved_s
    longest = max(spent, key=spent.__getitem__)
    part = ratio(spent[longest], sum(spent.values()))
    return None if part is None else f"{longest} {100 * part:.0f} %"


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _fewer(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f} x fewer" if ratio > 1.005 else "as unpruned"
