"""How Ray's worker processes find this package, and not the async library of the same name; and how
their threads wait and get memory.

A job that was submitted with a working directory needs nothing to be found: Ray unpacks it on every
node and puts it first on PYTHONPATH. The other two ways to start are served here.
"""

import json
import os
from pathlib import Path
from typing import Any

import trio
from trio import openmp as waiting
from trio.allocator import ONE_ARENA

PACKAGE = Path(trio.__file__).resolve().parent
FEW_CPUS = {
    # By default workers yield to all other processes (nice 15): beside two that are busy an engine
    # on two cores is left with a thirtieth of them.
    "RAY_worker_niceness": "0",
    # A node that has more workers than CPUs ends those that are idle for a second, and preparing
    # images would start anew for each unit.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
"""Of a Ray of our own, which may have few."""


def export_path() -> None:
    """Local Ray: puts our directory first on PYTHONPATH, which the workers inherit.

    To be called before `ray.init`.
    """
    ours = str(PACKAGE.parent)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([ours, *(path for path in others if path != ours)])


def submitted() -> bool:
    """Whether this process is the driver of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def cluster_variables() -> dict[str, str]:
    """Existing cluster: the `env_vars` of the `runtime_env`, so that its workers wait as we would,
    and keep their memory.

    Without those that the submitted job brings, of which Ray takes no second word.
    """
    given = _job_environment().get("env_vars") or {}
    wanted = waiting.chosen() | {name: os.environ.get(name, own) for name, own in ONE_ARENA.items()}
    return {name: value for name, value in wanted.items() if name not in given}


def _job_environment() -> dict[str, Any]:
    """The `runtime_env` that this job was submitted with."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return job.get("runtime_env") or {}


def cluster_runtime_env() -> dict[str, Any]:
    """Existing cluster: the `runtime_env` for `ray.init`, so that every node has our package.

    Empty in a job submitted with a working directory that holds the package; else Ray uploads the
    package's directory, which its workers then find before anything in site-packages.
    """
    unpacked = _job_environment().get("working_dir")
    if unpacked and PACKAGE.is_relative_to(Path.cwd().resolve()):
        return {}
    return {"py_modules": [str(PACKAGE)]}
