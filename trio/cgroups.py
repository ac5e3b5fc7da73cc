"""What the control groups of this process allow. Linux's both versions; elsewhere there are none.

A container that may use 8 GB on a machine of 512 sees all of them; whoever plans by what is seen is
killed by the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups(
    controller: str, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> Iterator[Path]:
    """Directories of the groups that this process is in, with all above them: each may limit.

    Args:
        controller: `cpu` or `memory`.
        cgroups: where the control groups are mounted.
        membership: the file that names this process's groups.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _upwards(cgroups, path)
        elif controller in controllers.split(","):
            for mount in dict.fromkeys((controllers, controller)):
                yield from _upwards(cgroups / mount, path)


def memory_left(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of memory that this process's groups may still take; None without a limit.

    Args: as of `groups`.
    """
    found = [left for group in groups("memory", cgroups, membership) if (left := _left(group))]
    return min(found, default=None)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """A group's directory and those above it.

    A container may be told its path on the host, of which its own mount knows only the end: what
    is not there has no files to read and is passed over.
    """
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts:  # a group outside this container's view
        parts = ()
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _left(group: Path) -> int | None:
    """What one group may still take; file pages that are not in use can be given back."""
    second = (group / "memory.max").exists()
    limit, usage = ("memory.max", "memory.current") if second else _FIRST_VERSION
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        spare = _statistic(group, "inactive_file" if second else "total_inactive_file")
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(1, most - used + spare)


_FIRST_VERSION = "memory.limit_in_bytes", "memory.usage_in_bytes"


def _statistic(group: Path, name: str) -> int:
    lines = (group / "memory.stat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
