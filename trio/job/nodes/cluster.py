"""Ray: attach or start, keep quiet, and check before anything starts that the job fits."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from trio import openmp as waiting
from trio.allocator import ONE_ARENA
from trio.errors import UserError
from trio.job.nodes import cpus
from trio.job.nodes.environment import (
    FEW_CPUS,
    cluster_runtime_env,
    cluster_variables,
    export_path,
    submitted,
)
from trio.job.nodes.placement import Node, Resources, describe, place, spare_cpus
from trio.job.settings import AUTO, LOCAL, Cluster, Settings

LOCAL_CPUS = 4
# logical, also on a smaller machine
ANSWER_S, HERE_S = 10.0, 1.0
# for a head to take a connection: one that was asked for, and one that may be here
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
LOGGING: dict[str, Any] = {"logging_level": logging.ERROR, "configure_logging": True}


def start(address: str | None = None) -> bool:
    """Attach to the cluster that was asked for, else start Ray in here.

    Returns whether it is somebody's cluster. A Ray that is already initialised stays as it is.

    Args:
        address: as ``--address``; None leaves it to RAY_ADDRESS.

    Raises:
        UserError: no cluster answers there.
    """
    _silence()
    waiting.passively()
    if ray.is_initialized():
        return True
    where, source = _asked(address)
    if where is None or where == LOCAL:
        if where is None:
            _tell_of_another()
        _start_here()
        return False
    if where == AUTO and not submitted():
        # Ray itself would also take one that another job has started for itself.
        where = _cluster_here()
        if where is None:
            raise UserError(
                f"{source}: no Ray of 'ray start' runs on this machine; name one as host:port, or"
                " leave it out for a Ray of the job's own"
            )
    _attach(where, source)
    return True


def _asked(address: str | None) -> tuple[str | None, str]:
    """Which Ray is wanted, and what says so: ``--address`` before RAY_ADDRESS; None: nothing does.

    Raises:
        UserError: another one than that to which this job was submitted.
    """
    named = os.environ.get("RAY_ADDRESS") or None
    if address is None or (submitted() and address in (AUTO, named)):
        return named, f"RAY_ADDRESS={named}"
    if submitted():
        raise UserError(
            f"--address {address}: a job of 'ray job submit' runs on the cluster it was submitted"
            " to; leave --address out, also of --config"
        )
    # Ray takes the variable's word against 'auto'.
    os.environ.pop("RAY_ADDRESS", None)
    return address, f"--address {address}"


def _start_here() -> None:
    export_path()
    for name, value in (FEW_CPUS | ONE_ARENA).items():
        os.environ.setdefault(name, value)
    count = max(LOCAL_CPUS, cpus.usable())
    with _hushed():
        ray.init(
            address=LOCAL, num_cpus=count, include_dashboard=False, log_to_driver=False, **LOGGING
        )


def _attach(where: str, source: str) -> None:
    env = cluster_runtime_env()
    variables = cluster_variables()
    if variables:
        env["env_vars"] = variables
    try:
        if re.fullmatch(r"[^/]+:\d+", where) and not _answers(where, ANSWER_S):
            raise ConnectionError(where)  # for which Ray itself would try much longer
        with _hushed():
            ray.init(address=where, runtime_env=env or None, log_to_driver=False, **LOGGING)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"{source}: no Ray cluster answers there; correct it, or set it to '{LOCAL}'"
        ) from error


def _tell_of_another() -> None:
    """Where nobody has said which Ray: the one that `ray start` left here is not ours to take."""
    there = _cluster_here()
    if there:
        print(
            f"a Ray runs on this machine ({there}); this job starts one of its own:"
            f" --address {AUTO} (or RAY_ADDRESS={AUTO}) joins the other, {LOCAL} ends this line",
            file=sys.stderr,
            flush=True,
        )


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


def _cluster_here() -> str | None:
    """Address of the cluster that ``ray start`` has left word of on this machine, if it lives."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = Path(base, "ray", "ray_current_cluster").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return address if _answers(address, HERE_S) else None


def _answers(address: str, seconds: float) -> bool:
    """Whether anything takes a connection at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def _silence() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)


def fit(config: Settings, *, attached: bool) -> Resources:
    """What the job will take, checked against what there is.

    Raises:
        UserError: more asked for than the nodes hold and no more to come, with the numbers.
    """
    asked, there = config.cluster, nodes()
    placed = place(
        there,
        actors=asked.actors,
        gpus_per_actor=asked.gpus_per_actor,
        cpus_per_actor=asked.cpus_per_actor,
        wait_s=asked.wait_for_nodes,
    )
    tasks, cpus_each = _prepare_tasks(asked, there, placed)
    return replace(placed, attached=attached, prepare_tasks=tasks, prepare_cpus=cpus_each)


def _prepare_tasks(asked: Cluster, there: Sequence[Node], placed: Resources) -> tuple[int, float]:
    """How many tasks prepare images at a time, and the CPUs that each reserves.

    Engines that leave no CPU must not starve what feeds them: then none is reserved.

    Raises:
        UserError: more asked for than engines leave and no node to come.
    """
    wanted, engines = asked.prepare_cpus, placed.actors
    if asked.threads is not None:  # its older name, for each engine
        wanted = asked.threads * engines
    free = spare_cpus(there, placed.need, engines - placed.waiting)
    if wanted is None:
        most = free if placed.gpus_per_actor else min(free, 2 * engines)
        return (most, 1.0) if most > 0 else (engines, 0.0)
    if wanted > free and not asked.wait_for_nodes:
        flag = "--prepare-cpus" if asked.threads is None else "--threads"
        raise UserError(
            f"{flag}: {wanted} CPUs for images, but the engines leave {free} of"
            f" {describe(there)}; lower it, --actors or --cpus-per-actor (0 is allowed)"
        )
    return wanted, 1.0


def nodes() -> list[Node]:
    """The nodes that are alive, in a stable order."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = [Node(cpus=has.get("CPU", 0.0), gpus=has.get("GPU", 0.0)) for has in alive]
    return sorted(found, key=lambda node: (node.gpus, node.cpus))


def stop(attached: bool) -> None:
    """End the Ray that ``start`` made; leave somebody's cluster alone."""
    if not attached:
        ray.shutdown()
