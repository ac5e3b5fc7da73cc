"""Files of questions about held-out demo scenes, in the layouts of well-known data sets.

Each writer returns what it wrote but the pictures: the truth, by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.job.fakes import encoded
from trio.demo.scenes import COLOURS, KINDS, Question, make_scene, questions

CATEGORIES = ("random", "popular", "adversarial")
PER_PICTURE = 5
"""More than categories or annotators, so that none of these is the same in all of a picture."""
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
Truth = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question about a picture of the file."""

    id: str
    picture: str
    jpeg: bytes
    question: Question


def asked(count: int, kinds: Sequence[str], seed: int) -> Iterator[Asked]:
    """So many questions of these kinds, in turn, several about each picture."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        if number % PER_PICTURE == 0:
            scene = make_scene(rng, "heldout")
            jpeg = encoded(scene.image, "JPEG", quality=92)
        wanted = kinds[number % len(kinds)]
        choice = [each for each in questions(rng, scene) if each.kind == wanted]
        picture = f"scene-{number // PER_PICTURE}"
        question = choice[rng.integers(len(choice))]
        yield Asked(id=f"q{number}", picture=picture, jpeg=jpeg, question=question)


def write_yes_or_no(path: Path, count: int, seed: int = 1) -> Truth:
    """As POPE: answer, category."""
    truth = {
        each.id: {
            "question": each.question.prompt,
            "answer": each.question.answer,
            "category": CATEGORIES[number % 7 % len(CATEGORIES)],
            "picture": each.picture,
            "jpeg": each.jpeg,
        }
        for number, each in enumerate(asked(count, ("presence",), seed))
    }
    return _written(path, truth, {"answer": pa.string(), "category": pa.string()})


def write_ten_answers(path: Path, count: int, seed: int = 2) -> Truth:
    """As VQAv2: ten annotators, of whom one says something else."""
    kinds = [kind for kind in KINDS if kind != "caption"]
    truth = {
        each.id: {
            "question": each.question.prompt,
            "answers": [
                {"answer": "no digit" if person == number % 10 else each.question.answer}
                for person in range(10)
            ],
            "question_type": each.question.kind,
            "picture": each.picture,
            "jpeg": each.jpeg,
        }
        for number, each in enumerate(asked(count, kinds, seed))
    }
    people = pa.list_(pa.struct({"answer": pa.string()}))
    return _written(path, truth, {"answers": people, "question_type": pa.string()})


def write_joined(path: Path, pictures: Path, count: int, seed: int = 3) -> Truth:
    """As GQA: the pictures in a file of their own."""
    found = list(asked(count, ("presence", "color", "digit"), seed))
    truth = {
        each.id: {
            "question": each.question.prompt,
            "answer": each.question.answer,
            "imageId": each.picture,
            "types": {"structural": "verify" if each.question.kind == "presence" else "query"},
            "picture": each.picture,
        }
        for each in found
    }
    jpegs = {each.picture: each.jpeg for each in found}
    rows = [{"id": name, "image": {"bytes": jpegs[name]}} for name in sorted(jpegs)]
    schema = pa.schema({"id": pa.string(), "image": PICTURE})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), pictures)
    types = pa.struct({"structural": pa.string()})
    kinds = {"answer": pa.string(), "imageId": pa.string(), "types": types}
    return _written(path, truth, kinds)


def write_choices(path: Path, count: int, seed: int = 4) -> Truth:
    """As ScienceQA: words to choose among, and the place of the right one."""
    rng = np.random.default_rng(seed)
    truth = {}
    for each in asked(count, ("color",), seed):
        others = [name for name in COLOURS if name != each.question.answer]
        choices = [each.question.answer, *rng.choice(others, 3, replace=False).tolist()]
        choices = rng.permutation(choices).tolist()
        truth[each.id] = {
            "question": each.question.prompt,
            "choices": choices,
            "answer": choices.index(each.question.answer),
            "picture": each.picture,
            "jpeg": each.jpeg,
        }
    return _written(path, truth, {"choices": pa.list_(pa.string()), "answer": pa.int64()})


def _written(path: Path, truth: Truth, kinds: dict[str, pa.DataType]) -> Truth:
    """The file; the truth keeps names of pictures in place of their bytes."""
    schema = pa.schema({"id": pa.string(), "question": pa.string()} | kinds)
    if any("jpeg" in row for row in truth.values()):
        schema = schema.append(pa.field("image", PICTURE))
    rows = [
        {"id": name, "image": {"bytes": row.pop("jpeg", None)}} | row for name, row in truth.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return truth
