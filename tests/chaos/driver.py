"""The job as a process of its own: its real command line, with the stand-in for its engine.

Usage: python -m tests.chaos.driver OPTIONS_AS_JSON FLAGS...
"""

import json
import sys
from functools import partial
from typing import Any

import _bootstrap  # noqa: F401

from trio.job import command, runner  # isort: skip  (first, as in a job: it quietens Ray)
from tests.chaos.engine import Options, build, build_preprocessor
from trio.job.runner import Makers

JOB = command.Job(name="chaos", description="")

if __name__ == "__main__":
    options = Options(**json.loads(sys.argv[1]))
    preprocessor: Any = partial(build_preprocessor, options)  # as far as the stages use one
    makers = Makers(engine=partial(build, options), preprocessor=preprocessor)
    runner.execute = partial(runner.execute, makers=makers)
    raise SystemExit(command.main(JOB, sys.argv[2:]))
