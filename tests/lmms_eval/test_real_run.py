"""lmms-eval itself, in this environment or that of LMMS_EVAL_PYTHON; trio/lmms_eval/README.md says
how one is made."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import vqa
from PIL import Image

from tests.lmms_eval.local_task import CHOICE, OPEN, write_tasks
from trio.engine.engine import Engine
from trio.engine.request import Request
from trio.job.command import main
from trio.pruning.options import Pruning
from trio.vqa.metrics import exact_match

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LMMS_EVAL_PYTHON", sys.executable)
RETENTION = "3/100"
"""So little that some answers are wrong."""
_FOUND = """
import sys
from lmms_eval.models import MODEL_REGISTRY_V2 as registry
print(registry.get_manifest("trio_vlm").simple_class_path)
assert "trio.lmms_eval.engine_model" not in sys.modules, "the class is imported unasked"
"""


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return subprocess.run(
        [PYTHON, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def installed() -> None:
    if run("-c", "import lmms_eval").returncode:
        pytest.skip(
            f"lmms-eval is not installed for {PYTHON}: LMMS_EVAL_PYTHON may name an interpreter "
            "that has it (trio/lmms_eval/README.md)"
        )


def test_the_entry_point_is_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["trio_vlm"].partition(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.usefixtures("installed")
def test_the_class_is_imported_only_when_asked_for() -> None:
    done = run("-c", _FOUND)
    assert done.stdout.splitlines()[-1:] == ["trio.lmms_eval.engine_model.TrioVlm"], done.stderr


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("installed", "ray_local")
def test_answers_and_scores_are_those_of_the_engine_and_of_the_job(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "tasks")
    rows = pq.read_table(path).to_pylist()
    done = run(
        *("-m", "lmms_eval", "--model", "trio_vlm", "--verbosity", "DEBUG"),
        *("--model_args", f"pretrained=demo,retention={RETENTION},device=cpu"),
        *("--tasks", f"{OPEN},{CHOICE}", "--include_path", str(tmp_path / "tasks")),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]
    engine = Engine.from_pretrained("demo", pruning=Pruning(retention=3 / 100), device="cpu")

    ours = answered(engine, rows)
    assert len(rows) == 100
    assert [sample["filtered_resps"] for sample in samples(tmp_path, OPEN)] == ours
    right = [
        exact_match(answer, row["answers"], rule="ignore_punctuation")
        for answer, row in zip(ours, rows, strict=True)
    ]
    assert figures[OPEN]["exact_match,none"] == pytest.approx(sum(right) / 100)
    assert 0 < sum(right) < 100
    answers, score = of_job(path, tmp_path / "job")
    assert answers == ours and score == pytest.approx(sum(right) / 100)

    asked = [row for row in rows if row["kind"] == "presence"]
    losses = [[-sum(own) for own in scores] for scores in scored(engine, asked)]
    theirs = [sample["filtered_resps"] for sample in samples(tmp_path, CHOICE)]
    assert [[float(loss) for loss, _ in row] for row in theirs] == [
        pytest.approx(row, abs=1e-4) for row in losses
    ]
    picked = ["yes" if yes < no else "no" for yes, no in losses]
    right = [said == row["answers"][0] for said, row in zip(picked, asked, strict=True)]
    assert figures[CHOICE]["acc,none"] == pytest.approx(sum(right) / len(asked))


def of_job(rows: Path, output: Path) -> tuple[list[str], float]:
    """Answers of jobs/vqa.py in order, and its score."""
    flags = ["--input", str(rows), "--output", str(output), "--metric", "exact_match"]
    flags += ["--retention", RETENTION, "--max-new-tokens", "24", "--log-interval", "60"]
    assert main(vqa.JOB, flags) == 0
    table = pq.read_table(output / "rows").sort_by("row")
    (setting,) = json.loads((output / "metrics.json").read_text())["settings"]
    return table["response"].to_pylist(), setting["figures"]["accuracy"]["value"]


def answered(engine: Engine, rows: list[dict[str, Any]]) -> list[str]:
    results = engine.generate(question(row, n) for n, row in enumerate(rows))
    return [one.response or "" for one in sorted(results, key=lambda result: result.id)]


def scored(engine: Engine, rows: list[dict[str, Any]]) -> list[list[list[float]]]:
    asked = (question(row, n, candidates=(" yes", " no")) for n, row in enumerate(rows))
    return [one.candidate_logprobs for one in sorted(engine.generate(asked), key=lambda r: r.id)]


def question(row: dict[str, Any], number: int, **further: Any) -> Request:
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    return Request(prompt=row["prompt"], images=(image,), id=number, **further)


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lmms-eval wrote of each row, in order."""
    (path,) = (folder / "out").rglob(f"*_samples_{task}.jsonl")
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(read, key=lambda sample: sample["doc_id"])
