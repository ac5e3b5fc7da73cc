"""Input rows to requests, results to output rows."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from tests.pipeline.fakes import png
from trio.engine.request import Result, Sampling
from trio.pipeline.images import load_images
from trio.pipeline.plan import Unit
from trio.pipeline.policy import ImagePolicy, RowError
from trio.pipeline.rows import RowSettings, answers_of, output_row, request_of, sources
from trio.pipeline.schema import build_table, row_key, rows_schema

UNIT = Unit(2, 10, 11)


def settings(**changes: Any) -> RowSettings:
    values: dict[str, Any] = {
        "prompt": None,
        "sampling": Sampling(),
        "policy": ImagePolicy(),
        "seed": 0,
        "save_kept": False,
    }
    return RowSettings(**values | changes)


def source(**cells: Any) -> Any:
    table = pa.table({name: pa.array([value]) for name, value in cells.items()})
    return sources(table, UNIT, "/data/x.parquet")[0]


def test_a_row_becomes_a_request() -> None:
    row = source(image=png(), prompt="what?", id=7)
    request = request_of(row, None, settings(), load_images)
    assert request.prompt == "what?" and request.images[0].size == (12, 9)
    assert (row.key, row.id, row.prompt, row.size) == (row_key(2, 10), 7, "what?", (12, 9))


def test_what_a_row_leaves_out() -> None:
    row = source(image=png())
    assert request_of(row, None, settings(prompt="Describe."), load_images).prompt == "Describe."
    assert row.id == "x.parquet#10"
    null = source(image=png(), prompt=pa.scalar(None, pa.string()), id=pa.scalar(None, pa.int64()))
    assert request_of(null, None, settings(prompt="Describe."), load_images).prompt == "Describe."
    assert null.id is None


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ({"image": png(), "prompt": pa.scalar(None, pa.string())}, "prompt_missing"),
        ({"image": png(), "prompt": "  "}, "prompt_missing"),
        ({"image": b"", "prompt": "x"}, "image_empty"),
    ],
)
def test_rows_that_cannot_be_asked(cells: dict[str, Any], kind: str) -> None:
    row = source(id="mine", **cells)
    with pytest.raises(RowError) as caught:
        request_of(row, None, settings(), load_images)
    assert caught.value.kind == kind and row.id == "mine"


@pytest.mark.parametrize("role", ["prompt", "id"])
def test_text_that_is_not_utf8(role: str) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    cells = {"image": pa.array([png()]), "prompt": pa.array(["x"]), role: bad}
    row = sources(pa.table(cells), UNIT, "x")[0]
    with pytest.raises(RowError, match=f"{role}_invalid: the text is not UTF-8"):
        request_of(row, None, settings(), load_images)


def test_each_row_samples_from_its_own_stream() -> None:
    table = pa.table({"image": [png()] * 3, "prompt": ["x"] * 3})
    drawing = settings(sampling=Sampling(temperature=0.7))
    read = sources(table, Unit(0, 0, 3), "x")

    def seeds(base: RowSettings) -> list[int | None]:
        requests = [request_of(row, None, base, load_images) for row in read]
        return [r.sampling.seed for r in requests if r.sampling is not None]

    first = seeds(drawing)
    assert len(set(first)) == 3 and seeds(drawing) == first
    assert seeds(settings(sampling=Sampling(temperature=0.7), seed=1)) != first
    assert seeds(settings()) == [None] * 3
    ruled = Sampling(temperature=0.7, min_p=0.1, repetition_penalty=1.1, no_repeat_ngram_size=2)
    (request, *_) = [request_of(r, None, settings(sampling=ruled), load_images) for r in read]
    assert request.sampling == replace(ruled, seed=first[0])


@pytest.mark.parametrize(
    ("value", "answers"),
    [("cat", ["cat"]), (["cat", None, "dog"], ["cat", "dog"]), (3, ["3"]), ([], [])],
)
def test_answers(value: Any, answers: list[str]) -> None:
    cell = pa.array([value]) if value != [] else pa.array([[]], pa.list_(pa.string()))
    assert answers_of(sources(pa.table({"answers": cell}), UNIT, "x")[0]) == answers
    assert answers_of(source(image=png())) == []


def test_output_rows_fit_the_schema() -> None:
    row = source(image=png(), prompt="what?", id=7)
    request_of(row, None, settings(), load_images)
    result = Result(
        id=None, response="", logprobs=[-1.0, -3.0], finish_reason="length", retention=0.5,
        prefill_flops=1.6e9, kept_tokens=[[1, 2]], visual_tokens_stages=[2],
    )  # fmt: skip
    outcomes: list[Result | RowError] = [result, RowError("image_empty", "zero bytes")]
    rows = [output_row(row, each, actor="a", node="n", save_kept=True) for each in outcomes]
    schema = rows_schema(pa.int64(), run_id="r", save_kept=True)
    good, bad = build_table(rows, schema).to_pylist()
    assert (good["response"], good["logprob_mean"], good["prefill_flops"]) == ("", -2.0, 1600000000)
    assert (good["image_width"], good["image_height"], good["num_images"]) == (12, 9, 1)
    assert good["kept_tokens"] == [[1, 2]] and good["id"] == 7 and good["error"] is None
    assert bad["error"] == "image_empty: zero bytes" and bad["response"] is None
    assert bad["retention"] is None and bad["finished_at"].tzinfo is not None
