"""Units to actors and receipts back, whatever dies in between. Ray core; knows nothing of models.

An actor that dies gives its units back at once: the next free actor takes them, and another actor
is asked for in its place, which Ray puts wherever there is room, also on a node that joins later.
Ray Data's actor pool would keep a dead actor's tasks for its own restart, retry a row that kills
its process for ever, and wait in silence for a cluster that is too small.

A unit whose actor died twice is suspected: it is done alone, and if that dies too, row by row. A
row on which the process dies again becomes an error row (`quarantined`), and nothing else is lost.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from trio.errors import JobFailed, UserError
from trio.job.actor import BEAT, EngineActor, Receipt
from trio.job.input.manifest import Shard
from trio.job.input.reader import ShardChanged, ShardGone, ShardUnreadable
from trio.job.input.units import Unit
from trio.job.output.totals import Totals, merge
from trio.job.storage import exists, locate
from trio.job.work import WorkQueue
from trio.tables import counted

SUSPECT_DEATHS = 2
# deaths of actors that had a unit in hand, from which on it is done alone
ROW_DEATHS = 2
# deaths on one row, done alone, that quarantine it
READ_TRIES, WRITE_TRIES = 3, 5
# of a unit, before its rows become errors, and before the job fails
START_TRIES = 3
# failures in a row of engines to start, before the job fails
BARREN_DEATHS = 12
# deaths in a row without anything done in between, before the job fails
PAUSES_S = (1.0, 5.0, 20.0, 60.0)
# before the next try of what failed once, twice, ...
DEAD_PAUSE_S = 15.0
# at least, where a process died as it started: Ray goes on to use a dead node for so long
BEAT_EVERY_S, SAY_EVERY_S = 5.0, 30.0
GPU_PAUSE_S = 5.0
FETCH_S = 60.0
# to bring a result here that is ready
ROOM_S, LEAST_ROOM_S = 180.0, 60.0
# for Ray to find room for the first engine and start its process; and what a user may lower it to


class Stopped(JobFailed):
    """The run was asked to stop, and did."""


@dataclass(slots=True)
class Stop:
    """A request to stop, for a signal handler to set."""

    asked_at: float | None = None
    # on the monotonic clock [s]

    def __call__(self) -> None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds after which the dispatcher gives something up."""

    room_s: float = ROOM_S
    # until Ray finds room for the first engine
    stall_s: float = 600.0
    # an engine with work in hand in which nothing moves is taken for dead
    start_s: float = 3600.0
    # for an engine to load its model
    grace_s: float = 60.0
    # for units in hand when asked to stop


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorOptions:
    """How many actors, what each asks Ray for, and how many units each works on at a time."""

    actors: int
    num_cpus: float
    num_gpus: float
    calls: int


@dataclass(slots=True)
class _Suspect:
    """A unit that is done alone, then row by row."""

    unit: Unit
    by_rows: bool = False
    rows: list[tuple[dict[str, Any], Totals]] = field(default_factory=list)
    deaths: int = 0
    # on the row that is next

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.unit.stop - self.unit.start


@dataclass(frozen=True, slots=True)
class _Call:
    """What an actor was asked to do."""

    kind: str
    # place, start, beat; answer, alone, row, rows, refuse
    unit: Unit | None = None
    suspect: _Suspect | None = None


@dataclass(eq=False, slots=True)
class _Slot:
    """Room for one actor, and the actor in it."""

    number: int
    handle: Any = None
    node: str | None = None
    ready: bool = False
    calls: dict[Any, _Call] = field(default_factory=dict)
    turn: int = 0
    # reads asked for so far
    born: float = 0.0
    # when the actor was asked for
    since: float = 0.0
    # when it last moved on: was placed, or did anything
    beat: int = -1
    asked: float = 0.0
    # when its pulse was last taken
    not_before: float = 0.0
    # no new actor in this slot before
    cautious: bool = False
    # takes suspects only

    def hands(self) -> list[_Call]:
        """Calls that have work in them."""
        return [call for call in self.calls.values() if call.unit is not None]


