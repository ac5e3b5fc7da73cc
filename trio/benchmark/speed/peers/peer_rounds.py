"""How fast other engines answer what ours does, side by side: each in a process of its own, that is
started once and gets a line for every round.

Every round has a turn of every subject, one after the other, so that whatever slows the machine
down meets all of them; the first, which warms up, is not counted. A turn goes from the line that
names image files and prompts to the line with the answers: reading and preparing images and
spelling answers are in it, starting and loading are not. Figures are medians over rounds, ratios
are medians of the ratios within a round. What else ran meanwhile is counted, too: the machine's
seconds of CPU less those of the subject whose turn it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from trio.benchmark.speed.peers.subject_process import (
    Running,
    Subject,
    SubjectFailed,
    machine_cpu_s,
)
from trio.tables import aligned

GENERATE, ENGINE, PRUNED, VLLM, OPENVINO = "generate", "engine", "engine pruned", "vllm", "openvino"
BASES = (GENERATE, VLLM)
"""To which ratios are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One subject in one round. cpu_s: seconds of CPU that it used. others_s: those that all else
    used meanwhile; None where the system does not say."""

    seconds: float
    cpu_s: float
    others_s: float | None
    answers: Sequence[Mapping[str, Any]]


Round = dict[str, Turn]


@dataclass(kw_only=True, slots=True)
class Peers:
    """Subjects that run, and what became of the others.

    start_s: seconds until each was ready. failed: by name, what became of those that are gone.
    logs: what they wrote last, in lines.
    """

    task: Mapping[str, Any]
    tell: Callable[[str], None]
    running: dict[str, Running] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)

    def start(self, subjects: Sequence[Subject], stack: ExitStack) -> None:
        """One after the other; those that do not start are left out, which is told."""
        for subject in subjects:
            began = time.perf_counter()
            try:
                running = Running(subject, self.task)
            except SubjectFailed as error:
                self._fail(subject.name, "did not start", error)
                continue
            stack.callback(running.close)
            self.running[subject.name] = running
            self.start_s[subject.name] = time.perf_counter() - began
            self.tell(f"{subject.name} is ready after {self.start_s[subject.name]:.0f} s")

    def round(self, requests: Sequence[Mapping[str, str]], label: str) -> Round:
        """A turn of each that runs; one that fails is left out from then on, which is told."""
        turns = {}
        for name, running in list(self.running.items()):
            try:
                turns[name] = self._turn(running, requests)
            except SubjectFailed as error:
                self._fail(name, f"failed in {label}", error)
                del self.running[name]
                running.close()
        return turns

    def _turn(self, running: Running, requests: Sequence[Mapping[str, str]]) -> Turn:
        before, own = machine_cpu_s(), running.cpu_s()
        began = time.perf_counter()
        answers = running.answer(requests, self.task["output_tokens"])
        seconds = time.perf_counter() - began
        own, after = running.cpu_s() - own, machine_cpu_s()
        others = None if before is None or after is None else max(0.0, after - before - own)
        return Turn(seconds=seconds, cpu_s=own, others_s=others, answers=answers)

    def _fail(self, name: str, how: str, error: SubjectFailed) -> None:
        self.failed[name], self.logs[name] = f"{how}: {error}", error.log
        self.tell(f"{name} {self.failed[name]}")


def compare(
    subjects: Sequence[Subject],
    task: Mapping[str, Any],
    requests: Sequence[Sequence[Mapping[str, str]]],
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Run all subjects on the same requests.

    Args:
        task: what all are told; `output_tokens` is how long each answer must be.
        requests: of each round; the first is the warm-up.
        tell: is told of every subject that is ready or failed, and of every round that is done.

    Yields:
        The result so far, as in the JSON file, behind every round that counts.
    """
    peers, rounds = Peers(task=task, tell=tell), list[Round]()
    with ExitStack() as stack:
        peers.start(subjects, stack)
        for number, rows in enumerate(requests):
            label = f"round {number}/{len(requests) - 1}" if number else "the warm-up"
            turns = peers.round(rows, label)
            tell(_said(label, turns))
            if number:
                rounds.append(turns)
                yield summary(rounds, peers, len(rows), task["output_tokens"])


