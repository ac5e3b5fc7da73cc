"""Input columns and the schema check."""

import pyarrow as pa
import pytest

from tests.job.fakes import ID_TYPES
from trio.errors import UserError
from trio.job.input.columns import parse_mapping, resolve

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


def found(*schemas: pa.Schema, mapping: str = "", prompt: bool = False) -> list[str | None]:
    paths = [f"s{n}.parquet" for n in range(len(schemas))]
    columns = resolve(schemas, paths, parse_mapping(mapping), prompt_given=prompt)
    return [columns.roles.get(role) for role in ("image", "prompt", "id")]


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.string(),
        pa.large_string(),
        HF_IMAGE,
        pa.struct([("path", pa.string())]),
        pa.list_(HF_IMAGE),
        pa.large_list(pa.binary()),
        pa.list_(pa.string(), 2),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int8(), pa.string()),
        pa.list_(pa.dictionary(pa.int32(), pa.binary())),
        pa.struct([("bytes", pa.dictionary(pa.int32(), pa.binary())), ("path", pa.string())]),
        pa.opaque(pa.binary(), "jpeg", "camera"),
    ],
)
def test_image_types(kind: pa.DataType) -> None:
    assert found(schema(image=kind), prompt=True)[0] == "image"


@pytest.mark.parametrize(
    "kind",
    [
        pa.int64(),
        pa.struct([("url", pa.string())]),
        pa.list_(pa.float32()),
        pa.dictionary(pa.int32(), pa.int64()),
    ],
)
def test_types_that_hold_no_image(kind: pa.DataType) -> None:
    with pytest.raises(UserError, match=r"s0\.parquet: column 'image' is"):
        found(schema(image=kind), prompt=True)


@pytest.mark.parametrize(
    "kind",
    [
        pa.bool_(),
        pa.list_(pa.bool_()),
        pa.timestamp("us"),
        pa.date32(),
        pa.time32("s"),
        pa.duration("s"),
        pa.map_(pa.string(), pa.string()),
        pa.list_(pa.list_(pa.string())),
        pa.struct([("label", pa.string())]),
        pa.struct([("answer", pa.bool_())]),
        pa.struct([("answer", pa.list_(pa.list_(pa.string())))]),
        pa.list_(pa.struct([("text", pa.list_(pa.string()))])),
        pa.list_(pa.struct([("id", pa.int8())])),
        pa.dictionary(pa.int8(), pa.date32()),
        pa.month_day_nano_interval(),
        pa.uuid(),
    ],
)
def test_answers_without_a_plain_text_are_refused(kind: pa.DataType) -> None:
    kinds = schema(image=pa.binary(), answers=kind)
    with pytest.raises(UserError, match=r"s: column 'answers' is .*; answers are str"):
        resolve([kinds], ["s"], {}, prompt_given=True, scored=True)
    assert found(kinds, prompt=True) == ["image", None, None]


def test_scoring_needs_answers_and_answers_scoring() -> None:
    bare, full = schema(image=pa.binary()), schema(image=pa.binary(), answers=pa.string())
    mapped = {"answers": "answers"}
    columns = resolve([full], ["s"], mapped, prompt_given=True, scored=True)
    assert columns.roles["answers"] == "answers"
    for schemas in ([bare], [full, bare]):
        with pytest.raises(UserError, match=r"no column 'answers'.* --score .*answers=NAME"):
            resolve(schemas, ["s", "t"][: len(schemas)], {}, prompt_given=True, scored=True)
    with pytest.raises(UserError, match="ask for it with --score"):
        resolve([full], ["s"], mapped, prompt_given=True, scored=False)


def test_question_serves_as_prompt_and_prompt_wins() -> None:
    base = {"image": pa.binary(), "question": pa.string()}
    assert found(schema(**base))[1] == "question"
    assert found(schema(**base, prompt=pa.string()))[1] == "prompt"


def test_mapping_renames_roles() -> None:
    kinds = schema(jpg=pa.binary(), txt=pa.string(), key=pa.int32(), prompt=pa.string())
    assert found(kinds, mapping="image=jpg,prompt=txt,id=key") == ["jpg", "txt", "key"]


@pytest.mark.parametrize("text", ["image", "image=", "picture=jpg", "picture=", "=id"])
def test_mapping_mistakes(text: str) -> None:
    with pytest.raises(UserError, match="ROLE=COLUMN"):
        parse_mapping(text)


def test_mapping_to_a_missing_column_says_what_there_is() -> None:
    with pytest.raises(UserError, match="it has image, caption"):
        found(schema(image=pa.binary(), caption=pa.string()), mapping="prompt=text")


