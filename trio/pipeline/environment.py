"""How Ray's worker processes find this package, and not the async library of the same name.

A job that was submitted with a working directory needs nothing: Ray unpacks it on every node and
puts it first on PYTHONPATH. This module serves the other two ways to start.
"""

import json
import os
from pathlib import Path
from typing import Any

import trio

PACKAGE = Path(trio.__file__).resolve().parent


def export_path() -> None:
    """Local Ray: puts our directory first on PYTHONPATH, which the workers inherit.

    To be called before `ray.init`.
    """
    ours = str(PACKAGE.parent)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([ours, *(path for path in others if path != ours)])


def cluster_runtime_env() -> dict[str, Any]:
    """Existing cluster: the `runtime_env` for `ray.init`, so that every node has our package.

    Empty in a job submitted with a working directory that holds the package; else Ray uploads the
    package's directory, which its workers then find before anything in site-packages.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submitted = (job.get("runtime_env") or {}).get("working_dir")
    if submitted and PACKAGE.is_relative_to(Path.cwd().resolve()):
        return {}
    return {"py_modules": [str(PACKAGE)]}
