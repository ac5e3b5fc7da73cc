"""`python -m trio.conformance DIR [--only NAME]`

Replays the recorded cases below DIR and prints the largest errors, and where a case can be compared
only up to a point, that point. Exit code 0: everything asked for passed; 1: a mismatch, or a kind
of case that is not supported yet; 2: DIR cannot be used.
"""

from __future__ import annotations

import trio.passive  # noqa: F401  # isort: skip

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from trio.conformance import eadp, trio_llama, trio_qwen, visionzip
from trio.conformance.checks import Checks
from trio.conformance.files import Case, read_cases
from trio.errors import UserError

_REPLAYS: dict[str, Callable[[Case], Checks]] = {
    "eadp": eadp.replay,
    "trio_llama": trio_llama.replay,
    "trio_qwen": trio_qwen.replay,
    "visionzip": visionzip.replay,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trio.conformance", description=__doc__)
    parser.add_argument("directory", type=Path, help="holds <kind>/index.json")
    parser.add_argument("--only", metavar="NAME", help="a kind, a case, or kind/case")
    options = parser.parse_args(arguments)
    try:
        return _run(_asked_for(read_cases(options.directory), options.only))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _asked_for(cases: list[Case], only: str | None) -> list[Case]:
    if only is None:
        return cases
    chosen = [case for case in cases if only in (case.kind, case.name, f"{case.kind}/{case.name}")]
    if not chosen:
        kinds = ", ".join(sorted({case.kind for case in cases}))
        raise UserError(f"--only {only}: no kind or case of that name; kinds here are {kinds}")
    return chosen


def _run(cases: list[Case]) -> int:
    passed = limited = 0
    unsupported: dict[str, int] = {}
    for case in cases:
        replay = _REPLAYS.get(case.kind)
        if replay is None:
            unsupported[case.kind] = unsupported.get(case.kind, 0) + 1
            continue
        checks = replay(case)
        passed += not checks.misses
        limited += checks.limit is not None and not checks.misses
        _report(case, checks)
    for kind, count in unsupported.items():
        print(f"{kind}: {count} cases not yet supported (not a pass)")
    partly = f", {limited} of them compared only so far" if limited else ""
    print(f"{passed} of {len(cases)} cases passed{partly}")
    return 0 if passed == len(cases) else 1


def _report(case: Case, checks: Checks) -> None:
    verdict = "FAIL" if checks.misses else "ok"
    print(f"{case.kind}/{case.name}: {verdict}, {checks.compared} comparisons")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in sorted(checks.errors.items()))
    print(f"    largest errors: {errors}")
    if checks.limit is not None:
        print(f"    {checks.limit}")
    for miss in checks.misses:
        print(f"    {miss}")


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main())
