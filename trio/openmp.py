"""Passive waiting of OpenMP threads, on which PyTorch's parallel regions run.

By default a thread that is through spins until the last one is, which is quick on an idle machine.
Beside other processes the spinning takes the CPU from the very thread that is waited for, and a
step can last fifty times as long. `OMP_WAIT_POLICY=PASSIVE` lets threads sleep instead. GNU's
OpenMP, which PyTorch's wheels for Linux bring, and LLVM's and Intel's all read it, once, when torch
is loaded. No torch in here.
"""

from __future__ import annotations

import logging
import os
import sys

POLICY, PASSIVE = "OMP_WAIT_POLICY", "PASSIVE"
CHOICES = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# by any of these a user decides; the second is GNU's, the third LLVM's and Intel's
_warned = False
_late = False
# whether `passively` was called only when OpenMP had read its settings
_set_here = False
# whether it set the policy, and not whoever started this process


def chosen() -> dict[str, str]:
    """The variables that decide it, as far as they are set."""
    return {name: value for name in CHOICES if (value := os.environ.get(name))}


def passively() -> None:
    """Let threads of this process and of its children sleep, unless the environment says how.

    To be called before torch is loaded; later it holds for children alone.
    """
    global _late, _set_here
    if not chosen():
        _late = "torch" in sys.modules
        os.environ[POLICY] = PASSIVE
        _set_here = True


def environment_as_found() -> dict[str, str]:
    """For programs of others: the environment without what `passively` has put there."""
    return {k: v for k, v in os.environ.items() if not (_set_here and k == POLICY)}


def describe() -> str:
    """For the conditions of a measurement, as in ``OMP_WAIT_POLICY=PASSIVE``."""
    said = " ".join(f"{name}={value}" for name, value in _in_force().items())
    return said or "spinning"


def _in_force() -> dict[str, str]:
    """What was chosen in time for this process."""
    return {} if _late else chosen()


def warn(threads: int) -> None:
    """Say once in a process that several threads spin, where nobody has decided it.

    threads: that compute on this CPU.
    """
    global _warned
    if threads < 2 or _in_force() or _warned:
        return
    _warned = True
    logging.getLogger(__name__).warning(
        "%d threads compute on this CPU and spin while they wait for each other, which is many"
        " times slower beside other processes: set OMP_WAIT_POLICY=PASSIVE in the environment"
        " before torch is imported (ACTIVE keeps the spinning and ends this line)",
        threads,
    )
