"""``README.md`` of an output: a dataset card, by which `datasets` and the hub read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from huggingface_hub import DatasetCard, DatasetCardData

from trio.job.output.sink import ROWS, STATS
from trio.job.output.summary import share, table
from trio.job.resume.fingerprint import model_directory
from trio.job.settings import Settings
from trio.tables import markdown

CARD = "README.md"
HERE = 'load_dataset(".", '
"""How the card's sample names the place where the card is."""


def dataset_card(
    config: Settings,
    summary: Mapping[str, Any],
    *,
    figures: str | None = None,
    changed: tuple[str, int] | None = None,
) -> str:
    """The card's text.

    Args:
        config: the run's settings.
        summary: the object of ``summary.json``.
        figures: the table of ``metrics.md``, where there is one.
        changed: file and number of the rows whose answers differ between settings.
    """
    files = {ROWS: f"{ROWS}/*.parquet", STATS: f"{STATS}/*.parquet"} if summary["rows"] else {}
    if changed is not None and changed[1]:
        files["changed"] = changed[0]
    # By it `datasets` tells apart what it keeps of directories that have the same name.
    version = f"0.0.{crc32(summary['run'].encode())}"
    configs = [
        {"config_name": name, "data_files": pattern, "version": version}
        | ({"default": True} if name == ROWS else {})
        for name, pattern in files.items()
    ]
    head = DatasetCardData(pretty_name=_title(config), tags=["trio-vlm"], configs=configs or None)
    parts = [f"# {_title(config)}", _facts(config, summary)]
    if files:
        parts.append(_opening(list(files)))
    parts.append(f"```\n{table(summary)}\n```")
    if figures is not None:
        parts.append(f"## Figures\n\n{figures.strip()}")
    parts.append(f"Run `{summary['run']}` of trio-vlm {summary['versions']['trio-vlm']}.")
    return str(DatasetCard("\n".join([f"---\n{head}\n---\n", "\n\n".join(parts), ""])))


def _title(config: Settings) -> str:
    what = "Answers" if config.questions.mode is not None else "Captions"
    return f"{what} by {_model(config)}"


def _model(config: Settings) -> str:
    """A hub id, or the last part of a directory: the others concern nobody."""
    model = config.model.model
    here = model_directory(model) is not None
    return model.rstrip("/").rpartition("/")[2] if here else model


def _facts(config: Settings, summary: Mapping[str, Any]) -> str:
    revision = config.model.revision
    retention = summary["retention"]
    kept = None if retention is None else f"{100 * retention:.1f} %"
    facts = {
        "model": f"`{_model(config)}`" + (f" at `{revision}`" if revision else ""),
        "asked with": _asked_with(config),
        "visual tokens kept, layer average": None if config.output.compare else kept,
        "prompt": "; ".join(config.input.prompt) or config.input.prompt_template,
        "rows": str(summary["rows"]),
        "rows in error": f"{summary['errors']} ({share(summary['error_rate'])})",
    }
    lines = [[name, _in_a_cell(value)] for name, value in facts.items() if value]
    return markdown([["", ""], *lines])


def _in_a_cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", "<br>")


def _asked_with(config: Settings) -> str:
    pruning = config.pruning
    if config.output.compare is not None:
        return ", ".join(one.name for one in config.compared)
    if pruning.schedule is not None:
        return f"{pruning.name}, schedule {pruning.schedule}"
    return pruning.name if pruning.retention is None else f"{pruning.name} {pruning.retention:.4g}"


def _opening(names: Sequence[str]) -> str:
    code = f'from datasets import load_dataset\n\nrows = {HERE}split="train")'
    others = " and ".join(f"`{name}`" for name in names[1:])
    return f"```python\n{code}\n```\n\n{others}: the same, with this name as the second argument."
