"""Ray: attach or start, keep quiet, and check before anything starts that the job fits."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from trio.errors import UserError
from trio.pipeline import cpus
from trio.pipeline.config import JobConfig
from trio.pipeline.environment import cluster_runtime_env, export_path
from trio.pipeline.placement import Node, place

LOCAL_CPUS = 4
# logical, also on a smaller machine
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
    per_node: int = 1
    # most engines on one of the nodes that are there
    note: str = ""
    # what is to be said about the fit

    def describe(self) -> str:
        where = f"cluster of {self.nodes} nodes" if self.nodes > 1 else "1 node"
        where = where if self.attached else "local Ray"
        engine = f"{self.gpus_per_actor:g} GPU" if self.gpus_per_actor else "CPU"
        return (
            f"{where} with {self.cpus:g} CPUs and {self.gpus:g} GPUs;"
            f" {self.actors} engine{'s' if self.actors > 1 else ''} on {engine}"
            + (f"; {self.note}" if self.note else "")
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
    count = max(LOCAL_CPUS, cpus.usable())
    options |= {"num_cpus": count, "include_dashboard": False, "log_to_driver": False}
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
        UserError: more asked for than the nodes hold and no more to come, with the numbers.
    """
    there = nodes()
    placement = place(
        there,
        actors=config.actors,
        gpus_per_actor=config.gpus_per_actor,
        cpus_per_actor=config.cpus_per_actor,
        wait_s=config.wait_for_nodes,
    )
    notes = [placement.note]
    if placement.fit < placement.actors and autoscales() is False:
        notes.append("this cluster adds no nodes by itself")
    if attached:
        notes.append(_held_by_others(there))
    return Resources(
        cpus=sum(node.cpus for node in there),
        gpus=sum(node.gpus for node in there),
        nodes=len(there),
        actors=placement.actors,
        gpus_per_actor=placement.need.gpus,
        cpus_per_actor=placement.need.cpus,
        attached=attached,
        per_node=placement.per_node,
        note="; ".join(note for note in notes if note),
    )


def nodes() -> list[Node]:
    """The nodes that are alive, in a stable order."""
    return sorted((node for _, node in named_nodes()), key=lambda node: (node.gpus, node.cpus))


def named_nodes() -> list[tuple[str, Node]]:
    """Ids of the nodes that are alive, and what they have."""
    alive = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [(name, Node(cpus=has.get("CPU", 0.0), gpus=has.get("GPU", 0.0))) for name, has in alive]


def _held_by_others(there: Sequence[Node]) -> str:
    """What of the cluster is taken: before our first engine that is other people's work."""
    free = ray.available_resources()
    parts = []
    for kind, total in (("CPU", sum(n.cpus for n in there)), ("GPU", sum(n.gpus for n in there))):
        taken = total - free.get(kind, 0.0)
        if taken > 0:
            parts.append(f"{taken:g} {kind}s")
    return f"{' and '.join(parts)} of it are in use by others now" if parts else ""


def autoscales() -> bool | None:
    """Whether the cluster adds nodes by itself; None where it does not tell.

    Ray's monitor reports the type of each node. Without an autoscaler's settings it calls each type
    after the one node it has. The newer autoscaler (KubeRay's) leaves no such report.
    """
    try:
        client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
        report = json.loads(client.internal_kv_get(b"__autoscaling_status", None) or b"{}")
        types = report["autoscaler_report"]["node_type_mapping"]
        return any(kind != f"node_{node}" for node, kind in types.items()) if types else None
    except Exception:  # private to Ray, and only for a message
        return None


def stop(attached: bool) -> None:
    """End the Ray that ``start`` made; leave somebody's cluster alone."""
    if not attached:
        ray.shutdown()
