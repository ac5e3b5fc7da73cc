"""Passes over the units that have no file yet: Ray Data in an actor, the driver beside it.

A pass is one execution of a dataset: `stages.read`, `prepare`, `answer`. Ray retries nothing in it.
When a process dies, what it had in hand is lost and all else goes on; when the dataset ends, what
is missing goes into the next pass (`quarantine`). Each pass has an actor of its own, so that the
driver stays free to look after lease, signals, room and engines once a second, and can end a pass
at any time.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trio.errors import JobFailed, UserError
from trio.job import stages
from trio.job.desk import ALIVE_S, Board, Desk, Gauges, Note
from trio.job.input.manifest import Manifest
from trio.job.input.reader import ShardUnreadable
from trio.job.input.units import Unit, runs
from trio.job.nodes.cluster import nodes
from trio.job.nodes.placement import Need, spare_cpus
from trio.job.quarantine import PassPlan
from trio.job.stages import OTHERS, Receipt, Run, Task
from trio.tables import counted

LOOK_S, SAY_EVERY_S = 1.0, 30.0
START_TRIES = 3
# failures of engines to start with none ready, before the job fails
BARREN_DEATHS = 12
# deaths of engines with nothing done in between, before the job fails
ROOM_S, LEAST_ROOM_S = 180.0, 60.0
# for Ray to find room for the first engine; and what a user may lower it to
STILL_S = 300.0
# beyond the limits of a row and of a step: nothing moves in the whole pass, which is ended
ANSWER_S = 30.0
# for the pass's actor to answer
NOTICE_S = 16.0
# in which Ray notices that a node is gone
RUNS_PER_ENGINE = 4
PREPARE_BYTES = 4 << 20
# of encoded images that make one more task for them worth its start
ROW_BYTES = 16 << 10
# for which a row counts at least: the image to which a path leads is not in the shard
MOVES = ("alive", "preparing", "ready")
# notes that tell of work; engines that fail to start again and again are none
QUIET = {"running": 0.0}
# of an engine's gauges, where it has said nothing for a while


class Stopped(JobFailed):
    """The run was asked to stop, and did."""


@dataclass(slots=True)
class Stop:
    """A request to stop, for a signal handler to set."""

    asked_at: float | None = None
    """On the monotonic clock [s]."""

    def __call__(self) -> None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What the stages take of the cluster."""

    engines: int
    calls: int
    """Units that an engine has in hand at a time, in a pass over long runs."""
    engine: Need
    """Of each."""
    prepare_tasks: int
    prepare_cpus: float
    """Of each task; 0 where the engines have taken all."""

    def engines_for(self, units: int, calls: int | None = None) -> int:
        """As many as so many units are worth; `calls`: of a pass that has fewer at a time."""
        return max(1, min(self.engines, -(-units // (calls or self.calls))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds after which something is given up."""

    room_s: float = ROOM_S
    """Until Ray finds room for the first engine."""
    still_s: float = STILL_S
    """In which nothing moves at all: the pass is ended."""
    start_s: float = 3600.0
    """Without any engine that is ready."""
    grace_s: float = 60.0
    """For units in hand when asked to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the actor of a pass is told."""

    name: str
    """Of the dataset in the dashboard, and the beginning of its engines' names."""
    task: Task
    runs: tuple[Run, ...]
    room: Room
    """Of this pass: no more than its units are worth."""
    commits: bool


class Pass(Board):
    """The actor that owns a pass's dataset: it ends, and its engines with it, when it is killed."""

    def run(self, work: Work) -> Iterator[list[Receipt]]:
        """Receipts as units come through."""
        import ray.data
        from ray.data import ActorPoolStrategy

        from trio.job.datasource import Units

        _set_context()
        desk, room = Desk(ray.get_runtime_context().current_actor), work.room
        source = Units(work.runs, work.task, desk)
        data = ray.data.read_datasource(
            source,
            num_cpus=0,
            concurrency=min(1 + 2 * room.engines, len(work.runs)),
            override_num_blocks=len(work.runs),
            ray_remote_args={"max_retries": 0},
        )
        data = data.map_batches(
            stages.prepare,
            fn_args=(work.task, desk),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=room.prepare_cpus,
            memory=1,  # else Ray would join it with the stage before where neither takes a CPU
            concurrency=room.prepare_tasks,
            max_retries=0,
        )
        numbers = itertools.count(1)
        data = data.map_batches(
            stages.answer,
            fn_constructor_args=(work.task, desk, work.commits),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=room.engine.cpus,
            num_gpus=room.engine.gpus or None,
            compute=ActorPoolStrategy(
                size=room.engines,
                max_tasks_in_flight_per_actor=room.calls,
                max_concurrent_calls_per_actor=room.calls,
                enable_true_multi_threading=room.calls > 1,
            ),
            ray_remote_args_fn=lambda: {"name": f"{work.name} engine {next(numbers)}"},
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        data.set_name(work.name)
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield stages.receipts_of(batch)


def _set_context() -> None:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.target_max_block_size = 1  # a block is a unit
    context.execution_no_progress_timeout_s = -1
    context.memory_usage_poll_interval_s = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False


@dataclass(slots=True)
class _Engines:
    """What the engines of a pass have said."""

    nodes: dict[str, str] = field(default_factory=dict)
    """Of those that have begun."""
    ready: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    """Those that have said themselves why they end; they are to begin again."""
    settled: dict[str, int] = field(default_factory=dict)
    """Rows that each has answered."""
    gauges: dict[str, tuple[float, dict[str, float]]] = field(default_factory=dict)
    """What each has said last of what it is doing, and when [s]."""
    failures: int = 0
    """Of starts, with none ready since."""
    deaths: int = 0
    """With nothing done since."""
    asked: Any = None
    """A call for notes that has not come back."""
    ready_at: float = field(default_factory=time.monotonic)
    """When one was last ready, or else the pass began [s]."""

    def now(self, received: int) -> Gauges:
        """received: rows that are committed. An engine that has long said nothing has no work."""
        since, engines = time.monotonic() - 2 * ALIVE_S, {}
        for name in self.ready:
            said_at, said = self.gauges.get(name, (since, {}))
            engines[name] = said if said_at > since else said | QUIET
        return Gauges(max(0, sum(self.settled.values()) - received), engines)


class Passes:
    """The driver's side: one pass after another, watched."""

    def __init__(
        self,
        task: Task,
        manifest: Manifest,
        room: Room,
        *,
        limits: Limits,
        name: str,
        stop: Stop,
        watch: Callable[[], None],
        say: Callable[[str], None],
        ready: Callable[[Mapping[str, Any]], None],
        alive: Callable[[Gauges], None],
    ) -> None:
        """Prepare.

        Args:
            task: of the stages.
            manifest: the input.
            room: what the stages take.
            limits: when to give up.
            name: of the datasets.
            stop: looked at once a second.
            watch: called once a second; what it raises ends the run.
            say: takes one line for the user.
            ready: told what an engine says of itself when it is ready.
            alive: told once a second what the engines of this pass are doing.
        """
        self._task, self._manifest, self._room, self._limits = task, manifest, room, limits
        self._shards = {shard.number: shard for shard in manifest.shards}
        self._name, self._stop = name, stop
        self._watch, self.say, self._ready, self._alive = watch, say, ready, alive
        self._lost: set[int] = set()
        # numbers of shards of which was said that they are others now, or gone

    def check_stop(self) -> None:
        """To be called where something is open after a pass.

        Raises:
            Stopped: the run was asked to stop.
        """
        if self._stop.asked_at is not None:
            raise Stopped("stopped; the same command with the same --output goes on")

    @property
    def in_hand(self) -> int:
        """Most units that a few dead processes may have had: more of them, and a node is gone."""
        return 4 * self._room.engines * self._room.calls

    def run(self, plan: PassPlan) -> Generator[Receipt, None, bool]:
        """Receipts of a pass, in any order; returns whether it was disturbed: what is missing then
        was lost with a node, or with the pass itself, and says nothing about the rows.

        Raises:
            UserError: what an engine says when it starts, or of the input, that the user can mend.
            JobFailed: no engine starts, or all keep dying, or the output cannot be written.
        """
        if plan.why:
            self.say(plan.why)
        work, all_engines = self._work(plan), self._room.engines
        if plan.number == 0 and work.room.engines < all_engines:
            few = counted(len(plan.units), "unit")
            self.say(f"{work.room.engines} of {all_engines} engines are enough for {few} of work")
        before = alive_nodes()
        board = self._actor(later=plan.number > 0)
        try:
            ended_early = yield from self._receipts(board, work)
        finally:
            ray.kill(board)
        return ended_early or _node_lost(before, patient=plan.kind == "rows")

    def _actor(self, *, later: bool) -> Any:
        remote: Any = ray.remote  # Ray's types do not know what its wrappers add to a class
        here = ray.get_runtime_context().get_node_id()
        return (
            remote(Pass)
            .options(
                num_cpus=0,
                max_concurrency=64,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(later=later)
        )

    def _work(self, plan: PassPlan) -> Work:
        long = plan.kind == "long"
        calls = self._room.calls if long else 1
        engines = self._room.engines_for(len(plan.units), calls)
        cut: list[tuple[Unit, ...]] = [(unit,) for unit in plan.units]
        if long:
            parallel = RUNS_PER_ENGINE * engines
            cut = [tuple(run) for run in runs(self._manifest, plan.units, parallel)]
        return Work(
            name=f"{self._name} pass {plan.number}",
            task=self._task,
            runs=tuple(map(self.a_run, cut)),
            room=dataclasses.replace(
                self._room,
                engines=engines,
                calls=calls,
                prepare_tasks=self._prepare_tasks(plan.units),
                # Where nodes are gone engines may take all CPUs.
                prepare_cpus=self._room.prepare_cpus if self._room_for_images(engines) else 0.0,
            ),
            commits=plan.kind != "rows",
        )

    def _room_for_images(self, engines: int) -> bool:
        """Whether engines leave a CPU; where there is no node at all, some are to come."""
        there = nodes()
        spare = spare_cpus(there, self._room.engine, engines)
        return spare > 0 or not any(node.cpus for node in there)

    def _prepare_tasks(self, units: Sequence[Unit]) -> int:
        """Few for little work: each loads the model's preprocessor, which takes some seconds."""
        rows = sum(unit.stop - unit.start for unit in units)
        row_bytes = max(ROW_BYTES, self._manifest.size // max(self._manifest.rows, 1))
        return max(1, min(self._room.prepare_tasks, -(-rows * row_bytes // PREPARE_BYTES)))

    def a_run(self, units: Sequence[Unit]) -> Run:
        numbers = sorted({unit.shard for unit in units})
        first, last = numbers[0], numbers[-1]
        around = [*range(first - OTHERS, first), *range(last + 1, last + 1 + OTHERS)]
        others = [self._shards[n].place for n in around if n in self._shards]
        mine = {number: self._shards[number] for number in numbers}
        return Run(units=tuple(units), shards=mine, others=tuple(others))

    def _receipts(self, board: Any, work: Work) -> Generator[Receipt, None, bool]:
        """Returns whether the pass was ended before it was through."""
        stream = board.run.options(num_returns="streaming").remote(work)
        engines, began = _Engines(), time.monotonic()
        moved = looked = said = began
        asked, received = False, 0
        while True:
            came, _ = ray.wait([stream], timeout=LOOK_S)
            if came:
                try:
                    batch = ray.get(next(stream))
                except StopIteration:
                    self._listen(board, engines)
                    return False
                except RayTaskError as error:
                    self._listen(board, engines)  # which may know why
                    raise JobFailed(f"Ray Data failed: {reason_of(error)}") from error
                except RayError as error:
                    self.say(f"the pass ended early: {reason_of(error)}")
                    return True
                moved, engines.deaths = time.monotonic(), 0
                received += sum(receipt.totals.rows for receipt in batch)
                yield from batch
            now = time.monotonic()
            if now - looked < LOOK_S:
                continue
            looked = now
            self._watch()
            if self._listen(board, engines):
                moved = now
            if work.room.prepare_cpus and not self._room_for_images(work.room.engines):
                self.say("nodes are gone, and engines take all CPUs of the others: a new pass")
                return True
            self._alive(engines.now(received))
            if not engines.nodes and now - said > SAY_EVERY_S:
                said = now
                self.say(self._no_room(now - began))
            engines.ready_at = now if engines.ready else engines.ready_at
            self._check_start(engines, now - began, now - engines.ready_at)
            if engines.ready and now - moved > self._limits.still_s:
                self.say(f"nothing moved for {now - moved:.0f} s: the pass is ended")
                return True
            if self._stop.asked_at is not None:
                if not asked:
                    board.stop.remote()
                    asked = True
                if now > self._stop.asked_at + self._limits.grace_s:
                    return True

    def _listen(self, board: Any, engines: _Engines) -> bool:
        """Hear what has been noted; returns whether any of it is work that goes on."""
        notes = self._notes(board, engines)
        for note in notes:
            self._hear(note, engines)
        return any(note.kind in MOVES for note in notes)

    def _notes(self, board: Any, engines: _Engines) -> list[Note]:
        # A call that is late brings its notes later: another one would leave them to nobody.
        engines.asked = engines.asked or board.take.remote()
        try:
            notes: list[Note] = ray.get(engines.asked, timeout=ANSWER_S)
        except GetTimeoutError:
            return []
        except RayError:  # its end is seen in the stream
            notes = []
        engines.asked = None
        return notes

    def _hear(self, note: Note, engines: _Engines) -> None:
        match note.kind, note.what:
            case "begin", (name, node):
                if name in engines.nodes:
                    self._restarted(name, engines)
                engines.nodes[name] = node
            case "ready", (name, facts):
                engines.ready.add(name)
                engines.failures = 0
                self._ready(facts)
            case "failed", (name, reason, users):
                if users and not engines.ready:
                    raise UserError(reason)
                engines.told.add(name)
                self._failed(reason, engines)
            case "died", (name, reason):
                engines.told.add(name)  # it may not begin again in this pass: said now
                self._died(name, reason, engines)
            case "alive", (name, rows, gauges):
                engines.settled[name] = rows
                engines.gauges[name] = time.monotonic(), gauges
            case "unread", (unit, kind, message):
                self._unread(unit, kind, message)
            case "say", (line,):
                self.say(line)
            case "user", (line,):
                raise UserError(line)
            case "fail", (line,):
                raise JobFailed(line)

    def _failed(self, reason: str, engines: _Engines) -> None:
        """An engine could not be built; its process ends after a pause, or has ended."""
        engines.failures += 1
        if engines.failures >= START_TRIES and not engines.ready:
            raise JobFailed(f"engines failed to start {engines.failures} times: {reason}")
        self.say(f"an engine did not start ({reason}); it is tried again")

    def _restarted(self, name: str, engines: _Engines) -> None:
        """An engine begins again: its process has ended."""
        if name in engines.told:
            engines.told.discard(name)
        elif name in engines.ready:
            self._died(name, "its process died", engines)
        else:
            self._failed("its process died", engines)

    def _died(self, name: str, reason: str, engines: _Engines) -> None:
        engines.ready.discard(name)
        engines.deaths += 1
        if engines.deaths >= BARREN_DEATHS:
            raise JobFailed(f"engines died {engines.deaths} times with nothing done: {reason}")
        self.say(f"an engine died ({reason}); what it had in hand is done again")

    def _unread(self, unit: Unit, kind: str, message: str) -> None:
        if kind == ShardUnreadable.kind:
            self.say(f"{message}: rows {unit.start} to {unit.stop} become errors")
        elif unit.shard not in self._lost:
            self._lost.add(unit.shard)
            self.say(f"{message}: its rows that are not answered yet become errors")

    def _check_start(self, engines: _Engines, waited: float, unready: float) -> None:
        """Raise where no engine will come."""
        if not engines.nodes and waited > self._limits.room_s:
            raise JobFailed(f"{self._no_room(waited)}; --wait-for-nodes SECONDS waits longer")
        if engines.nodes and unready > self._limits.start_s:
            raise JobFailed(f"no engine has been ready for {unready:.0f} s")

    def _no_room(self, waited: float) -> str:
        have, free = ray.cluster_resources(), ray.available_resources()
        engine = self._room.engine
        return (
            f"no room for an engine ({engine.cpus:g} CPUs and {engine.gpus:g} GPUs)"
            f" for {waited:.0f} s: Ray has"
            f" {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, of which"
            f" {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
        )


def alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _node_lost(before: set[str], *, patient: bool) -> bool:
    """Whether one of the nodes is gone.

    patient: wait as long as Ray may take to notice, as what was lost with a node is no row's fault.
    """
    deadline = time.monotonic() + (NOTICE_S if patient and len(before) > 1 else 0.0)
    while not before - alive_nodes():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_S)
    return True


def reason_of(error: BaseException) -> str:
    """The line of an exception that says most: the last one that names an error, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    return (*reversed(named), *lines, type(error).__name__)[0][:300]
