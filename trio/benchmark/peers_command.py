"""`benchmark.py peers`. What measures is imported when it runs: no torch here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from trio.benchmark.commands import DTYPES, Count, Measurement, NewFile, line, tell, write
from trio.errors import UserError
from trio.openmp import environment_as_found
from trio.values import (
    Fraction,
    Model,
    Seed,
    Shape,
    Switch,
    Tokens,
    each,
    one_of,
    text,
)

if TYPE_CHECKING:
    from trio.benchmark.speed.peers.subject_process import Subject

PEERS = {"vllm": "vllm_peer", "openvino": "openvino_peer"}
"""Modules of `trio.benchmark.speed.peers` by the names of their engines."""


class Peer(NamedTuple):
    """An engine, and the interpreter that has it."""

    name: str
    python: str


def _peer(value: Any) -> Peer:
    name, _, python = text(value).partition("=")
    if name not in PEERS:
        raise UserError(f"{value!r} is not NAME=PYTHON with a name of {', '.join(PEERS)}")
    if not python:
        raise UserError(f"{value!r} names no interpreter; give {name}=PYTHON")
    return Peer(name, os.path.expanduser(python))


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers(Measurement):
    """Our engine and `generate` beside other engines on this CPU, each in a process of its own.

    From image files and text to text, unpruned but for ours; greedy, answers of one length.
    """

    peer: Annotated[tuple[Peer, ...], each(_peer, "NAME=PYTHON")] = ()
    """vllm or openvino, and the interpreter of an environment that has it; again for another
    (default: none: `generate` and our engine alone)."""
    shape: Shape = "small"
    """Of random weights: tiny, small, llava-1.5-7b or llava-next-7b."""
    model: Model | None = None
    """Directory or hub id instead of a shape."""
    images: Count = 16
    """Requests of each round, one image each, all waiting at once."""
    prompt_tokens: Tokens = 40
    """Text tokens of each prompt, besides those of the chat template."""
    output_tokens: Tokens = 32
    """Of each answer."""
    retention: Fraction = 1 / 9
    """Layer-average share that our engine keeps where it prunes (default: 1/9)."""
    threads: Count | None = None
    """Of each subject (default: as many as there are CPUs)."""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """In which all subjects compute."""
    rounds: Count = 3
    """Each with a turn of every subject, after one that is not counted; medians are shown."""
    seed: Seed = 0
    """Of words and pixels."""
    json: NewFile | None = None
    """Also write conditions, rows and rounds, anew behind each round."""
    dry_run: Switch = False
    """Print the conditions and the subjects, then stop."""

    def run(self) -> int:
        from trio.benchmark.speed.peers.peer_rounds import compare, table

        self._check()
        conditions = self._conditions()
        print(line(conditions), flush=True)
        subjects = self._subjects()
        if self.dry_run:
            print("\n".join(subject.name for subject in subjects))
            return 0
        result: Mapping[str, Any] = {"rows": [], "failed": {}}
        with TemporaryDirectory(prefix="trio-peers-") as directory:
            task, requests = self._prepared(Path(directory))
            for result in compare(subjects, task, requests, tell):
                write(self.json, {"conditions": conditions, **result})
        print(table(result))
        return 1 if result["failed"] else 0

    def _check(self) -> None:
        names = [peer.name for peer in self.peer]
        if len(set(names)) < len(names):
            raise UserError("--peer: an engine is named twice")
        for peer in self.peer:
            if shutil.which(peer.python) is None:
                raise UserError(
                    f"--peer {peer.name}: no interpreter {peer.python!r} to be had here"
                )
        if self.model is None:
            from trio.benchmark.speed.peers.checkpoint_of_shape import check_shape

            check_shape(self.shape)

    def _conditions(self) -> dict[str, Any]:
        import torch

        from trio.benchmark.conditions import machine

        shown = ("images", "prompt_tokens", "output_tokens", "retention", "dtype", "rounds", "seed")
        return {
            "model": self.model or self.shape,
            **{name: getattr(self, name) for name in shown},
            **machine(torch.device("cpu")),
            "threads": self._threads,
            "load": round(os.getloadavg()[0], 1),
        }

    @property
    def _threads(self) -> int:
        from trio.job.nodes.cpus import usable

        return self.threads or usable()

    def _subjects(self) -> list[Subject]:
        """Ours, then the others, in the order of the table."""
        from trio.benchmark.speed.peers.peer_rounds import ENGINE, GENERATE, PRUNED
        from trio.benchmark.speed.peers.subject_process import Subject
        from trio.job.nodes.environment import PACKAGE

        package, threads = str(PACKAGE.parent), str(self._threads)
        # Only our engine's threads wait passively: the others are to be as they are by themselves.
        found = {**environment_as_found(), "OMP_NUM_THREADS": threads}
        engine = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": package}
        generate = {**found, "PYTHONPATH": package}
        outside = {key: value for key, value in found.items() if key != "PYTHONPATH"}
        kept = {GENERATE: None, ENGINE: 1, PRUNED: self.retention}
        return [
            *(
                Subject(
                    name=name,
                    python=sys.executable,
                    module="own_subjects",
                    environment=generate if retention is None else engine,
                    options={"retention": retention},
                )
                for name, retention in kept.items()
            ),
            *(
                Subject(
                    name=peer.name,
                    python=peer.python,
                    module=PEERS[peer.name],
                    environment=outside,
                    options={},
                )
                for peer in self.peer
            ),
        ]

    def _prepared(self, directory: Path) -> tuple[dict[str, Any], Any]:
        """What all subjects are told, and the requests of each round."""
        import torch

        from trio.benchmark.speed.peers.checkpoint_of_shape import write_checkpoint
        from trio.benchmark.speed.peers.requests_on_disk import write_requests

        model = self.model
        if model is None:
            model = str(directory / "model")
            write_checkpoint(self.shape, Path(model), getattr(torch, self.dtype))
        task = {
            "model": model,
            "dtype": self.dtype,
            "threads": self._threads,
            "images": self.images,
            "output_tokens": self.output_tokens,
            "scratch": str(directory),
        }
        requests = write_requests(
            model,
            directory,
            rounds=self.rounds + 1,
            images=self.images,
            prompt_tokens=self.prompt_tokens,
            seed=self.seed,
        )
        return task, requests