class Dispatcher:
    """One run's actors; ``receipts`` is to be called once."""

    def __init__(
        self,
        queue: WorkQueue,
        shards: Mapping[int, Shard],
        options: ActorOptions,
        arguments: Sequence[Any],
        *,
        limits: Limits,
        sharing: Callable[[str], int],
        stop: Stop,
        watch: Callable[[], None],
        committed: Callable[[Unit], Totals | None],
        say: Callable[[str], None],
    ) -> None:
        """Prepare.

        Args:
            queue: what is to be done.
            shards: by number.
            options: of the actors.
            arguments: of ``EngineActor``.
            limits: when to give up.
            sharing: how many of the engines are on a node, by its id.
            stop: looked at once a second.
            watch: called once a second; what it raises ends the run.
            committed: totals of a unit if its rows are there, asked before it is done again.
            say: takes one line for the user.
        """
        self._queue, self._shards, self._options = queue, shards, options
        self._limits, self._stop, self._committed, self._say = limits, stop, committed, say
        self._watch, self._sharing = watch, sharing
        self._suspects: deque[_Suspect] = deque()
        self._delayed: list[tuple[float, Unit]] = []
        self._deaths: Counter[Unit] = Counter()
        self._failures: dict[Unit, list[tuple[str, str]]] = {}
        # kind and reason of each
        self._lost: set[int] = set()
        # numbers of shards that changed or went: what is left of them is errors
        self._slots = [_Slot(number) for number in range(options.actors)]
        self._failed_starts = self._barren = 0
        self._counted = float("-inf")
        # when the last failure or death was counted: of actors asked for before, it is the same one
        self._said = time.monotonic()
        self._arguments = tuple(arguments)
        # Ray's types know neither this option nor what its wrappers add to a class.
        remote: Any = ray.remote
        self._remote = remote(concurrency_groups={BEAT: 1})(EngineActor).options(
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus or None,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=options.calls + 1,
            scheduling_strategy="SPREAD",
        )

    def receipts(self) -> Generator[Receipt | dict[str, Any]]:
        """Receipts of units as they are committed, in any order, each unit once; and the memory
        plan (a dict) of every engine that is ready.

        Raises:
            UserError: what an engine says when it starts, or of a shard, that the user can mend.
            JobFailed: no engine starts, or all keep dying.
            Stopped: on request.
        """
        try:
            while not self._done():
                self._fill_slots()
                self._hand_out()
                for ref in self._await():
                    yield from self._settle(ref)
                yield from self._look_after()
                self._watch()
        finally:
            for slot in self._slots:
                self._kill(slot)

    def _done(self) -> bool:
        busy = any(slot.hands() for slot in self._slots)
        if not (busy or self._queue or self._suspects or self._delayed):
            return True
        asked_at = self._stop.asked_at
        if asked_at is not None and (
            not busy or time.monotonic() > asked_at + self._limits.grace_s
        ):
            raise Stopped("stopped; the same command with the same --output goes on")
        return False

    def _await(self) -> list[Any]:
        """Calls that have come back, after at most a second."""
        refs = [ref for slot in self._slots for ref in slot.calls]
        if not refs:
            time.sleep(0.2)
            return []
        ready, _ = ray.wait(refs, timeout=1.0)
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if ready else []

    # Actors come and go.

    def _fill_slots(self) -> None:
        if self._stop.asked_at is not None:
            return
        now = time.monotonic()
        left = len(self._queue) + len(self._suspects) + len(self._delayed)
        wanted = left + sum(len(slot.hands()) for slot in self._slots)
        standing = sum(slot.handle is not None for slot in self._slots)
        for slot in self._slots:
            if slot.handle is None and now >= slot.not_before and standing < wanted:
                slot.handle = self._remote.remote(*self._arguments)
                slot.born = slot.since = slot.asked = now
                slot.beat, slot.turn = -1, 0
                slot.calls[slot.handle.place.remote()] = _Call("place")
                standing += 1

    def _look_after(self) -> Iterator[Receipt]:
        """The pulse of engines at work, and the limits of those that start."""
        now, limits = time.monotonic(), self._limits
        for slot in self._slots:
            if slot.ready and not slot.hands():
                slot.since = now
            elif slot.ready and now - slot.since > limits.stall_s:
                yield from self._lose(slot, f"nothing moved in it for {limits.stall_s:.0f} s")
            elif slot.node and not slot.ready and now - slot.since > limits.start_s:
                self._failed_start(slot, f"not ready after {limits.start_s:.0f} s")
            elif slot.ready and now - slot.asked >= min(BEAT_EVERY_S, limits.stall_s / 3):
                slot.asked = now
                if not any(call.kind == "beat" for call in slot.calls.values()):
                    slot.calls[slot.handle.beat.remote()] = _Call("beat")
        if not any(slot.node for slot in self._slots):
            self._check_room(now)

    def _check_room(self, now: float) -> None:
        """No actor has a place: say so, and give up in the end."""
        waiting = [slot.since for slot in self._slots if slot.handle is not None]
        if not waiting:
            return
        waited = now - min(waiting)
        if waited <= self._limits.room_s and now - self._said <= SAY_EVERY_S:
            return
        have, free = ray.cluster_resources(), ray.available_resources()
        state = (
            f"no room for an engine ({self._options.num_cpus:g} CPUs and"
            f" {self._options.num_gpus:g} GPUs) for {waited:.0f} s: Ray has"
            f" {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, of which"
            f" {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
        )
        if waited > self._limits.room_s:
            raise JobFailed(f"{state}; --wait-for-nodes SECONDS waits longer")
        self._said = now
        self._say(state)

    def _another(self, slot: _Slot) -> bool:
        """Whether what ended this actor is to be counted: a node or a hub that fails ends many."""
        if slot.born <= self._counted or (slot.node and not _alive(slot.node)):
            return False
        self._counted = time.monotonic()
        return True

    def _failed_start(self, slot: _Slot, reason: str, *, died: bool = False) -> None:
        self._failed_starts += self._another(slot)
        self._kill(slot)
        if self._failed_starts >= START_TRIES and not any(s.ready for s in self._slots):
            raise JobFailed(f"engines failed to start {self._failed_starts} times: {reason}")
        pause = max(_pause(self._failed_starts), DEAD_PAUSE_S if died else 0.0)
        slot.not_before = time.monotonic() + pause
        self._say(f"an engine did not start ({reason}); next try in {pause:.0f} s")

    def _kill(self, slot: _Slot) -> None:
        if slot.handle is not None:
            ray.kill(slot.handle)
        self._queue.forget(slot.number)
        slot.handle, slot.node, slot.ready, slot.cautious = None, None, False, False
        slot.calls.clear()

    # Work goes out.

    def _hand_out(self) -> None:
        if self._stop.asked_at is not None:
            return
        now = time.monotonic()
        self._queue.give_back([unit for at, unit in self._delayed if at <= now])
        self._delayed = [(at, unit) for at, unit in self._delayed if at > now]
        ready = [slot for slot in self._slots if slot.ready]
        if self._suspects and ready and not any(slot.cautious for slot in ready):
            min(ready, key=lambda slot: len(slot.hands())).cautious = True
        # One unit to each in turn, so that few units are shared out evenly.
        for _ in range(self._options.calls):
            for slot in ready:
                if slot.cautious:
                    self._hand_suspect(slot)
                elif len(slot.hands()) < self._options.calls:
                    unit = self._queue.take(slot.number)
                    if unit is not None:
                        self._ask(slot, _Call("answer", unit))

    def _hand_suspect(self, slot: _Slot) -> None:
        if slot.hands():
            return
        if not self._suspects:
            slot.cautious = False
            return
        suspect = self._suspects.popleft()
        if suspect.deaths > ROW_DEATHS:
            reason = "the process died while it read or wrote these rows"
            self._failures[suspect.unit] = [(ShardUnreadable.kind, reason)]
            self._ask(slot, _Call("refuse", suspect.unit))
            return
        kind = "alone" if not suspect.by_rows else "rows" if suspect.whole else "row"
        self._ask(slot, _Call(kind, suspect.unit, suspect))

    def _ask(self, slot: _Slot, call: _Call) -> None:
        assert call.unit is not None
        actor, unit, suspect = slot.handle, call.unit, call.suspect
        shard = self._shards[unit.shard]
        if not slot.hands():
            slot.since = time.monotonic()
        if call.kind in ("answer", "alone"):
            ref = actor.answer.remote(shard, unit, slot.turn)
            slot.turn += 1
        elif call.kind == "refuse":
            ref = actor.refuse.remote(shard, unit, *self._failures[unit][-1])
        elif call.kind == "rows":
            assert suspect is not None
            rows, totals = [row for row, _ in suspect.rows], merge(t for _, t in suspect.rows)
            ref = actor.commit_rows.remote(unit, rows, totals)
        else:
            assert suspect is not None
            died = f"the process died {suspect.deaths} times while on this row alone"
            refusal = died if suspect.deaths >= ROW_DEATHS else None
            ref = actor.answer_row.remote(shard, unit, len(suspect.rows), refusal)
        slot.calls[ref] = call

    # Answers, failures and deaths come back.

    def _settle(self, ref: Any) -> Iterator[Receipt | dict[str, Any]]:
        slot = next((slot for slot in self._slots if ref in slot.calls), None)
        if slot is None:
            # Its actor was lost over another call.
            return
        try:
            value = ray.get(ref, timeout=FETCH_S)
        except RayTaskError as error:
            yield from self._failed(slot, ref, error.cause or error)
        except RayError as error:
            if slot.ready:
                yield from self._lose(slot, _reason(error))
            else:
                self._failed_start(slot, _reason(error), died=True)
        else:
            yield from self._succeeded(slot, slot.calls.pop(ref), value)

    def _succeeded(
        self, slot: _Slot, call: _Call, value: Any
    ) -> Iterator[Receipt | dict[str, Any]]:
        now = time.monotonic()
        if call.kind == "beat":
            if value != slot.beat:
                slot.beat, slot.since = value, now
            return
        slot.since = now
        if call.kind == "place":
            slot.node = value
            slot.calls[slot.handle.start.remote(self._sharing(value))] = _Call("start")
        elif call.kind == "start":
            slot.ready, self._failed_starts = True, 0
            yield value
        elif call.kind == "row":
            assert call.suspect is not None
            self._barren = call.suspect.deaths = 0
            call.suspect.rows.append(value)
            self._suspects.appendleft(call.suspect)
        else:
            yield self._received(value)

    def _received(self, receipt: Receipt) -> Receipt:
        self._barren = 0
        self._deaths.pop(receipt.unit, None)
        self._failures.pop(receipt.unit, None)
        return receipt

    def _failed(self, slot: _Slot, ref: Any, cause: BaseException) -> Iterator[Receipt]:
        """A call raised in an actor that lives."""
        call, reason = slot.calls[ref], _reason(cause)
        if call.unit is not None and isinstance(cause, ShardUnreadable | OSError):
            del slot.calls[ref]
            self._put_off(slot, call.unit, cause, reason)
        elif isinstance(cause, UserError) and not (call.kind == "start" and self._others(slot)):
            raise UserError(str(cause)) from cause
        elif call.unit is None:
            self._failed_start(slot, reason)
        else:
            yield from self._lose(slot, reason)

    def _others(self, slot: _Slot) -> bool:
        return any(other.ready for other in self._slots if other is not slot)

    def _put_off(self, slot: _Slot, unit: Unit, cause: Exception, reason: str) -> None:
        """A unit that could not be read or written is tried again later, a few times."""
        tried = self._failures.setdefault(unit, [])
        lost = isinstance(cause, ShardChanged | ShardGone)
        kind = cause.kind if isinstance(cause, ShardUnreadable) else ""
        tried.append((kind, str(cause) if lost else reason))
        if kind and (len(tried) >= READ_TRIES or (lost and unit.shard in self._lost)):
            if lost:
                self._lose_shard(unit.shard, cause)
            else:
                self._say(f"{reason}: rows {unit.start} to {unit.stop} become errors")
            self._ask(slot, _Call("refuse", unit))
        elif len(tried) >= WRITE_TRIES:
            raise JobFailed(f"rows/{unit.name} failed {len(tried)} times: {reason}")
        else:
            pause = _pause(len(tried))
            self._say(f"rows/{unit.name}: {reason}; next try in {pause:.0f} s")
            self._delayed.append((time.monotonic() + pause, unit))

    def _lose_shard(self, number: int, cause: Exception) -> None:
        """A shard that somebody replaced or removed costs its own rows; said once.

        Raises:
            UserError: the shard is gone, and not alone: a mount or a node is at fault, which will
                be mended, and the run goes on from here then.
        """
        if number in self._lost:
            return
        if isinstance(cause, ShardGone) and not self._alone_gone(number):
            raise UserError(str(cause))
        self._lost.add(number)
        self._say(f"{cause}: its rows that are not answered yet become errors")

    def _alone_gone(self, number: int) -> bool:
        """Whether a shard is gone, as seen from here, and a neighbour of it in the input is not."""
        near = [n for n in (number, number - 1, number + 1) if n in self._shards]
        try:
            itself, *others = (exists(locate(self._shards[n].path)) for n in near)
        except OSError:
            return False
        return not itself and any(others)

    def _lose(self, slot: _Slot, reason: str) -> Iterator[Receipt]:
        """The actor is gone or of no more use. What it had in hand is received if it is there after
        all, else done again."""
        calls, slot_node, charge = slot.hands(), slot.node, _alive(slot.node)
        self._barren += self._another(slot)
        self._kill(slot)
        if self._options.num_gpus:
            # The next engine must not take the dead one's memory, still held, for somebody's.
            slot.not_before = time.monotonic() + GPU_PAUSE_S
        if self._barren >= BARREN_DEATHS:
            raise JobFailed(f"engines died {self._barren} times with nothing done: {reason}")
        if calls:
            self._say(f"an engine died ({reason}); {counted(len(calls), 'unit')} done again")
        for call in calls:
            assert call.unit is not None
            totals = self._there(call.unit)
            if totals is not None:
                node = slot_node or ""
                receipt = Receipt(unit=call.unit, totals=totals, node=node)
                yield self._received(receipt)
            else:
                self._again(call, charge)

    def _there(self, unit: Unit) -> Totals | None:
        """Totals of a unit whose commit nobody lived to tell; None where that cannot be seen."""
        try:
            return self._committed(unit)
        except OSError:
            return None

    def _again(self, call: _Call, charge: bool) -> None:
        unit, suspect = call.unit, call.suspect
        assert unit is not None
        if suspect is None:
            self._deaths[unit] += charge
            if self._deaths[unit] < SUSPECT_DEATHS:
                self._queue.give_back([unit])
            else:
                self._suspects.append(_Suspect(unit))
            return
        if call.kind in ("row", "rows"):
            suspect.deaths += charge
        suspect.by_rows |= charge
        self._suspects.appendleft(suspect)


def _alive(node: str | None) -> bool:
    """Whether Ray believes in the node: a death with its node says nothing about the rows."""
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def _pause(failures: int) -> float:
    return PAUSES_S[min(max(failures, 1), len(PAUSES_S)) - 1]


def _reason(error: BaseException) -> str:
    """The line of an exception that says most: the last one that names an error, else the first."""
    if not isinstance(error, RayError):
        return f"{type(error).__name__}: {error}"[:300]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    died = re.search(r"The actor is dead because (.*?)\.(?: Worker exit type: (\w+))?", str(error))
    dead = [f"{died[1]} ({died[2]})" if died[2] else died[1]] if died else []
    return (*reversed(named), *dead, *lines, type(error).__name__)[0][:300]