def _said(label: str, turns: Round) -> str:
    seconds = ", ".join(f"{name} {turn.seconds:.2f} s" for name, turn in turns.items())
    return f"{label}: {seconds or 'nobody is left'}"


def summary(rounds: Sequence[Round], peers: Peers, images: int, tokens: int) -> dict[str, Any]:
    """Rows of the subjects that are left, the others' share of the machine by round, and those that
    failed; the keys of the JSON file."""
    return {
        "rows": [_row(name, rounds, peers, images, tokens) for name in peers.running],
        "rounds": [
            {
                "seconds": {name: turn.seconds for name, turn in turns.items()},
                "cpu_s": {name: turn.cpu_s for name, turn in turns.items()},
                "others_cpu_s": _others(turns),
                "wall_s": sum(turn.seconds for turn in turns.values()),
            }
            for turns in rounds
        ],
        "failed": dict(peers.failed),
        "logs": dict(peers.logs),
    }


def _others(turns: Round) -> float | None:
    """Of a round, in seconds of CPU."""
    found = [turn.others_s for turn in turns.values() if turn.others_s is not None]
    return sum(found) if found else None


def _row(
    name: str, rounds: Sequence[Round], peers: Peers, images: int, tokens: int
) -> dict[str, Any]:
    rates = [images / turns[name].seconds for turns in rounds]
    row: dict[str, Any] = {
        "name": name,
        "images_per_s": statistics.median(rates),
        "images_per_s_range": (min(rates), max(rates)),
        "tokens_per_s": statistics.median(rates) * tokens,
        "cpu_s": statistics.median(turns[name].cpu_s for turns in rounds),
        "prompt_tokens": statistics.mean(
            answer["prompt_tokens"] for turns in rounds for answer in turns[name].answers
        ),
        "start_s": peers.start_s[name],
    }
    for base in BASES:
        if base in peers.running:
            ratios = [turns[base].seconds / turns[name].seconds for turns in rounds]
            row[f"vs_{base}"] = statistics.median(ratios)
            row[f"vs_{base}_range"] = (min(ratios), max(ratios))
    if GENERATE in peers.running:
        row["answers_as_generate"] = statistics.mean(
            ours["text"].strip() == theirs["text"].strip()
            for turns in rounds
            for ours, theirs in zip(turns[name].answers, turns[GENERATE].answers, strict=True)
        )
    return row


def table(result: Mapping[str, Any]) -> str:
    """The rows as aligned text, whether they compare, and what others used, round by round."""
    bases = [base for base in BASES if any(f"vs_{base}" in row for row in result["rows"])]
    head = ["", "images/s", "(range)", "tokens/s", "CPU s"]
    head += [text for base in bases for text in (f"of {base}", "(range)")]
    lines = [[*head, "prompt tokens", "as generate", "start s"]]
    for row in result["rows"]:
        cells = [row["name"], f"{row['images_per_s']:.2f}", _range(row["images_per_s_range"])]
        cells += [f"{row['tokens_per_s']:.0f}", f"{row['cpu_s']:.1f}"]
        for base in bases:
            cells += [f"{row[f'vs_{base}']:.2f}", _range(row[f"vs_{base}_range"])]
        alike = row.get("answers_as_generate")
        cells += [f"{row['prompt_tokens']:.0f}", "" if alike is None else f"{alike:.0%}"]
        lines.append([*cells, f"{row['start_s']:.0f}"])
    others = [_used(number, one) for number, one in enumerate(result["rounds"], 1)]
    return "\n".join([aligned(lines), *_unlike(result["rows"]), *others])


def _unlike(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where prompts became more or fewer tokens for one subject than for another."""
    counts = {row["prompt_tokens"] for row in rows}
    return ["the rows do not compare: prompt tokens differ"] if len(counts) > 1 else []


def _range(low_high: tuple[float, float]) -> str:
    return f"{low_high[0]:.2f}-{low_high[1]:.2f}"


def _used(number: int, one: Mapping[str, Any]) -> str:
    others = one["others_cpu_s"]
    if others is None:
        return (
            f"round {number}: {one['wall_s']:.0f} s; nothing says what others used of the machine"
        )
    return f"round {number}: {one['wall_s']:.0f} s, others used {others:.1f} s of CPU meanwhile"
