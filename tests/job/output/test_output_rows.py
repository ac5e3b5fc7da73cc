"""Input rows to requests, results to output rows."""

import decimal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import pytest
from PIL import Image

from tests.job.fakes import encoded, png, read_unit
from trio.engine.request import Request, Result, Sampling
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.input.columns import resolve
from trio.job.input.manifest import inspect
from trio.job.input.units import Unit
from trio.job.output.output_rows import (
    Ask,
    RowSettings,
    Source,
    identify,
    note_images,
    output_row,
    requests_of,
    sources,
)
from trio.job.output.schema import KEPT, build_table, row_key, rows_schema, split_key
from trio.job.storage import Location, parent
from trio.vqa.presets.prompt_template import PromptTemplate

UNIT = Unit(2, 10, 11)


def settings(**changes: Any) -> RowSettings:
    values: dict[str, Any] = {
        "prompts": (),
        "sampling": Sampling(),
        "policy": ImagePolicy(),
        "seed": 0,
    }
    return RowSettings(**values | changes)


def source(**cells: Any) -> Source:
    kinds = {n: v.type if isinstance(v, pa.Scalar) else None for n, v in cells.items()}
    table = pa.table({name: pa.array([v], kinds[name]) for name, v in cells.items()})
    return sources(table, UNIT, "/data/x.parquet")[0]


def asked(row: Source, base: RowSettings, shards: Location | None = None) -> Request:
    """The request of a row whose images are loaded first, as in the job."""
    images = load_images(row.cell("image"), shards, base.policy)
    note_images(row, images)
    (request,) = made_of(row, base, images)
    return request


def made_of(row: Source, base: RowSettings, images: Sequence[Any] = ()) -> list[Request]:
    found = list(requests_of(row, images, base))
    assert not any(isinstance(one, RowError) for one in found)
    return [one for one in found if isinstance(one, Request)]


def test_a_row_becomes_a_request() -> None:
    row = source(image=png(), prompt="what?", id=7)
    request = asked(row, settings())
    assert request.prompt == "what?" and request.images[0].size == (12, 9)
    assert (row.key, row.id, row.asks, row.size) == (
        row_key(2, 10),
        7,
        (Ask(prompt="what?"),),
        (12, 9),
    )


def test_what_a_row_leaves_out() -> None:
    row = source(image=png())
    assert asked(row, settings(prompts=("Describe.",))).prompt == "Describe."
    assert row.id == "x.parquet#10"
    null = source(image=png(), prompt=pa.scalar(None, pa.string()), id=pa.scalar(None, pa.int64()))
    assert asked(null, settings(prompts=("Describe.",))).prompt == "Describe."
    assert null.id is None


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ({"image": png(), "prompt": pa.scalar(None, pa.string())}, "prompt_missing"),
        ({"image": png(), "prompt": "  "}, "prompt_missing"),
    ],
)
def test_rows_that_cannot_be_asked(cells: dict[str, Any], kind: str) -> None:
    row = source(id="mine", **cells)
    with pytest.raises(RowError) as caught:
        list(requests_of(row, [], settings()))
    assert caught.value.kind == kind and row.id == "mine"


@pytest.mark.parametrize("role", ["prompt", "id"])
def test_text_that_is_not_utf8(role: str) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    cells = {"image": pa.array([png()]), "prompt": pa.array(["x"]), role: bad}
    row = sources(pa.table(cells), UNIT, "x")[0]
    with pytest.raises(RowError, match=f"{role}_invalid: the text is not UTF-8"):
        asked(row, settings())


def test_each_row_samples_from_its_own_stream() -> None:
    table = pa.table({"image": [png()] * 3, "prompt": ["x"] * 3})
    drawing = settings(sampling=Sampling(temperature=0.7))
    read = sources(table, Unit(0, 0, 3), "x")

    def seeds(base: RowSettings) -> list[int | None]:
        requests = [asked(row, base) for row in read]
        return [r.sampling.seed for r in requests if r.sampling is not None]

    first = seeds(drawing)
    assert len(set(first)) == 3 and seeds(drawing) == first
    assert seeds(settings(sampling=Sampling(temperature=0.7), seed=1)) != first
    assert seeds(settings()) == [None] * 3
    ruled = Sampling(temperature=0.7, min_p=0.1, repetition_penalty=1.1, no_repeat_ngram_size=2)
    (request, *_) = [asked(r, settings(sampling=ruled)) for r in read]
    assert request.sampling == replace(ruled, seed=first[0])


def test_a_row_may_bring_several_prompts() -> None:
    row = source(image=png(), prompt=["what?", "where?"], id=7)
    requests = made_of(row, settings())
    assert [request.prompt for request in requests] == ["what?", "where?"]
    plain = source(image=png())
    two = settings(prompts=("a", "b"), sampling=Sampling(temperature=1.0))
    seeds = [request.sampling and request.sampling.seed for request in made_of(plain, two)]
    assert len(set(seeds)) == 2 and [ask.prompt for ask in plain.asks] == ["a", "b"]


