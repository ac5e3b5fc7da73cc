"""Ray: attach or start, keep quiet, and check before anything starts that the job fits."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from trio.errors import UserError
from trio.pipeline.config import JobConfig
from trio.pipeline.environment import cluster_runtime_env, export_path

LOCAL_CPUS = 4
# logical; Ray Data needs room for an engine and a few reads even on a small machine
READ_CPUS = 0.5
# of one read task; unlike an engine's, so that Ray does not fuse the two
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a cluster has, and what the job takes of it."""

    cpus: float
    # logical
    gpus: float
    nodes: int
    actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    attached: bool
    # False for a Ray of our own in this process

    def describe(self) -> str:
        where = f"cluster of {self.nodes} nodes" if self.nodes > 1 else "1 node"
        where = where if self.attached else "local Ray"
        engine = f"{self.gpus_per_actor:g} GPU" if self.gpus_per_actor else "CPU"
        return (
            f"{where} with {self.cpus:g} CPUs and {self.gpus:g} GPUs;"
            f" {self.actors} engine{'s' if self.actors > 1 else ''} on {engine}"
        )


def start() -> bool:
    """Attach to the cluster that RAY_ADDRESS or this machine names, else start Ray in here.

    Returns whether it is somebody's cluster. A Ray that is already initialised stays as it is.
    """
    _silence()
    if ray.is_initialized():
        return True
    options: dict[str, Any] = {"logging_level": logging.ERROR, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS")
    if address != "local" and (address or _cluster_here()):
        try:
            env = cluster_runtime_env() or None
            with _hushed():
                ray.init(address=address or "auto", runtime_env=env, log_to_driver=False, **options)
            return True
        except ConnectionError as error:
            if address:
                raise UserError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers there; correct it, or set it"
                    " to 'local'"
                ) from error
    export_path()
    cpus = max(LOCAL_CPUS, os.cpu_count() or 1)
    options |= {"num_cpus": cpus, "include_dashboard": False, "log_to_driver": False}
    with _hushed():
        ray.init(address="local", **options)
    return False


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what Ray's native code writes to standard error; show it only if starting fails."""
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(shown, kept.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _cluster_here() -> bool:
    """Whether ``ray start`` has left word of a cluster on this machine; it may be gone."""
    return os.path.exists("/tmp/ray/ray_current_cluster")


def _silence() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)


def fit(config: JobConfig, *, attached: bool) -> Resources:
    """What the job will take, checked against what there is.

    Raises:
        UserError: more asked for than the cluster has, with both numbers.
    """
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    per_actor = config.gpus_per_actor
    if per_actor is None:
        per_actor = 1.0 if gpus else 0.0
    actors = config.actors
    if actors is None:
        actors = max(1, math.floor(gpus / per_actor)) if per_actor else 1
    out = Resources(
        cpus=cpus,
        gpus=gpus,
        nodes=len([node for node in ray.nodes() if node["Alive"]]),
        actors=actors,
        gpus_per_actor=per_actor,
        cpus_per_actor=config.cpus_per_actor,
        attached=attached,
    )
    check(out)
    return out


def check(resources: Resources) -> None:
    """Raise UserError where Ray would wait for ever."""
    want_gpus = resources.actors * resources.gpus_per_actor
    if want_gpus > resources.gpus:
        raise UserError(
            f"{resources.actors} actors with {resources.gpus_per_actor:g} GPUs each need"
            f" {want_gpus:g} GPUs, Ray has {resources.gpus:g};"
            " lower --actors or --gpus-per-actor (0 runs on the CPU)"
        )
    want_cpus = resources.actors * resources.cpus_per_actor + READ_CPUS
    if want_cpus > resources.cpus:
        raise UserError(
            f"{resources.actors} actors with {resources.cpus_per_actor:g} CPUs each and a reader"
            f" need {want_cpus:g} CPUs, Ray has {resources.cpus:g};"
            " lower --actors or --cpus-per-actor (0 is allowed)"
        )


def stop(attached: bool) -> None:
    """End the Ray that ``start`` made; leave somebody's cluster alone."""
    if not attached:
        ray.shutdown()
