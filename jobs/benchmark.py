"""Measure what pruning keeps and costs. `benchmark.py quality --help` lists the settings."""

from __future__ import annotations

import _bootstrap  # noqa: F401  # isort: skip

import argparse
import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

from trio.demo import MODEL
from trio.errors import UserError
from trio.pipeline.cli import WRONG, Parser, fail


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except UserError as error:
        return fail("benchmark.py", str(error), WRONG)


def quality(options: argparse.Namespace) -> int:
    """Exact answers on held-out scenes, by method and retention."""
    from trio.benchmark.quality import ask, describe, measure, settings, table
    from trio.engine.loading import load

    rows = settings(
        options.methods,
        options.retention,
        options.encoders,
        options.proxy_positions,
        options.position_ids,
        options.seed,
    )
    _check_file(options.json)
    if options.dry_run:
        print(
            f"model {options.model}, {options.dtype}; scenes {options.scenes}, seed {options.seed}"
        )
        print("\n".join(f"{row.label}, retention {row.pruning.retention:.4g}" for row in rows))
        return 0
    asked = ask(options.scenes, options.seed)
    model, processor = load(options.model, device=None, dtype=options.dtype)
    print(describe(model, len(asked), options.scenes, options.seed), flush=True)
    summaries = []
    for summary in measure(model, processor, asked, rows):
        summaries.append(summary)
        print(f"{len(summaries)}/{len(rows)} {summary['label']}", file=sys.stderr, flush=True)
    print(table(summaries))
    if options.json:
        options.json.write_text(json.dumps(summaries, indent=1) + "\n")
    return 0


def _check_file(path: Path | None) -> None:
    """A measurement takes long, and is written at its end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json {path}: no file can be written there; name one in a directory")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("quality", help=quality.__doc__, description=quality.__doc__)
    one.set_defaults(run=quality)
    add = partial(one.add_argument, default=argparse.SUPPRESS)
    one.set_defaults(
        model=str(MODEL),
        methods=["none", "random", "gradient", "trio"],
        encoders=["none"],
        retention=[1 / 3, 2 / 9, 1 / 9],
        proxy_positions=[None],
        position_ids=[None],
        scenes=300,
        seed=7,
        dtype="float32",
        json=None,
        dry_run=False,
    )
    add("--model", help="directory or hub id (default: the bundled model)")
    add("--methods", type=_words, help="none,random,gradient,trio (default: all of them)")
    add("--encoders", type=_words, help="only none in this version")
    add("--retention", type=_fractions, help="layer-average shares kept (default: 1/3,2/9,1/9)")
    add("--proxy-positions", type=_words, help="reference,with_last,last (default: the package's)")
    add("--position-ids", type=_words, help="renumber,keep (default: the model family's)")
    add("--scenes", type=int, help="held-out scenes, three questions each (default: 300)")
    add("--seed", type=int, help="of the scenes and of random pruning (default: 7)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    add("--dry-run", action="store_true", help="print what would be measured, then stop")
    return parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _fractions(text: str) -> list[float]:
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers or fractions") from None


if __name__ == "__main__":
    sys.exit(main())
