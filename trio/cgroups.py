"""Linux's control groups of this process, of both versions: what a container may use.

Elsewhere, or where nothing is set, there is no limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups(
    controller: str, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> Iterator[Path]:
    """Directories of the groups that this process is in, with all above them: each may limit.

    Args:
        controller: as `cpu` or `memory`, for the first version, which has a tree for each.
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


def free_memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of main memory that this process's groups leave it, None without a limit.

    Pages of files that have not been used lately count as free: they go when memory is wanted.
    """
    found = (_free(group) for group in groups("memory", cgroups, membership))
    return min((free for free in found if free is not None), default=None)


def free_main_memory() -> int:
    """Bytes of main memory still to be had, by the machine and by this process's groups; all of it
    where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    machine, groups = int(available) * 1024, free_memory()
    return machine if groups is None else min(machine, groups)


def _free(group: Path) -> int | None:
    """What one group leaves."""
    second = (group / "memory.max").exists()
    names = ("max", "current") if second else ("limit_in_bytes", "usage_in_bytes")
    try:
        most, used = ((group / f"memory.{name}").read_text().strip() for name in names)
        if most == "max":
            return None
        return max(0, int(most) - int(used) + _inactive(group, second))
    except (OSError, ValueError):
        return None


def _inactive(group: Path, second: bool) -> int:
    """Bytes of files' pages in it that have not been used lately."""
    wanted = "inactive_file" if second else "total_inactive_file"
    lines = (group / "memory.stat").read_text().splitlines()
    figures = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(figures.get(wanted, 0))


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
