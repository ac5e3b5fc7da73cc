"""How many CPUs this process may really use: its affinity, and the quota of its control groups.

A container with a quota of two CPUs on a machine of 64 sees all 64; threads sized by what is seen
would spend their time stopped. Both versions of Linux's control groups are read; elsewhere, or
where nothing is set, there is no quota.
"""

from __future__ import annotations

import os
from pathlib import Path

from trio.cgroups import CGROUPS, MEMBERSHIP, groups


def usable(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """CPUs that this process may use, at least 1; a part of a CPU counts as none."""
    limit = quota(cgroups, membership)
    return seen() if limit is None else max(1, min(seen(), int(limit)))


def seen() -> int:
    """CPUs that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time that this process may spend, None without a limit.

    Args:
        cgroups: where the control groups are mounted.
        membership: the file that names this process's groups.
    """
    limits = [limit for group in groups("cpu", cgroups, membership) if (limit := _limit(group))]
    return min(limits, default=None)


def _limit(group: Path) -> float | None:
    """What one group allows, in CPUs."""
    try:
        if (group / "cpu.max").exists():
            most, period = (group / "cpu.max").read_text().split()[:2]
        else:
            most = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        if most == "max" or int(most) <= 0 or int(period) <= 0:
            return None
        return int(most) / int(period)
    except (OSError, ValueError):
        return None
