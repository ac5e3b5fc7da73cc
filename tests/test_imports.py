"""Who may import whom, and what stays free of the heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for folder in ("trio", "jobs") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)
HEAVY = {"torch", "transformers", "ray"}

# The parts of trio that each part may import, besides itself.
SETTINGS = {"errors", "config", "bundled", "values"}
MAY_IMPORT = {
    "errors": set[str](),
    "cgroups": set[str](),
    "_beside": set[str](),
    "bundled": {"errors"},
    "tables": set[str](),
    "version": set[str](),
    "values": {"errors"},
    "config": {"errors", "pruning", "values"},
    "pruning": SETTINGS,
    "models": SETTINGS | {"pruning"},
    "engine": SETTINGS | {"pruning", "models", "cgroups"},
    "patching": SETTINGS | {"pruning", "models"},
    "job": SETTINGS | {"pruning", "engine", "pipeline"},
    "pipeline": SETTINGS | {"pruning", "models", "engine", "job", "tables", "version", "cgroups"},
    "demo": SETTINGS | {"pruning", "models", "engine"},
    "benchmark": SETTINGS
    | {"pruning", "models", "engine", "patching", "job", "pipeline", "demo", "tables", "version"},
}
LIGHT = [
    "caption",
    "benchmark",
    "trio",
    "trio.benchmark.quality_commands",
    "trio.benchmark.speed_commands",
    "trio.bundled",
    "trio.pruning.options",
    "trio.errors",
    "trio.pruning.schedule",
    "trio.pruning.flops",
    "trio.engine.plan",
    "trio.engine.request",
    "trio.engine.kv_budget",
    "trio.engine.scheduler",
    "trio.engine.memory_limit",
    "trio.job.cli",
    "trio.job.settings",
    "trio.pipeline.committed",
    "trio.pipeline.ending",
    "trio.pipeline.fingerprint",
    "trio.pipeline.ids",
    "trio.pipeline.image_process",
    "trio.pipeline.image_worker",
    "trio.pipeline.lease",
    "trio.pipeline.schema",
    "trio.pipeline.scoring",
    "trio.values",
]


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def part(path: Path) -> str:
    """The first name below trio: `trio/engine/kv_cache.py` and `trio/engine/` are `engine`."""
    return path.relative_to(ROOT / "trio").with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path.is_relative_to(ROOT / "jobs") or path == ROOT / "trio" / "__init__.py":
        return
    mine = part(path)
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("trio.")}
    jobs = {name for name in imported(path) if name.split(".")[0] in ("jobs", "tests")}
    assert parts - {mine} <= MAY_IMPORT[mine]
    assert not jobs


def test_pruning_knows_tensors_only() -> None:
    names = {n for path in FILES if "pruning" in path.parts for n in imported(path)}
    assert names
    assert not {name.split(".")[0] for name in names} & {"transformers", "ray", "pyarrow", "PIL"}


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
