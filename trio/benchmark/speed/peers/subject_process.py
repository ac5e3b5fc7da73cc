"""One subject of the comparison: a process of its own, which is told and answers in lines."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

SERVE = Path(__file__).with_name("serve.py")
START_LIMIT_S, ANSWER_LIMIT_S = 1800.0, 1800.0
"""After which a subject counts as hung. Starting includes exporting and compiling a model."""
LOG_LINES = 100
_EXCEPTION = re.compile(r"(\(.*?\) )?[\w.]*(Error|Exception|Interrupt)\b")
"""How the last line of a traceback begins, behind the name that vLLM gives a process."""
_LOOK_S = 0.2
"""Between two looks at whether a silent process still lives."""
_END_S = 10.0


class SubjectFailed(RuntimeError):
    """A subject did not start, ended, or did not answer as asked; in one line.

    log: the last lines that it wrote to standard error, where it has ended.
    """

    def __init__(self, message: str, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = list(log)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """name: in the table. python: interpreter. module: that `serve.py` loads there. environment:
    its own variables."""

    name: str
    python: str
    module: str
    environment: Mapping[str, str]
    options: Mapping[str, Any]
    """Of its task, beside what all are told."""


class Running:
    """A subject that has started, and waits.

    Args:
        task: what all subjects are told.

    Raises:
        SubjectFailed: it did not start.
    """

    def __init__(self, subject: Subject, task: Mapping[str, Any]) -> None:
        self.name = subject.name
        self._errors = TemporaryFile()  # noqa: SIM115 -- closed in `close`
        try:
            self._process = subprocess.Popen(
                [subject.python, str(SERVE), subject.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=dict(subject.environment),
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise SubjectFailed(str(error)) from error
        try:
            self._ask({**task, **subject.options}, START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def answer(self, requests: Sequence[Mapping[str, str]], tokens: int) -> list[dict[str, Any]]:
        """Answers to requests, in their order, each of so many tokens.

        Raises:
            SubjectFailed: it ended, or gave others.
        """
        answers = self._ask(requests, ANSWER_LIMIT_S)
        if len(answers) != len(requests):
            raise SubjectFailed(f"gave {len(answers)} answers to {len(requests)} requests")
        wrong = [one["output_tokens"] for one in answers if one["output_tokens"] != tokens]
        if wrong:
            raise SubjectFailed(f"gave an answer of {wrong[0]} tokens instead of {tokens}")
        return list(answers)

    def cpu_s(self) -> float:
        """Seconds of CPU that its processes have used."""
        return session_cpu_s(self._process.pid)

    def close(self) -> None:
        """End it and all that it has started."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def _ask(self, message: object, limit_s: float) -> Any:
        """What it says to a line."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        end = time.monotonic() + limit_s
        while not select.select([stdout], [], [], _LOOK_S)[0]:
            # A process that it started may hold the pipe open when it has gone itself.
            if self._process.poll() is not None:
                break
            if time.monotonic() > end:
                raise SubjectFailed(f"said nothing for {limit_s:g} s")
        line = stdout.readline() if select.select([stdout], [], [], 0)[0] else b""
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> SubjectFailed:
        """With the last line of an exception, which warnings may follow, or its last at all."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        silent = f"ended with code {self._process.returncode}, and said nothing"
        last = next(filter(_EXCEPTION.match, reversed(said)), said[-1] if said else silent)
        return SubjectFailed(last, said[-LOG_LINES:])


def session_cpu_s(session: int) -> float:
    """Seconds of CPU that the processes of a session have used, and those that ended in it."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name: state, parent, group, session; later user and system time, of itself
            # and of children that have ended.
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def machine_cpu_s() -> float | None:
    """Seconds of CPU that this machine was busy or not given to it; None where nothing says so."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = map(int, first.split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
