"""Measures what pruning keeps and costs.

example:
  python jobs/benchmark.py quality --methods trio,fastv --retention 1/3,1/9
  python jobs/benchmark.py speed --help
"""

import _bootstrap  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence

from trio.benchmark import commands


def main(argv: Sequence[str] | None = None) -> int:
    return commands.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
