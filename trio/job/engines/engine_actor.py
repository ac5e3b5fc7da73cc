"""An engine in a Ray actor: started, watched, asked, and its units committed.

A process that is of no more use says why and ends itself; Ray starts it anew, and what it had in
hand is done in a later pass.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import ray

from trio.engine.request import Prepared, Result
from trio.errors import JobFailed, UserError, kind_and_line
from trio.job.comparing.audit import Audit, columns_of
from trio.job.desk import ALIVE_S, Desk, Poll
from trio.job.engines.engine_thread import Asked, EngineDied, EngineThread, Outcome
from trio.job.images.policy import RowError
from trio.job.input.units import Unit
from trio.job.output import totals as sums
from trio.job.output.gallery import Prompted, gallery_rows
from trio.job.output.output_rows import Source, output_row, requests_of
from trio.job.output.sink import Answered
from trio.job.output.totals import Totals

if TYPE_CHECKING:
    from trio.job.stages import Task

WATCH_S = 1.0
# between two looks at an engine
GPU_PAUSE_S = 5.0
# before a process that was restarted takes a GPU: the dead one's memory may still be held
SECONDS = (
    "preprocess_wait_s", "encode_s", "encode_saved_s", "prefill_s", "prune_s", "decode_s", "idle_s",
)  # fmt: skip
DECODING = ("decode_rows", "decode_steps")
# sums over steps of the requests that ran together, and of the steps
KV = ("kv_used_bytes_peak", "kv_budget_bytes")
AS_THEY_ARE = (
    "kv_used_bytes_peak",
    "device_bytes_peak",
    "max_running",
    "batch_tokens",
    "kv_budget_bytes",
)
# peaks, and what an engine's limits are at the time


class Engine:
    """What an actor's calls share; they come from several threads."""

    def __init__(self, task: Task, desk: Desk) -> None:
        context = ray.get_runtime_context()
        self.name = context.get_actor_name() or context.get_actor_id() or f"process-{os.getpid()}"
        self.node = context.get_node_id()
        self._task, self._desk, self._poll = task, desk, Poll(desk)
        again = desk.begin(self.name, self.node)
        if again and task.engine.gpu:
            time.sleep(GPU_PAUSE_S)
        self._thread = self._started(again)
        self._reports = [
            _Report(partial(self._thread.counters, setting))
            for setting, _ in enumerate(task.engine.engines)
        ]
        self._of_audit = None if task.engine.audit is None else self._reports.pop()
        self._ready_at = time.monotonic()
        desk.note("ready", self.name, self._facts())
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @property
    def ready_s(self) -> float:
        """Seconds since it was."""
        return time.monotonic() - self._ready_at

    def stopped(self) -> bool:
        return self._poll.stopped()

    def answer(
        self, unit: Unit, found: Iterable[tuple[Source, Sequence[Any] | RowError]]
    ) -> Answered:
        """The unit's rows, each answered or in error; `found` are sources with their images."""
        asked = [one for source, images in found for one in self._asked(source, images)]
        # Several settings hold what they share until the last is through: no more than is ahead.
        size = self._task.engine.ahead if len(self._reports) > 1 else max(1, len(asked))
        parts = [self._answered(asked[n : n + size]) for n in range(0, len(asked), size)]
        totals = zip(*(part.parts for part in parts), strict=True)
        rows = tuple(row for part in parts for row in part.rows)
        shown = tuple(line for part in parts for line in part.gallery)
        return Answered(rows, tuple(map(sums.merge, totals)), gallery=shown)

    def _answered(self, asked: Sequence[tuple[Source, int, Asked]]) -> Answered:
        requests = [request for _, _, request in asked]
        settings, audit = range(len(self._reports)), self._task.rows.audit
        again = [
            place
            for place, (source, *_) in enumerate(asked)
            if len(settings) > 1 or (audit is not None and audit.chooses(source.key))
        ]
        outcomes = [self._outcomes(requests, setting, set(again)) for setting in settings]
        rows: list[dict[str, Any]] = []
        parts = [Totals() for _ in settings]
        together = zip(asked, zip(*outcomes, strict=True), strict=True)
        prompts: list[Prompted] = []
        for (source, number, _), of_settings in together:
            own = [self._row(source, number, s, outcome) for s, outcome in enumerate(of_settings)]
            for setting, outcome in enumerate(of_settings):
                parts[setting] += _totals(own[setting], source, outcome)
            rows += own
            prompts.append((source, own, of_settings))
        if audit is not None:
            audited = [place for place in again if rows[place].get("error") is None]
            self._audit(audit, audited, asked, requests, outcomes[0], rows)
            parts[0] += Totals(audited=len(audited))
        self._thread.release(requests)
        shown = gallery_rows(self._task.rows.gallery, prompts)
        return Answered(tuple(rows), tuple(parts), gallery=shown)

    def _outcomes(
        self, requests: list[Asked], setting: int, again: Container[int] = ()
    ) -> list[Outcome]:
        """As `EngineThread.answer`; the process ends where the engine has died."""
        try:
            return self._thread.answer(requests, setting, again)
        except EngineDied as error:
            self._end(str(error))

    def _audit(
        self,
        audit: Audit,
        audited: Sequence[int],
        asked: Sequence[tuple[Source, int, Asked]],
        requests: Sequence[Asked],
        outcomes: Sequence[Outcome],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        """Asks rows unpruned as well, and notes on them what comes out; `audited`: their places."""
        prepared = {p: one for p in audited if isinstance(one := requests[p], Prepared)}
        pruned = {p: own for p in audited if isinstance(own := outcomes[p], Result)}
        twice = [place for place in reversed(audited) if audit.repeats(asked[place][0].key)]
        forced = {
            place: dataclasses.replace(
                prepared[place], candidates=(tuple(own.token_ids),), explain=False
            )
            for place, own in pruned.items()
            if own.token_ids
        }
        setting = len(self._task.engine.prunings)
        once = self._outcomes(list(prepared.values()), setting)
        more = self._outcomes([*(prepared[p] for p in twice), *forced.values()], setting)
        repeats = dict(zip(twice, more, strict=False))
        tops = dict(zip(forced, more[len(twice) :], strict=True))
        for place, unpruned in zip(prepared, once, strict=True):
            source, number, _ = asked[place]
            other = self._row(source, number, 0, unpruned).get("response")
            said = rows[place]["response"], other
            rows[place].update(
                columns_of(pruned[place], unpruned, repeats.get(place), tops.get(place), said)
            )

    def commit(
        self, unit: Unit, answered: Answered, decode_node: str, prepare_s: float
    ) -> tuple[Totals, ...]:
        """Write a unit, its statistics with it; returns each setting's totals with what they took.

        Args:
            unit: whose rows these are.
            answered: all of them.
            decode_node: where its images were decoded.
            prepare_s: seconds that this took.
        """
        stats, parts = self.taken(answered, prepare_s)
        where = {"actor": self.name, "node": self.node, "decode_node": decode_node}
        stats = [own | where for own in stats]

        def tell(reason: str) -> None:
            self._desk.note("say", reason)

        try:
            self._task.sink.commit(
                unit, answered.rows, stats, parts, tell, answered.carried, answered.gallery
            )
        except JobFailed as error:
            self._desk.note("fail", str(error))
            self._desk.wait_for_the_end()
        return parts

    def taken(
        self, answered: Answered, prepare_s: float
    ) -> tuple[list[dict[str, Any]], tuple[Totals, ...]]:
        """What a unit took since the last one, by setting: the engine's part of its statistics, and
        its totals. Its images were prepared once, which is counted in the first."""
        found = [
            report.interval(part)
            for report, part in zip(self._reports, answered.parts, strict=True)
        ]
        (_, first), *others = found
        first += Totals(prepare_s=prepare_s)
        if self._of_audit is not None:
            _, spent = self._of_audit.interval(Totals())
            first += Totals(
                audit_s=spent.encode_s - spent.encode_saved_s + spent.prefill_s + spent.decode_s,
                preprocess_wait_s=spent.preprocess_wait_s,
                idle_s=spent.idle_s,
            )
        parts = first, *(part for _, part in others)
        return [stats for stats, _ in found], parts

    def _started(self, again: int) -> EngineThread:
        """The engine in its thread; where it does not start, the process ends after a pause."""
        task = self._task
        try:
            return EngineThread(partial(task.factory, task.engine), ahead=task.engine.ahead)
        except UserError as error:
            self._desk.last_note("failed", self.name, str(error), True)
        except Exception as error:
            self._desk.last_note("failed", self.name, kind_and_line(error, 300), False)
        time.sleep(task.pause_s(again + 1))
        os._exit(1)

    def _facts(self) -> dict[str, Any]:
        engine = self._thread.engine
        prepare = getattr(engine, "prepare", None)
        return {
            "memory_plan": engine.memory_plan.as_dict(),
            "images": getattr(prepare, "why_not_cut", None),
        }

    def _asked(
        self, source: Source, images: Sequence[Any] | RowError
    ) -> list[tuple[Source, int, Asked]]:
        """A row's requests with the number of their prompt; its error where it cannot be asked."""
        requests: Sequence[Asked]
        try:
            if isinstance(images, RowError):
                raise images
            requests = list(requests_of(source, images, self._task.rows))
        except RowError as error:
            requests = [error] * max(1, len(source.asks))
        return [(source, number, request) for number, request in enumerate(requests)]

    def _row(
        self, source: Source, prompt_number: int, setting: int, outcome: Outcome
    ) -> dict[str, Any]:
        return output_row(
            source,
            outcome,
            self._task.rows,
            actor=self.name,
            node=self.node,
            prompt_number=prompt_number,
            setting=setting,
        )

    def _watch(self) -> None:
        """Signs of life to the driver; the end of a process in which nothing moves."""
        seen, settled, since = -1, 0, time.monotonic()
        noted, noted_at = -1, since
        running = _Running()
        while True:
            time.sleep(min(WATCH_S, self._task.stall_s / 3))
            if self._thread.activity != seen or not self._thread.busy:
                seen, since = self._thread.activity, time.monotonic()
            elif time.monotonic() - since > self._task.stall_s:
                self._end(f"nothing moved in it for {self._task.stall_s:.0f} s")
            steps = self._thread.activity != noted and time.monotonic() - noted_at > ALIVE_S
            if self._thread.settled != settled or steps:
                settled, noted = self._thread.settled, self._thread.activity
                noted_at = time.monotonic()
                self._desk.note("alive", self.name, settled, self._gauges(running))

    def _gauges(self, running: _Running) -> dict[str, float]:
        """What the engines of all settings do: `running`, requests decoded together, on average
        since the last time; `kv_used_bytes_peak` and `kv_budget_bytes` of keys and values."""
        counters = list(map(self._thread.counters, range(self._thread.engines)))
        sums = {name: sum(c.get(name) or 0 for c in counters) for name in (*DECODING, *KV)}
        mean = running.mean(*(sums[name] for name in DECODING))
        return {"running": mean, **{name: sums[name] for name in KV}}

    def _end(self, reason: str) -> NoReturn:
        self._desk.last_note("died", self.name, reason)
        os._exit(1)


def _totals(row: Mapping[str, Any], source: Source, outcome: Outcome) -> Totals:
    reading = (0, 0)
    if isinstance(outcome, Result):
        flops = outcome.reading_flops, outcome.reading_flops_unpruned
        reading = round(flops[0] or 0), round(flops[1] or 0)
    return sums.of_row(row, source.asks[row["prompt_number"]].answers, reading)


class _Running:
    """Requests that ran together in the decode steps since the last look."""

    def __init__(self) -> None:
        self._rows = self._steps = 0.0

    def mean(self, rows: float, steps: float) -> float:
        """rows, steps: sums since the engine's start, as in `DECODING`."""
        new_rows, new_steps = rows - self._rows, steps - self._steps
        self._rows, self._steps = rows, steps
        return new_rows / new_steps if new_steps > 0 else 0.0


class _Report:
    """Cuts an engine's growing counters into intervals that add up to them.

    Counts of images and tokens are the unit's own; seconds are what the engine spent since its
    previous report, on whichever units were under way.
    """

    def __init__(self, counters: Callable[[], Mapping[str, Any]]) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._since = datetime.datetime.now(datetime.UTC)
        self._before: Mapping[str, Any] = {}

    def interval(self, totals: Totals) -> tuple[dict[str, Any], Totals]:
        """What the unit's row of stats/ says of the engine, and its totals with the engine's
        seconds."""
        with self._lock:
            now, counters = datetime.datetime.now(datetime.UTC), self._counters()
            before, self._before = self._before, counters
            start, self._since = self._since, now
        growing = (*SECONDS, *DECODING, "out_of_memory", "images_encoded")
        spent = {n: counters[n] - before.get(n, 0) for n in growing if n in counters}
        rows, steps = (spent.pop(name, 0) for name in DECODING)
        graphs = counters.get("cuda_graphs")
        totals += Totals(
            cuda_graphs={graphs: 1} if graphs else {},
            **spent,
        )
        stats = {
            "start": start,
            "end": now,
            "running_mean": rows / steps if steps else None,
            **{name: counters.get(name) for name in AS_THEY_ARE},
        }
        return stats, totals
