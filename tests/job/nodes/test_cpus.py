"""The CPU quota of control groups, read from files made here."""

from pathlib import Path

import pytest

from trio import cgroups
from trio.job.nodes import cpus


def group(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A mount of control groups and the file that names this process's."""
    for name, content in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (root / "membership").write_text(membership + "\n")
    return root / "mount", root / "membership"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        # The group above allows less.
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3.0),
        # The path is the host's, the mount begins at the container's own group.
        ("0::/docker/1234", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/../other", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "nonsense"}, None),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a\n0::/",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "50000",
            },
            5.0,
        ),
        (
            "3:cpu,cpuacct:/docker/1234",
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2.0,
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        # Another controller whose name begins alike.
        ("3:cpuset:/", {"cpuset/cpu.max": "100000 100000"}, None),
    ],
)
def test_quota(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    assert cpus.quota(*group(tmp_path, membership, files)) == expected


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert cpus.quota(tmp_path / "none", tmp_path / "neither") is None


def test_the_smaller_of_affinity_and_quota_and_never_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "seen", lambda: 8)
    for most, expected in (("300000", 3), ("390000", 3), ("6400000", 8), ("50000", 1), ("max", 8)):
        mounted = group(tmp_path, "0::/", {"cpu.max": f"{most} 100000"})
        assert cpus.usable(*mounted) == expected


def test_here() -> None:
    assert 1 <= cpus.usable() <= cpus.seen()


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 9"}, 700),
        # Pages of files that nobody uses go when memory is wanted.
        (
            "0::/",
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "inactive_file 500"},
            600,
        ),
        ("0::/", {"memory.max": "max", "memory.current": "300", "memory.stat": ""}, None),
        ("0::/", {}, None),
        (
            "0::/a/b",
            {
                "a/b/memory.max": "max",
                "a/b/memory.current": "1",
                "a/b/memory.stat": "",
                "a/memory.max": "5000",
                "a/memory.current": "6000",
                "a/memory.stat": "",
            },
            0,
        ),
        (
            "4:memory:/docker/12\n3:cpu:/a",
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "700",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 200",
            },
            500,
        ),
    ],
)
def test_memory_that_a_container_leaves(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int | None
) -> None:
    assert cgroups.free_memory(*group(tmp_path, membership, files)) == expected
