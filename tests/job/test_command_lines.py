"""Command lines of the jobs mean what they meant when `recorded/` was written (before tyro)."""

import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from caption import JOB

from trio.benchmark import commands
from trio.benchmark.quality_commands import OF_JOB, Calibrate
from trio.errors import UserError
from trio.job import cli
from trio.pruning.method_registry import method_names
from trio.values import plain, settings_of

NEARLY = re.compile("did you mean '(.*?)'")
RECORDED = Path(__file__).parent / "recorded"
CAPTION, BENCHMARK = (
    json.loads((RECORDED / name).read_text()) for name in ("caption.json", "benchmark.json")
)

SINCE: dict[str, Any] = {"method_options": None, "prepare_cpus": None, "compare": None}
SINCE |= {"audit": None, "min_agreement": None, "file_mb": 64}
SINCE |= {"push_to_hub": None, "private": False, "gallery": 100}
SINCE |= {"json_schema": None, "regex": None, "choices": None}
SINCE |= {
    "mode": None, "preset": None, "subset": None, "split": None, "pictures": [],
    "prompt_template": None, "metric": None, "group_by": [], "candidates": None, "with_eos": False,
    "normalise": "sum", "keep_if": None, "objects": None, "keep_columns": None,
    "stop_repetition": None, "only_row": None,
}  # fmt: skip
"""Settings that came later."""


def caption(flags: list[str]) -> dict[str, Any]:
    settings, dry_run = cli.read_call(flags, prog="caption.py", description="", hidden=JOB.hidden)
    return settings.flat() | {"dry_run": dry_run}


def benchmark(flags: list[str]) -> dict[str, Any]:
    made = commands.read(flags, "")
    own = settings_of(made, inner=False)
    values = {name: plain(getattr(made, name)) for name in own}
    if isinstance(made, Calibrate):
        flat = made.job.flat()
        values |= {name: flat[name] for name in OF_JOB} | {"dry_run": made.dry_run}
    elif (pruning := getattr(made, "pruning", None)) is not None:
        values |= {name: plain(getattr(pruning, name)) for name in commands.PRUNING}
    return {"command": type(made).__name__.lower()} | values


def outcome(read: Callable[[list[str]], dict[str, Any]], line: str) -> dict[str, Any]:
    """What a command line gives: values, one line of an error, or an exit."""
    flags = [word.replace("{dir}", str(RECORDED)) for word in shlex.split(line)]
    try:
        with redirect_stdout(io.StringIO()):
            values = json.dumps(read(flags)).replace(str(RECORDED), "{dir}")
        return {"values": json.loads(values.replace("Infinity", '"inf"'))}
    except UserError as error:
        return {"error": str(error)}
    except SystemExit as stop:
        return {"exit": stop.code}


@pytest.fixture(autouse=True)
def _in_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECORDED)


@pytest.mark.parametrize("case", CAPTION["cases"], ids=lambda case: case["flags"])
def test_caption(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    check(case, outcome(caption, case["flags"]), CAPTION["defaults"] | SINCE)
    assert capsys.readouterr().err.strip() == case.get("told", "")


@pytest.mark.parametrize("case", BENCHMARK["cases"], ids=lambda case: case["flags"])
def test_benchmark(case: dict[str, Any]) -> None:
    defaults = BENCHMARK["defaults"][case.get("values", {}).get("command", "quality")]
    if "methods" in defaults:  # they come and go
        defaults = defaults | {"methods": list(method_names())}
    check(case, outcome(benchmark, case["flags"]), defaults)


def check(case: dict[str, Any], got: dict[str, Any], defaults: dict[str, Any]) -> None:
    if "error" in case:
        words = [word.lstrip("-").partition("=")[0] for word in shlex.split(case["flags"])]
        said = got["error"].replace("_", "-")
        assert set(NEARLY.findall(case["error"])) <= set(NEARLY.findall(got["error"]))
        assert any(len(word) > 2 and word in said for word in words) and "\n" not in said
    elif "values" in case:
        assert got == {"values": defaults | case["values"]}
    else:
        assert got == {"exit": case["exit"]}