@pytest.mark.parametrize("prompts", [[], [None], [" ", None]])
def test_a_list_without_prompts(prompts: list[str | None]) -> None:
    row = source(image=png(), prompt=pa.scalar(prompts, pa.list_(pa.string())))
    with pytest.raises(RowError) as raised:
        identify(row, settings())
    assert raised.value.kind == "prompt_missing"


def test_what_is_missing_in_a_list_is_its_own_error() -> None:
    row = source(image=png(), prompt=["a", None, "b"])
    first, error, last = requests_of(row, [], settings(prompts=("x",)))
    assert isinstance(error, RowError) and error.kind == "prompt_missing"
    assert [one.prompt for one in (first, last) if isinstance(one, Request)] == ["a", "b"]
    empty = source(image=png(), prompt=pa.scalar([], pa.list_(pa.string())))
    assert [one.prompt for one in made_of(empty, settings(prompts=("x",)))] == ["x"]


def test_a_prompt_made_of_columns() -> None:
    template = PromptTemplate("{question} ({json.lang}, {size.w})")
    cells = {".question": "Who?", ".json.lang": "en", ".size": {"w": 7}, "prompt": "not this"}
    row = source(**cells)
    identify(row, settings(template=template))
    assert [ask.prompt for ask in row.asks] == ["Who? (en, 7)"]
    row = source(**cells | {".question": pa.scalar(None, pa.string())})
    with pytest.raises(RowError, match="'question' is missing") as raised:
        identify(row, settings(template=template))
    assert raised.value.kind == "prompt_invalid"


def test_a_row_may_bring_settings_of_its_own() -> None:
    base = settings(prompts=("x",), sampling=Sampling(temperature=0.5, max_new_tokens=9))
    row = source(max_new_tokens=3, temperature=0.25, seed=5, system="Be brief.")
    (request,) = made_of(row, base)
    assert request.system == "Be brief." and request.sampling is not None
    assert (request.sampling.max_new_tokens, request.sampling.temperature) == (3, 0.25)
    table = pa.table({"seed": [5, 6]})
    same, different = (
        made_of(one, base)[0].sampling for one in sources(table, Unit(7, 1, 3), "y.parquet")
    )
    assert same is not None and different is not None
    assert same.seed == request.sampling.seed != different.seed
    empty = source(
        max_new_tokens=pa.scalar(None, pa.int64()), seed=pa.scalar(None, pa.int64()), system=None
    )
    (request,) = made_of(empty, base)
    assert request.system is None and request.sampling is not None
    assert request.sampling.max_new_tokens == 9 and request.sampling.seed != same.seed


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -0.5), ("temperature", float("nan"))]
)
def test_settings_that_cannot_be_are_their_rows_error(name: str, value: float) -> None:
    row = source(**{name: value})
    with pytest.raises(RowError, match=name) as raised:
        list(requests_of(row, [], settings(prompts=("x",))))
    assert raised.value.kind == "setting_invalid"


VQA = pa.struct([("answer_id", pa.int64()), ("answer", pa.string()), ("text", pa.int8())])
VOTES = [
    {"answer_id": 1, "answer": "red"},
    {"answer_id": 2, "answer": None},
    None,
    {"answer_id": 3, "answer": "blue"},
]
SQUAD = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))])


@pytest.mark.parametrize(
    ("kind", "value", "answers"),
    [
        (pa.string(), "cat", ["cat"]),
        (pa.large_string(), "cat", ["cat"]),
        (pa.string_view(), "cat", ["cat"]),
        (pa.string(), None, []),
        (pa.null(), None, []),
        (pa.binary(), "rød".encode(), ["rød"]),
        (pa.large_binary(), b"red", ["red"]),
        (pa.binary_view(), b"red", ["red"]),
        (pa.binary(5), b"red\0\0", ["red"]),
        (pa.int8(), -3, ["-3"]),
        (pa.uint64(), 2**64 - 1, ["18446744073709551615"]),
        (pa.float64(), 5.0, ["5"]),
        (pa.float64(), 1e22, ["1" + "0" * 22]),
        (pa.float32(), 0.1, ["0.1"]),
        (pa.float16(), 2.5, ["2.5"]),
        (pa.float64(), float("nan"), []),
        (pa.decimal128(38, 2), decimal.Decimal("123456789012345678901234567890123456.00"),
         ["123456789012345678901234567890123456"]),
        (pa.decimal128(5, 2), decimal.Decimal("1.50"), ["1.5"]),
        (pa.decimal256(9, -2), decimal.Decimal("100"), ["100"]),
        (pa.dictionary(pa.int8(), pa.string()), "cat", ["cat"]),
        (pa.dictionary(pa.int8(), pa.float32()), 7.0, ["7"]),
        (pa.list_(pa.string()), ["cat", None, "dog"], ["cat", "dog"]),
        (pa.list_(pa.string()), [], []),
        (pa.large_list(pa.float64()), [1.0, 2.5], ["1", "2.5"]),
        (pa.list_(pa.binary(), 2), [b"a", b"b"], ["a", "b"]),
        (pa.list_view(pa.string()), ["a", "b"], ["a", "b"]),
        (pa.large_list_view(pa.int8()), [1, 2], ["1", "2"]),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), ["a", "b"], ["a", "b"]),
        (pa.list_(VQA), VOTES, ["red", "blue"]),
        (VQA, VOTES[0], ["red"]),
        (VQA, None, []),
        (SQUAD, {"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
    ],
)  # fmt: skip
def test_answers_of_every_type_that_planning_lets_through(
    kind: pa.DataType, value: Any, answers: list[str]
) -> None:
    array = pa.array([None, value, None], kind) if kind != pa.null() else pa.nulls(3)
    table = pa.table({"image": [b"x"] * 3, "prompt": ["p"] * 3, "answers": array})
    columns = resolve([table.schema], ["f"], {}, prompt_given=False, scored=True)
    assert columns.roles["answers"] == "answers"
    assert read_answers(sources(table[1:2], UNIT, "x")[0]) == answers
    assert read_answers(sources(table[2:], UNIT, "x")[0]) == []
    assert read_answers(source(image=png())) == []


