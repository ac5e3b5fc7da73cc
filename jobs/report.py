"""A page about a run: what was said, which parts of each image stayed, what it cost.

"report.py OUT" writes OUT/report.html, one file that opens without a network; also about a run that
is under way, was stopped or has failed. OUT is the directory or URI that a job printed as its
output.

exit codes: 0 the page is written; 1 the storage failed; 2 the arguments are wrong, or no run lies
there

example:
  python jobs/report.py captions
"""

import _bootstrap  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence

from trio.report import report_command


def main(argv: Sequence[str] | None = None) -> int:
    return report_command.main(argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
