"""What is kept for a page: which rows, why, in which columns, and how much room it takes."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import EXPLANATION, ID_TYPES, id_values
from trio.engine.request import Explanation, Result
from trio.errors import UserError
from trio.job.images.policy import RowError
from trio.job.input.manifest import Manifest, Shard
from trio.job.input.units import Unit
from trio.job.output.gallery import (
    GALLERY_SCHEMA,
    Sample,
    drawn,
    gallery_rows,
    gallery_table,
    sample_of,
)
from trio.job.output.output_rows import Ask, Source
from trio.job.output.schema import row_key
from trio.job.output.sink import THUMBNAIL_BYTES, serialise
from trio.job.settings import made_of

SIZES = (30, 0, 25)
ALL = [row_key(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
KEPT, WIDER, OTHER = 1, 2, 3
"""Input rows."""
SAMPLE = Sample(kept=frozenset({KEPT}), wider=frozenset({KEPT, WIDER}))


def manifest() -> Manifest:
    return Manifest(
        shards=tuple(
            Shard(number=number, path=f"{number}.parquet", size=1, rows=rows, row_groups=(rows,))
            for number, rows in enumerate(SIZES)
        )
    )


def sample(count: int, limit: int | None = None, seed: int = 0) -> Sample:
    found = sample_of(manifest(), limit, count, seed)
    assert found is not None and found.kept <= found.wider
    return found


@pytest.mark.parametrize("limit", [None, 1, 30, 33, 55, 99])
@pytest.mark.parametrize("count", [1, 3, 5, 6, 54, 55, 1000])
def test_exactly_so_many_rows_of_the_run(count: int, limit: int | None) -> None:
    rows = ALL[:limit]
    found = sample(count, limit)
    assert len(found.kept) == min(count, len(rows)) and found.wider <= set(rows)
    assert len(found.wider) == min(10 * count, len(rows))
    assert found == sample(count, limit)
    assert (found.kept == sample(count, limit, seed=1).kept) == (count >= len(rows))


def test_an_only_row_is_its_own_sample() -> None:
    found = sample_of(manifest(), None, 5, 0, only_row=ALL[-1])
    assert found == Sample(kept=frozenset(ALL[-1:]), wider=frozenset(ALL[-1:]))


def test_none_of_nothing() -> None:
    assert sample_of(manifest(), None, 0, 0) is None
    assert sample_of(Manifest(shards=()), None, 5, 0) == Sample(kept=frozenset(), wider=frozenset())
    assert gallery_rows(None, [prompt(KEPT)]) == ()


def test_fewer_rows_are_part_of_more() -> None:
    samples = [sample(count) for count in range(1, 56)]
    for fewer, more in pairwise(samples):
        assert fewer.kept < more.kept and fewer.wider <= more.wider


def test_each_row_is_drawn_as_often_as_any_other() -> None:
    counts = np.zeros(20)
    for seed in range(4000):
        found = drawn(20, 5, seed)
        assert len(set(found)) == 5
        counts[found] += 1
    assert abs(counts / 4000 - 0.25).max() < 0.03
    assert len(set(drawn(10**12, 1000, 0))) == 1000


def test_units_that_hold_some() -> None:
    found = Sample(kept=frozenset(), wider=frozenset({row_key(1, 5)}))
    units = [Unit(1, 0, 5), Unit(1, 5, 6), Unit(1, 4, 9), Unit(1, 6, 9), Unit(0, 0, 9)]
    assert [found.has_some_of(unit) for unit in units] == [False, True, True, False, False]


def prompt(
    key: int, *said: str | None, number: int = 0, **columns: Any
) -> tuple[Source, list[dict[str, Any]], list[Result | RowError]]:
    """One prompt, answered so in each setting; None is an error."""
    source = Source(key=key, table=pa.table({}), index=0, path="", id=f"id{key}")
    source.asks = [Ask(prompt="a?", answers=["x"]), Ask(prompt="b?")]
    source.thumbnails, source.image_sizes = [b"jpeg"], [(640, 480)]
    rows: list[dict[str, Any]] = []
    outcomes: list[Result | RowError] = []
    for setting, text in enumerate(said or ("yes",)):
        failed = RowError("image", "broken")
        done = Result(
            id=None, finish_reason="stop", kept_tokens=[[0, None, 2]], explanation=EXPLANATION
        )
        outcomes.append(failed if text is None else done)
        rows.append(
            {
                "row": key,
                "prompt_number": number,
                "setting": setting,
                "id": source.id,
                "prompt": source.asks[number].prompt,
                "response": text,
                "error": str(failed) if text is None else None,
                "finish_reason": "error" if text is None else "stop",
                "visual_tokens": 16,
                "actor": "a",
            }
            | columns
        )
    return source, rows, outcomes


def why(key: int, *said: str | None, **columns: Any) -> list[tuple[int, str]]:
    lines = gallery_rows(SAMPLE, [prompt(key, *said, **columns)])
    return [(line["setting"], line["why"]) for line in lines]


def test_rows_of_the_sample_are_kept_whatever_becomes_of_them() -> None:
    assert why(KEPT, "a", "a") == [(0, "sample"), (1, "sample")]
    assert why(KEPT, None, "a") == [(0, "sample"), (1, "sample")]
    assert why(OTHER, None) == why(OTHER, "a", "b") == []


def test_of_others_errors_and_disagreements() -> None:
    assert why(WIDER, "a") == why(WIDER, "a", "a") == why(WIDER, "a", audit_match=True) == []
    assert why(WIDER, "a", "b", "a") == [(n, "disagreement") for n in range(3)]
    assert why(WIDER, "a", audit_match=False) == [(0, "disagreement")]
    assert why(WIDER, None) == [(0, "error")]
    assert why(WIDER, None, None) == [(0, "error"), (1, "error")]
    assert why(WIDER, None, "a") == [(0, "error"), (1, "disagreement")]


def test_prompts_of_a_row_are_looked_at_one_by_one() -> None:
    prompts = [prompt(WIDER, "a", "a", number=0), prompt(WIDER, "a", "b", number=1)]
    lines = gallery_rows(SAMPLE, prompts)
    assert [(line["prompt_number"], line["setting"]) for line in lines] == [(1, 0), (1, 1)]


def table_of(lines: Sequence[dict[str, Any]], id_type: pa.DataType | None = None) -> pa.Table:
    return gallery_table(lines, id_type or pa.string(), "run1")


def test_columns() -> None:
    lines = gallery_rows(SAMPLE, [prompt(KEPT, "yes", None)])
    table = table_of(lines)
    assert table.schema.equals(GALLERY_SCHEMA) and table.schema.metadata[b"trio.run"] == b"run1"
    back = pq.read_table(pa.BufferReader(serialise(table)))
    assert back.schema.equals(GALLERY_SCHEMA)
    good, bad = back.to_pylist()
    assert (good["row"], good["id"], good["answers"], good["why"]) == (1, "id1", ["x"], "sample")
    assert good["thumbnails"] == bad["thumbnails"] == [b"jpeg"]
    assert good["image_sizes"] == [{"width": 640, "height": 480}]
    assert good["image_tokens"] == [16] and good["kept_tokens"] == [[0, None, 2]]
    boxes = np.array(good["boxes"], np.float32).reshape(-1, 4)
    assert np.array_equal(boxes, EXPLANATION.boxes)
    assert np.allclose(good["saliency"], EXPLANATION.saliency, rtol=1e-3, atol=0)
    assert bad["error"] == "image: broken" and bad["response"] is None
    explained = ("image_tokens", "boxes", "kept_tokens", "saliency")
    assert all(bad[name] is None for name in explained)


def test_scores_keep_three_digits_at_any_size_and_what_is_gone() -> None:
    scores = np.array([1.2345678, -3e-30, 6e30, np.nan, np.inf, 0], np.float32)
    made = prompt(KEPT)
    made[2][0] = Result(
        id=None,
        finish_reason="stop",
        explanation=Explanation(
            image_tokens=(6,), boxes=np.full((6, 4), np.nan), saliency=(scores,)
        ),
    )
    (line,) = table_of(gallery_rows(SAMPLE, [made])).to_pylist()
    assert np.allclose(line["saliency"][0], scores, rtol=1e-3, atol=0, equal_nan=True)
    assert np.isnan(line["boxes"]).all() and len(line["boxes"]) == 24


@pytest.mark.parametrize("kind", ID_TYPES, ids=str)
def test_ids_become_text(kind: pa.DataType) -> None:
    lines = [gallery_rows(SAMPLE, [prompt(KEPT)])[0] for _ in range(3)]
    values = id_values(kind)
    storage = values.storage if isinstance(values, pa.ExtensionArray) else values
    raw = [cell.value if pa.types.is_temporal(kind) else cell.as_py() for cell in storage]
    table = table_of([line | {"id": one} for line, one in zip(lines, raw, strict=True)], kind)
    one, other, none = table["id"].to_pylist()
    assert one and other and one != other and none is None


def test_ids_as_people_write_them() -> None:
    lines = gallery_rows(SAMPLE, [prompt(KEPT)])

    def text(one: Any, kind: pa.DataType) -> Any:
        return table_of([lines[0] | {"id": one}], kind)["id"][0].as_py()

    assert text(86_400, pa.timestamp("s")) == "1970-01-02 00:00:00"
    assert text(7, pa.int8()) == "7" and text(b"ab", pa.binary()) == "ab"
    assert text(b"\xff\x00", pa.binary()) == "ff00"
    assert text(bytes(15) + b"\1", pa.uuid()) == "00000000-0000-0000-0000-000000000001"


def test_an_image_of_many_rows_is_stored_once() -> None:
    """Five rows of ten settings in one file, each with an image that nothing packs."""
    generator = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for _ in range(5):
        made = prompt(KEPT, *map(str, range(10)))
        made[0].thumbnails = [generator.bytes(90_000)]
        lines += gallery_rows(SAMPLE, [made])
    assert len(lines) == 50
    file = serialise(table_of(lines), dictionary_pagesize_limit=THUMBNAIL_BYTES)
    assert 5 * 90_000 < file.size < 6 * 90_000


@pytest.mark.parametrize("tokens", [576, 2880])
def test_room_of_an_explained_row(tokens: int) -> None:
    generator = np.random.default_rng(0)
    side = round((tokens / 5) ** 0.5) if tokens > 576 else 24
    cells = np.arange(tokens) % side**2
    corner = np.stack([cells % side, cells // side], 1) / side
    scores = tuple(generator.random(tokens, np.float32) for _ in range(3))
    boxes = np.concatenate([corner, corner + 1 / side], 1).astype(np.float32)
    told = Explanation(image_tokens=(tokens,), boxes=boxes, saliency=scores)
    kept = [sorted(generator.choice(tokens, tokens // n, replace=False)) for n in (2, 4, 9)]
    made = prompt(KEPT)
    made[2][0] = replace(made[2][0], explanation=told, kept_tokens=kept)  # type: ignore[type-var]
    file = serialise(table_of(gallery_rows(SAMPLE, [made])))
    print(f"{tokens} tokens: {file.size} bytes")
    assert file.size < 40 * tokens + 10_000


def test_how_many_may_be_asked_for() -> None:
    assert made_of().output.gallery == 100 and made_of(gallery=0).output.gallery == 0
    assert "gallery" not in made_of(gallery=5).results()
    assert made_of(gallery=5).flat()["gallery"] == 5
    with pytest.raises(UserError, match="at most 10000, got 10001: --save-kept is for all rows"):
        from_flag("10001")
    with pytest.raises(UserError, match="at least 0"):
        from_flag("-1")


def from_flag(value: str) -> None:
    from trio.job import cli

    cli.read_call([f"--gallery={value}"], prog="caption.py", description="")
