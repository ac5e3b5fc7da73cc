"""What users bring beside images, from Parquet to Parquet: columns, prompts, settings of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import caption
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import vqa

from tests.job.fakes import png, write_shard
from tests.vqa_scenes import asked
from trio.job.command import Job, main

PROMPTS = (
    "Describe the image.",
    "How many digits are there?",
    "Is there a 7?",
)


def run(out: Path, *flags: str, job: Job = caption.JOB) -> list[dict[str, Any]]:
    given = [*flags, "--output", str(out), "--log-interval", "60"]
    assert main(job, given) == 0
    order = [(name, "ascending") for name in ("row", "prompt_number", "setting")]
    return pq.read_table(out / "rows", partitioning=None).sort_by(order).to_pylist()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_columns_prompts_and_settings_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = pa.schema(
        [
            ("image", pa.binary()), ("asks", pa.list_(pa.string())), ("most", pa.int32()),
            ("url", pa.large_string()), ("note", pa.string()), ("at", pa.timestamp("ns")),
        ]
    )  # fmt: skip
    image, two = png((200, 0, 0)), list(PROMPTS[:2])
    base = {"image": image, "asks": two, "most": None, "url": "u", "note": "n", "at": 5}
    for day, changes in ((1, {}), (2, {"most": 1}), (3, {"image": b"no image", "asks": None})):
        write_shard(tmp_path / f"in/day={day}/x.parquet", [base | changes], schema)
    rows = run(
        tmp_path / "out", "--input", str(tmp_path / "in"), "--keep-columns", "all",
        "--columns", "prompt=asks,max_new_tokens=most", "--prompt", PROMPTS[2],
        "--max-error-rate", "1",
    )  # fmt: skip
    told = capsys.readouterr()
    assert "the output has a column 'note' itself; yours is 'input_note'" in told.err
    assert "rows keep their own prompt (column 'asks')" in told.out
    assert [(row["day"], row["prompt_number"], row["prompt"]) for row in rows] == [
        (1, 0, PROMPTS[0]), (1, 1, PROMPTS[1]), (2, 0, PROMPTS[0]), (2, 1, PROMPTS[1]),
        (3, 0, PROMPTS[2]),
    ]  # fmt: skip
    assert [row["output_tokens"] == 1 for row in rows] == [False, False, True, True, False]
    assert rows[4]["error"].startswith("image_") and rows[0]["error"] is None
    assert all((row["url"], row["input_note"], row["asks"] is None) for row in rows)
    table = pq.read_table(tmp_path / "out/rows", partitioning=None)
    kinds = {name: table.schema.field(name).type for name in ("url", "at", "asks", "day")}
    assert kinds == {name: schema.field(name).type for name in ("url", "at", "asks")} | {
        "day": pa.int64()
    }
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["rows"], summary["inputs"], summary["errors"]) == (5, 3, 1)
    assert (summary["images"], summary["images_encoded"]) == (4, 1)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_three_prompts_of_an_image_are_three_rows_of_it(tmp_path: Path) -> None:
    """200 images with three prompts, as one row each and as 600 rows."""
    images = {one.picture: one.jpeg for one in asked(1000, ("count",), 5)}
    one = [{"id": name, "image": data} for name, data in images.items()]
    repeated = [row | {"prompt": prompt} for row in one for prompt in PROMPTS]
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("prompt", pa.string())])
    assert len(one) == 200
    write_shard(tmp_path / "one.parquet", one, pa.schema([schema.field(0), schema.field(1)]))
    write_shard(tmp_path / "repeated.parquet", repeated, schema)
    flags = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    few = run(tmp_path / "few", "--input", str(tmp_path / "one.parquet"), *flags)
    many = run(tmp_path / "many", "--input", str(tmp_path / "repeated.parquet"))
    assert [(row["id"], row["prompt"], row["prompt_number"]) for row in few] == [
        (row["id"], prompt, number) for row in one for number, prompt in enumerate(PROMPTS)
    ]
    same = "id", "prompt", "response", "retention", "visual_tokens_stages"
    assert [[row[n] for n in same] for row in few] == [[row[n] for n in same] for row in many]
    told = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("few", "many")]
    assert [one["rows"] for one in told] == [600, 600]
    assert told[0]["images_encoded"] == 200
    rate = told[0]["images_per_s"] / told[1]["images_per_s"]
    print(f"images/s: {rate:.2f} x that of repeated rows ({told[1]['images_encoded']} encoded)")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("job", [caption.JOB, vqa.JOB], ids=lambda job: job.name)
def test_a_template_asks_the_same_in_both_jobs(tmp_path: Path, job: Job) -> None:
    schema = pa.schema([("image", pa.binary()), ("digit", pa.int8()), ("json.lang", pa.string())])
    rows = [{"image": png((0, n, 0)), "digit": n, "json.lang": "en"} for n in range(3)]
    write_shard(tmp_path / "in.parquet", rows, schema)
    found = run(
        tmp_path / "out", "--input", str(tmp_path / "in.parquet"),
        "--prompt-template", r"Is there a {digit}?\n{json.lang}", job=job,
    )  # fmt: skip
    assert [row["prompt"] for row in found] == [f"Is there a {n}?\nen" for n in range(3)]