def read_answers(row: Source) -> list[str]:
    identify(row, settings(prompts=("p",)))
    return list(row.asks[0].answers)


def test_answers_that_are_not_utf8_end_their_row() -> None:
    row = source(image=png(), prompt="x", answers=b"\xff")
    with pytest.raises(RowError, match="answers_invalid: the text is not UTF-8"):
        asked(row, settings())


def test_a_mended_image_leaves_a_note() -> None:
    row = source(image=encoded(Image.new("RGB", (9, 9)), "JPEG")[:-2], prompt="x")
    asked(row, settings())
    result = Result(id=None, response="", finish_reason="stop")
    written = output_row(row, result, settings(), actor="a", node="n")
    (got,) = build_table([written], rows_schema(pa.string(), run_id="r")).to_pylist()
    assert (got["note"], got["error"]) == ("the file lacks its end marker", None)


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_binary()),
        pa.list_(pa.dictionary(pa.int32(), pa.binary())),
        pa.struct([("bytes", pa.dictionary(pa.int32(), pa.binary())), ("path", pa.string())]),
    ],
)
def test_images_in_dictionaries_from_a_parquet_file(kind: pa.DataType, tmp_path: Path) -> None:
    """Several batches of a row group, in which values come back."""
    data = [png((n, 0, 0)) for n in range(3)]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(data[0])
    items: list[Any] = [data[n % 3] for n in range(300)]
    if pt.is_dictionary(kind):
        if kind.value_type == pa.string():
            items = ["a.png"] * 300
        array = pa.array(items, kind.value_type).dictionary_encode().cast(kind)
    elif pt.is_struct(kind):
        codes = pa.array(items, pa.binary()).dictionary_encode()
        array = pa.StructArray.from_arrays([codes, pa.nulls(300, pa.string())], fields=list(kind))
    else:
        codes = pa.array(items, pa.binary()).dictionary_encode()
        array = pa.ListArray.from_arrays(pa.array(range(301), pa.int32()), codes)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": array, "prompt": ["p"] * 300}), path, row_group_size=200)
    manifest, schemas = inspect([str(path)])
    columns = resolve(schemas, [str(path)], {}, prompt_given=False)
    unit = Unit(0, 100, 300)
    read = sources(read_unit(manifest, columns, unit), unit, str(path))
    for row in (read[0], read[28], read[-1]):
        request = asked(row, settings(), parent(str(path)))
        red = 0 if items[0] == "a.png" else split_key(row.key)[1] % 3
        assert request.images[0].getpixel((0, 0)) == (red, 0, 0)


def test_output_rows_fit_the_schema() -> None:
    row = source(image=png(), prompt="what?", id=7)
    asked(row, settings())
    result = Result(
        id=None, response="", logprobs=[-1.0, -3.0], finish_reason="length", retention=0.5,
        prefill_flops=1.6e9, kept_tokens=[[1, 2]], visual_tokens_stages=[2],
    )  # fmt: skip
    outcomes: list[Result | RowError] = [result, RowError("image_empty", "zero bytes")]
    rows = [output_row(row, each, settings(also=(KEPT,)), actor="a", node="n") for each in outcomes]
    schema = rows_schema(pa.int64(), run_id="r", also=[KEPT])
    good, bad = build_table(rows, schema).to_pylist()
    assert (good["response"], good["logprob_mean"], good["prefill_flops"]) == ("", -2.0, 1600000000)
    assert (good["image_width"], good["image_height"], good["num_images"]) == (12, 9, 1)
    assert good["kept_tokens"] == [[1, 2]] and good["id"] == 7 and good["error"] is None
    assert bad["error"] == "image_empty: zero bytes" and bad["response"] is None
    assert bad["retention"] is None and bad["finished_at"].tzinfo is not None
