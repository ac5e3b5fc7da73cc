"""What a subject of `benchmark.py peers` runs in the interpreter that it has of its own.

    PYTHON serve.py MODULE

The first line on standard input is the task, a JSON object: `model`, a directory, `dtype`,
`threads`, `images` of a round, `output_tokens` of each answer, `scratch`, a directory for its own
files, and what else a subject is told. `MODULE.load(task)` gives the function that answers. Every
further line is a list of requests, each with `image`, a file, `prompt`, plain text, and `rendered`,
the same through the chat template. To the first line and to each other goes out one: "ready", and
the list of answers, each with `prompt_tokens`, those of its image among them, `output_tokens`, both
numbers, and `text`. What libraries print goes to standard error. Needs Python 3.10 alone, and
nothing of this package.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    answer = importlib.import_module(sys.argv[1]).load(task)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":  # a peer's own processes import this file once more
    main()