def test_missing_columns_say_how_to_mend() -> None:
    with pytest.raises(UserError, match="--columns image=NAME"):
        found(schema(jpg=pa.binary(), prompt=pa.string()))
    with pytest.raises(UserError, match="--prompt"):
        found(schema(image=pa.binary()))
    with pytest.raises(UserError, match=r"s1\.parquet"):
        found(
            schema(image=pa.binary(), prompt=pa.string()),
            schema(photo=pa.binary(), prompt=pa.string()),
        )


def test_a_prompt_column_in_some_shards_needs_a_default() -> None:
    shards = schema(image=pa.binary(), prompt=pa.string()), schema(image=pa.binary())
    assert found(*shards, prompt=True)[1] == "prompt"
    with pytest.raises(UserError, match=r"s1\.parquet"):
        found(*shards)


def test_prompts_are_text() -> None:
    with pytest.raises(UserError, match="prompts must be strings"):
        found(schema(image=pa.binary(), prompt=pa.int64()))


@pytest.mark.parametrize("text", ["id=none", "id=", "answers=none,id="])
def test_a_column_may_be_left_out(text: str) -> None:
    kinds = schema(image=pa.binary(), id=pa.struct([("a", pa.int8())]), none=pa.string())
    assert found(kinds, mapping=text, prompt=True) == ["image", None, None]
    with pytest.raises(UserError, match="no column 'prompt'"):
        found(schema(image=pa.binary(), prompt=pa.string()), mapping="prompt=none")


@pytest.mark.parametrize("kind", ID_TYPES)
def test_id_keeps_its_type(kind: pa.DataType) -> None:
    columns = resolve([schema(image=pa.binary(), id=kind)], ["s"], {}, prompt_given=True)
    assert columns.id_type == kind


SMALL, TEXT = pa.dictionary(pa.int8(), pa.int16()), pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        ([pa.int8(), pa.int64()], pa.int64()),
        ([pa.uint32(), pa.int16(), pa.uint8()], pa.int64()),
        ([pa.uint8(), pa.uint16()], pa.int64()),
        ([pa.uint8(), pa.uint64(), pa.uint32()], pa.uint64()),
        ([SMALL, SMALL], pa.int16()),
        ([SMALL, pa.int32()], pa.int64()),
        ([pa.string(), pa.large_string(), TEXT], pa.string()),
        ([pa.string(), TEXT], pa.string()),
        ([pa.large_string(), pa.string_view()], pa.string()),
        ([pa.null(), pa.int32(), pa.null()], pa.int32()),
        ([pa.string(), pa.null()], pa.string()),
        ([pa.null()], pa.string()),
        ([pa.null(), pa.uuid()], pa.uuid()),
        ([pa.decimal128(5, 1), pa.decimal128(5, 1)], pa.decimal128(5, 1)),
        ([pa.binary(), pa.large_binary(), pa.binary(16)], pa.binary()),
    ],
)
def test_ids_of_several_types_have_one_that_holds_all(
    kinds: list[pa.DataType], common: pa.DataType
) -> None:
    schemas = [schema(image=pa.binary(), id=kind) for kind in kinds]
    for each in (schemas, schemas[::-1]):
        columns = resolve(each, [f"s{n}" for n in range(len(each))], {}, prompt_given=True)
        assert columns.id_type == common


@pytest.mark.parametrize(
    "kinds",
    [
        [pa.string(), pa.int64()],
        [pa.null(), pa.int8(), pa.int64(), TEXT],
        [pa.uint64(), pa.int8()],
        [pa.uuid(), pa.binary(16)],
        [pa.int64(), pa.int8(), pa.float64()],
        [pa.timestamp("us"), pa.timestamp("ns")],
        [pa.string(), TEXT, pa.binary()],
    ],
)
def test_ids_that_no_type_holds(kinds: list[pa.DataType]) -> None:
    schemas = [schema(image=pa.binary(), id=kind) for kind in kinds]
    message = r"column 'id' is .* in s\d, .* in s\d.*: give all shards one type.*id=none"
    with pytest.raises(UserError, match=message):
        resolve(schemas, [f"s{n}" for n in range(len(kinds))], {}, prompt_given=True)


def test_ids_are_one_type_in_all_shards() -> None:
    number, text = (schema(image=pa.binary(), id=kind) for kind in (pa.int64(), pa.string()))
    with pytest.raises(UserError, match="one type"):
        found(number, text, prompt=True)
    for kind in (pa.struct([("a", pa.int8())]), pa.list_(pa.int8())):
        with pytest.raises(UserError, match=r"an id is one value .*--columns id=none"):
            found(schema(image=pa.binary(), id=kind), prompt=True)
    with pytest.raises(UserError, match=r"Other shards have it as their id.*--columns id=none"):
        found(number, schema(image=pa.binary()), prompt=True)


def test_a_name_that_two_columns_share() -> None:
    twice = pa.schema([("image", pa.binary()), ("image", pa.binary())])
    with pytest.raises(UserError, match="2 columns are called 'image'"):
        found(twice, prompt=True)
