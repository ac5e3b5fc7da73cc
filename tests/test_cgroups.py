"""Memory that a container may still take, by both versions of Linux's control groups."""

from pathlib import Path

import pytest

from trio.cgroups import memory_left
from trio.engine import loading

MB = 1 << 20


def group(root: Path, files: dict[str, str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).write_text(text)


def second(most: str, used: int, spare: int = 0) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {spare}\n"
    return {"memory.max": most, "memory.current": str(used), "memory.stat": stat}


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    said = tmp_path / "cgroup"
    said.write_text("0::/pod/engine\n")
    group(tmp_path / "pod", second(str(900 * MB), 500 * MB))
    group(tmp_path / "pod" / "engine", second("max\n", 100 * MB))
    assert memory_left(tmp_path, said) == 400 * MB
    group(tmp_path / "pod" / "engine", second(str(300 * MB), 250 * MB, spare=20 * MB))
    assert memory_left(tmp_path, said) == 70 * MB
    group(tmp_path / "pod" / "engine", second(str(300 * MB), 301 * MB))
    assert memory_left(tmp_path, said) == 1


def test_the_first_version_and_none(tmp_path: Path) -> None:
    said = tmp_path / "cgroup"
    assert memory_left(tmp_path, said) is None
    said.write_text("5:memory:/job\n4:cpu:/job\n")
    assert memory_left(tmp_path, said) is None
    files = {"memory.limit_in_bytes": str(64 * MB), "memory.usage_in_bytes": str(10 * MB)}
    group(tmp_path / "memory" / "job", {**files, "memory.stat": f"total_inactive_file {2 * MB}"})
    assert memory_left(tmp_path, said) == 56 * MB


def test_the_cache_is_sized_by_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(loading, "memory_left", lambda: 400 * MB)
    assert loading.default_kv_bytes(torch.device("cpu")) == 100 * MB
