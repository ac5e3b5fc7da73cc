"""What stays free of the heavy libraries; pyproject.toml has who may import whom."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "ray"}

LIGHT = [
    "caption",
    "vqa",
    "benchmark",
    "report",
    "trio",
    "trio.benchmark.peers_command",
    "trio.benchmark.quality_commands",
    "trio.benchmark.speed_commands",
    "trio.bundled",
    "trio.pruning.options",
    "trio.errors",
    "trio.pruning.schedule",
    "trio.pruning.flops",
    "trio.pruning.method_registry",
    "trio.engine.metrics",
    "trio.engine.request",
    "trio.engine.kv_budget",
    "trio.engine.scheduler",
    "trio.job.cli",
    "trio.job.comparing.compared",
    "trio.job.questions.asking",
    "trio.job.questions.keep_if",
    "trio.job.questions.question_settings",
    "trio.job.settings",
    "trio.job.resume.committed",
    "trio.job.output.ending",
    "trio.job.resume.fingerprint",
    "trio.job.images.pixel_cell",
    "trio.job.input.ids",
    "trio.job.images.time_limit",
    "trio.job.quarantine",
    "trio.job.resume.lease",
    "trio.job.output.schema",
    "trio.job.output.scoring",
    "trio.lmms_eval.entry_point",
    "trio.lmms_eval.gen_kwargs",
    "trio.lmms_eval.model_args",
    "trio.lmms_eval.rows",
    "trio.report.page",
    "trio.values",
    "trio.viz",
    *(
        f"trio.vqa.{package}.{path.stem}"
        for package in ("presets", "figures")
        for path in sorted((ROOT / "trio" / "vqa" / package).glob("[!_]*.py"))
    ),
]


def test_light_modules_load_nothing_heavy() -> None:
    code = (
        "import importlib, sys\n"
        "sys.path.insert(0, 'jobs')\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves() -> None:
    import trio

    assert {getattr(trio, name).__name__ for name in trio.__all__} == set(trio.__all__)
    assert set(trio.__all__) <= set(dir(trio))
