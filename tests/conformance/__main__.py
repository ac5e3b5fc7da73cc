"""`python -m tests.conformance DIR [--only NAME]`

Replays the recorded cases below DIR and prints the largest errors, and where a case can be compared
only up to a point, that point. Exit code 0: everything asked for passed; 1: a mismatch, or a kind
of case that is not replayed here, which is named and skipped; 2: DIR cannot be used.
"""

from __future__ import annotations

import trio.passive  # noqa: F401  # isort: skip

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.conformance import (
    cdpruner,
    eadp,
    eadp_anyres,
    eadp_qwen,
    eadp_siglip,
    prunesid,
    scope,
    trio_llama,
    trio_qwen,
    visionzip,
)
from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors, read_cases
from trio.errors import UserError

REPLAYS: dict[str, Callable[[Case, Tensors], Checks]] = {
    "cdpruner": cdpruner.replay,
    "eadp": eadp.replay,
    "eadp_anyres": eadp_anyres.replay,
    "eadp_qwen": eadp_qwen.replay,
    "eadp_siglip": eadp_siglip.replay,
    "prunesid": prunesid.replay,
    "scope": scope.replay,
    "trio_llama": trio_llama.replay,
    "trio_qwen": trio_qwen.replay,
    "visionzip": visionzip.replay,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
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
    skipped: dict[str, int] = {}
    for case in cases:
        replay = REPLAYS.get(case.kind)
        if replay is None:
            skipped[case.kind] = skipped.get(case.kind, 0) + 1
            continue
        recorded = case.tensors()
        checks = replay(case, recorded)
        if checks.limit is None:
            checks.complete(recorded)
        passed += not checks.misses
        limited += checks.limit is not None and not checks.misses
        _report(case, checks)
    for kind, count in skipped.items():
        print(f"{kind}: {count} cases skipped, no replay of that kind (not a pass)")
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
