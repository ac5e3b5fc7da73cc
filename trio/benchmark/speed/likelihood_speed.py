"""What scoring given answers costs beside letting the model answer, and beside a prefill for each.

The same random questions, one image each, in every round and pruned alike: answered with 2 and with
32 tokens; scored with two candidates of one token, as yes and no are; scored with several longer
candidates from one prefill, and with a prefill of its own for each of them. All are requests of our
engine, so what differs is what is done with a prompt that has been read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trio.benchmark.shapes.sizes import build
from trio.benchmark.speed.engine_speed import Workload, requests_for, serve
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Sampling
from trio.families.registry import adapt
from trio.pruning.options import Pruning
from trio.tables import aligned

SHORT, LONG = 2, 32
"""Tokens of the answers."""
ANSWERED_SHORT, ANSWERED_LONG = f"answered, {SHORT} tokens", f"answered, {LONG} tokens"
YES_NO, SEVERAL, APART = "yes or no", "candidates, one prefill", "candidates, a prefill each"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """How many a question has, and the tokens of each."""

    count: int
    tokens: int


def compare(
    shape: str,
    workload: Workload,
    candidates: Candidates,
    pruning: Pruning,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Build a model and measure every subject on it.

    Args:
        shape: name in `trio.benchmark.shapes.sizes`.
        workload: its `output_tokens` do not count.
        rounds: with a run of every subject each, one after the other; a warm-up comes before.
        tell: is told of every round that is done.

    Returns:
        Medians of ratios within a round, their `ranges`, and the `rows` of the table.

    Raises:
        UserError: no such shape, or a question that does not fit.
    """
    model, processor = build(shape, device, dtype)
    pruning = adapt(model).settle(pruning)
    questions = requests_for(model, processor, workload)
    subjects = dict(_subjects(questions, candidates, model.config.text_config.vocab_size))
    engine = Engine(model, processor, pruning=pruning, max_running=workload.batch)
    runs: list[dict[str, float]] = []
    for number in range(rounds + 1):
        took = {
            name: sum(serve(engine, asked, device)[0] for asked in passes)
            for name, passes in subjects.items()
        }
        if number:
            runs.append(took)
            tell(f"round {number}/{rounds}")
    return summary(runs, workload.batch)


def _subjects(
    questions: Sequence[Prepared], candidates: Candidates, vocabulary: int
) -> Iterator[tuple[str, list[list[Prepared]]]]:
    """Each with its passes over the questions, of which none knows the images of another."""
    generator = torch.Generator().manual_seed(0)
    shape = candidates.count, candidates.tokens
    several = torch.randint(10, vocabulary, shape, generator=generator).tolist()
    yes_no = ((several[0][0],), (several[0][0] - 1,))
    for name, length in ((ANSWERED_SHORT, SHORT), (ANSWERED_LONG, LONG)):
        sampling = Sampling(max_new_tokens=length, ignore_eos=True)
        yield name, [[replace(one, sampling=sampling) for one in questions]]
    yield YES_NO, [[replace(one, candidates=yes_no) for one in questions]]
    yield SEVERAL, [[replace(one, candidates=tuple(map(tuple, several))) for one in questions]]
    yield APART, [[replace(one, candidates=(tuple(own),)) for one in questions] for own in several]


def summary(runs: Sequence[dict[str, float]], questions: int) -> dict[str, Any]:
    """Of the seconds of each subject in each round."""
    measured: dict[str, Callable[[dict[str, float]], float]] = {
        "yes_no_vs_2_tokens": lambda run: run[ANSWERED_SHORT] / run[YES_NO],
        "yes_no_vs_32_tokens": lambda run: run[ANSWERED_LONG] / run[YES_NO],
        "one_prefill_vs_each": lambda run: run[APART] / run[SEVERAL],
    }
    return {
        **{name: statistics.median(map(of, runs)) for name, of in measured.items()},
        "ranges": {name: (min(map(of, runs)), max(map(of, runs))) for name, of in measured.items()},
        "rows": [
            {
                "name": name,
                "total_s": statistics.median(run[name] for run in runs),
                "questions_per_s": questions / statistics.median(run[name] for run in runs),
            }
            for name in runs[0]
        ],
    }


def table(summary: dict[str, Any]) -> str:
    """The rows as aligned text, then the ratios of rates."""
    rows = [
        [row["name"], f"{row['total_s']:.3f}", f"{row['questions_per_s']:.2f}"]
        for row in summary["rows"]
    ]
    ratios = [
        f"{name} {summary[name]:.3f} ({low:.3f}-{high:.3f})"
        for name, (low, high) in summary["ranges"].items()
    ]
    return "\n".join([aligned([["", "total s", "questions/s"], *rows]), *ratios])
