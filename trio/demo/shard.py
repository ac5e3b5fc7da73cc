"""Write the bundled shard: `python -m trio.demo.shard`.

Held-out scenes with the caption prompt and one question each, every kind in turn, in the input
format of the jobs (id, image, prompt, answers) and the question's kind beside it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trio.demo import SHARD
from trio.demo.scenes import KINDS, Question, Scene, make_scene, questions

_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "prompt": pa.string(),
        "answers": pa.list_(pa.string()),
        "kind": pa.string(),
    }
)


def asked_of(rng: np.random.Generator, scene: Scene, kinds: tuple[str, ...]) -> list[Question]:
    """One question of each of `kinds`, drawn among those the scene allows."""
    every = questions(rng, scene)
    chosen = []
    for kind in kinds:
        choice = [question for question in every if question.kind == kind]
        chosen.append(choice[rng.integers(len(choice))])
    return chosen


def rotation(number: int, per_scene: int) -> tuple[str, ...]:
    """The caption and the next `per_scene - 1` other kinds in turn for scene `number`."""
    others = [kind for kind in KINDS if kind != "caption"]
    start = number * (per_scene - 1)
    return ("caption", *(others[(start + i) % len(others)] for i in range(per_scene - 1)))


def write_shard(path: Path, *, scenes: int, seed: int) -> None:
    """Write two rows per scene, JPEG images inside, 50 rows to a row group."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(scenes):
        scene = make_scene(rng, "heldout")
        buffer = io.BytesIO()
        scene.image.save(buffer, "JPEG", quality=92)
        for question in asked_of(rng, scene, rotation(number, 2)):
            rows.append(
                {
                    "id": f"scene-{number:04d}-{question.kind}",
                    "image": {"bytes": buffer.getvalue(), "path": f"scene-{number:04d}.jpg"},
                    "prompt": question.prompt,
                    "answers": [question.answer],
                    "kind": question.kind,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, row_group_size=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=SHARD, help="Parquet file to write")
    parser.add_argument("--scenes", type=int, default=60, help="number of scenes, two rows each")
    parser.add_argument("--seed", type=int, default=2026)
    arguments = parser.parse_args()
    write_shard(arguments.output, scenes=arguments.scenes, seed=arguments.seed)


if __name__ == "__main__":
    main()
