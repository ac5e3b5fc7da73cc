"""Rows that lie: a dirty data set through the job, held against a clean run of its good rows.

Only the job's command line and its output are used.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import caption
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.job.fakes import encoded, write_shard
from tests.job.servers import IMAGE, serving
from tests.tiny.llava import save_tiny_checkpoint
from trio.job.command import main
from trio.job.images import mend

PROMPT = "what is in the picture ?"
MISSING, UNREADABLE, TRUNCATED = "image_missing", "image_unreadable", "image_truncated"
OVERSIZED, SHAPE, NOT_FOUND = "image_oversized", "image_shape", "image_not_found"
FORBIDDEN = "image_forbidden"
BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SPELT_OUT = "what <image> is </s> <s> USER: ASSISTANT: <pad> <unk> {{ 7 * 7 }} <image>"
FIGURES = ("response", "output_tokens", "prompt_tokens", "visual_tokens", "visual_tokens_stages")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row, and what is to become of it."""

    images: Sequence[bytes | str | None] | None
    # each encoded, a path or URI, or null
    prompt: str | None = PROMPT
    kind: str | None = None
    # of its error; None: it is answered
    clean: Sequence[bytes] = ()
    # the images of a good row, where `images` only names them


def noise(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(values).resize(size).convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def odd_png(width: int, height: int, *extra: bytes, pixels: bytes = b"\0" * 100) -> bytes:
    """A PNG of chunks put together by hand."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + chunk(b"IEND", b"")


BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9))


def good_images() -> list[bytes]:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    frames = io.BytesIO()
    noise(20).save(frames, "GIF", save_all=True, append_images=[noise(21), noise(22)])
    modes = [encoded(noise(n, mode=mode)) for n, mode in enumerate(["L", "LA", "P", "RGBA", "1"])]
    kinds = [encoded(noise(n), kind) for n, kind in enumerate(["JPEG", "WEBP", "BMP", "TIFF"], 5)]
    return [
        *modes,
        *kinds,
        frames.getvalue(),
        encoded(deep),
        encoded(noise(11, mode="CMYK"), "JPEG"),
        encoded(noise(12), "JPEG", exif=rotated),
        encoded(noise(13), "JPEG") + b"what a camera appends" * 50,
        encoded(noise(14, (1, 1))),
        encoded(noise(15, (1, 150))),
        encoded(noise(16, (1500, 1100)), "JPEG"),
        odd_png(3, 2, chunk(b"tEXt", b"Comment\0" + b"x" * 500), pixels=b"\0\xff\x80abcdefg" * 2),
        odd_png(3, 2, BOMB, pixels=b"\0\xff\x80abcdefg" * 2),
        encoded(noise(17), "AVIF"),
        encoded(noise(18), "JPEG")[:-2],
        base64.b64encode(encoded(noise(19))),
    ]


def bad_images() -> list[tuple[bytes | None, str]]:
    jpeg = encoded(noise(1, (200, 200)), "JPEG")
    huge = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(huge, "PNG")
    return [
        (None, MISSING),
        (b"", "image_empty"),
        (b"\0" * 100, UNREADABLE),
        (b"GIF89a", UNREADABLE),
        (b"\x89PNG\r\n\x1a\n", UNREADABLE),
        (encoded(noise(3))[:-30], TRUNCATED),
        (jpeg[: len(jpeg) // 2], TRUNCATED),
        (jpeg[:4], UNREADABLE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNREADABLE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNREADABLE),
        (b"%PDF-1.7", UNREADABLE),
        (b"PAR1", UNREADABLE),
        (huge.getvalue(), OVERSIZED),
        (odd_png(60_000, 60_000), OVERSIZED),
        (odd_png(40, 40), TRUNCATED),
        (odd_png(0, 40), UNREADABLE),
        (odd_png(40, 40, BOMB), TRUNCATED),
        (encoded(Image.new("L", (3000, 2))), SHAPE),
        (encoded(Image.new("L", (1, 900))), SHAPE),
    ]


def prompts() -> list[Case]:
    """Odd prompts over a good image, and hopeless ones."""
    images = [encoded(noise(30))]
    good = [
        SPELT_OUT,
        "<image>",
        "\N{GRINNING FACE} où 図 \u202e red",
        "red\0green\r\n\tblue",
        "the red " * 90,
    ]
    bad: list[tuple[str | None, str]] = [
        (None, "prompt_missing"),
        ("", "prompt_missing"),
        (" \n\t", "prompt_missing"),
        ("the picture " * 400, "too_long"),
        ("x" * 50_000 + " a" * 5_000, "too_long"),
    ]
    return [Case(images=images, prompt=text) for text in good] + [
        Case(images=images, prompt=text, kind=kind) for text, kind in bad
    ]


def singles() -> list[Case]:
    """One image a row, or none."""
    good = [Case(images=[data]) for data in good_images()]
    bad = [Case(images=[data], kind=kind) for data, kind in bad_images()]
    pairs = [case for pair in zip(good, bad, strict=False) for case in pair]
    return pairs + good[len(bad) :] + bad[len(good) :]


def lists() -> list[Case]:
    """Several images a row, some of them bad."""
    one, two = encoded(noise(40)), encoded(noise(41))
    return [
        Case(images=[one, two]),
        Case(images=[two, one]),
        Case(images=None, kind=MISSING),
        Case(images=[], kind=MISSING),
        Case(images=[None, None], kind=MISSING),
        Case(images=[one, None], kind=MISSING),
        Case(images=[one, b"junk", two], kind=UNREADABLE),
        Case(images=[one, b""], kind="image_empty"),
        Case(images=[one] * 30, kind="too_long"),
    ]


def named(folder: Path, port: int) -> list[Case]:
    """Images by path and URI; the folder is that of the shards."""
    data = [encoded(noise(n)) for n in range(50, 54)]
    outside = folder.parent / "outside"
    rooted = folder.parent / "rooted"
    for each in (outside, rooted, folder / "img"):
        each.mkdir(parents=True)
    (folder / "img" / "a.png").write_bytes(data[0])
    (folder / "img" / "png.jpg").write_bytes(data[1])
    (folder / "img" / "ä ?#b.png").write_bytes(data[2])
    (folder / "img" / "link.png").symlink_to("a.png")
    (folder / "img" / "rooted.png").symlink_to(rooted / "r.png")
    (folder / "img" / "out.png").symlink_to(outside / "o.png")
    (folder / "img" / "loop.png").symlink_to("loop.png")
    (folder / "img" / "empty.png").write_bytes(b"")
    (folder / "img" / "text.png").write_text("no image")
    os.mkfifo(folder / "img" / "fifo.png")
    (outside / "o.png").write_bytes(data[0])
    (rooted / "r.png").write_bytes(data[3])
    web = f"http://127.0.0.1:{port}"
    good = [
        ("img/a.png", data[0]),
        ("img/png.jpg", data[1]),
        ("img/ä ?#b.png", data[2]),
        ("img/link.png", data[0]),
        ("./img/../img/a.png", data[0]),
        (str(folder / "img" / "a.png"), data[0]),
        (f"file://{folder}/img/%61.png", data[0]),
        (str(rooted / "r.png"), data[3]),
        ("img/rooted.png", data[3]),
        (f"{web}/ok?sig=secret", IMAGE),
        (f"{web}/count/2", IMAGE),
        (f"data:image/png;base64,{base64.b64encode(data[1]).decode()}", data[1]),
        (base64.b64encode(data[2]).decode(), data[2]),
    ]
    bad = [
        ("", MISSING),
        ("  ", MISSING),
        ("img/a\0.png", MISSING),
        ("img/none.png", NOT_FOUND),
        ("x" * 3000, NOT_FOUND),
        ("img/loop.png", NOT_FOUND),
        ("img/empty.png", "image_empty"),
        ("img/text.png", UNREADABLE),
        ("img", FORBIDDEN),
        ("img/fifo.png", FORBIDDEN),
        ("img/out.png", FORBIDDEN),
        ("../outside/o.png", FORBIDDEN),
        (str(outside / "o.png"), FORBIDDEN),
        (str(outside / "none.png"), FORBIDDEN),
        (f"file://{outside}/o.png", FORBIDDEN),
        ("/dev/zero", FORBIDDEN),
        ("/etc/passwd", FORBIDDEN),
        (f"{web}/missing?sig=secret", NOT_FOUND),
        (f"{web}/count/9", NOT_FOUND),
        (f"{web}/short", TRUNCATED),
        (f"{web}/drip?sig=secret", "image_timeout"),
        (f"{web}/to?http://localhost:{port}/ok", FORBIDDEN),
        (f"http://localhost:{port}/ok?sig=secret", FORBIDDEN),
        (f"http://me:secret@127.0.0.1:{port}/ok", FORBIDDEN),
        ("https://example.org/x.png?sig=secret#secret", FORBIDDEN),
        ("s3://bucket/x.png?endpoint_override=127.0.0.1", FORBIDDEN),
        ("ftp://example.org/x.png", FORBIDDEN),
        (f"data:image/png;base64,{base64.b64encode(data[1]).decode()[:-3]}", UNREADABLE),
    ]
    return [Case(images=[name], clean=[image]) for name, image in good] + [
        Case(images=[name], kind=kind) for name, kind in bad
    ]


def unchecked(texts: Sequence[bytes | None]) -> pa.Array:
    """Strings, whether or not they are UTF-8."""
    return pa.array(texts, pa.binary()).view(pa.string())


class DataSet:
    """Shards written one after the other, and their rows by id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, Case] = {}
        self.shards = 0

    def add(self, cases: Sequence[Case], build: Any, row_group: int = 1000) -> None:
        """`build` makes a table of cases and their ids."""
        ids = [f"{self.shards}-{n}" for n in range(len(cases))]
        self.rows |= dict(zip(ids, cases, strict=True))
        path = self.folder / f"{self.shards:02}.parquet"
        pq.write_table(build(cases, ids), path, row_group_size=row_group)
        self.shards += 1


def part(item: bytes | str | None) -> dict[str, Any]:
    return {
        "bytes": item if isinstance(item, bytes) else None,
        "path": item if isinstance(item, str) else "gone.jpg" if item else None,
    }


def first(case: Case) -> Any:
    return case.images[0] if case.images else None


def list_of_structs(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    images = [None if c.images is None else list(map(part, c.images)) for c in cases]
    image = pa.array(images, pa.list_(BYTES_AND_PATH))
    return pa.table({"id": ids, "image": image, "prompt": [c.prompt for c in cases]})


def plain_bytes(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    """Another order of columns, others beside them, large strings."""
    return pa.table(
        {
            "prompt": pa.array([c.prompt for c in cases], pa.large_string()),
            "extra": pa.array([[{"a": 1.5}]] * len(cases)),
            "image": pa.array(list(map(first, cases)), pa.large_binary()),
            "id": pa.array(ids, pa.large_string()),
        }
    )


def structs(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    """Dictionaries of prompts and ids, a field more, and half of the rows null as a whole."""
    kind = pa.struct([("size", pa.int32()), ("path", pa.large_string()), ("bytes", pa.binary())])
    images = [None if first(c) is None else part(first(c)) | {"size": 1} for c in cases]
    return pa.table(
        {
            "id": pa.array(ids).dictionary_encode(),
            "prompt": pa.array([c.prompt for c in cases]).dictionary_encode(),
            "image": pa.array(images, kind),
        }
    )


def large_lists(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    image = pa.array([c.images for c in cases], pa.large_list(pa.large_binary()))
    return pa.table({"image": image, "id": ids, "prompt": [c.prompt for c in cases]})


def paths(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    image = pa.array(list(map(first, cases)), pa.string())
    return pa.table({"image": image, "prompt": [c.prompt for c in cases], "id": ids})


def nested(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    image = pa.array([[c.images] for c in cases], pa.list_(pa.list_(pa.binary())))
    return pa.table({"image": image, "prompt": [c.prompt for c in cases], "id": ids})


def text_as_bytes(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    image = [{"bytes": "iVBORw0KGgo=", "path": None} for _ in cases]
    return pa.table({"image": image, "prompt": [c.prompt for c in cases], "id": ids})


def all_null(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    nothing = pa.nulls(len(cases))
    return pa.table({"image": nothing, "prompt": nothing, "id": ids})


def not_utf8(cases: Sequence[Case], ids: Sequence[str]) -> pa.Table:
    """Wrong bytes in a prompt and in a path; the first row is as it should be."""
    data = [first(case) for case in cases]
    names = unchecked([b"a.png", b"a.png", b"\xff\xfe.png", b"\xc3.png"])
    image = pa.StructArray.from_arrays([pa.array(data, pa.binary()), names], ["bytes", "path"])
    prompt = unchecked([PROMPT.encode(), b"what \xff\xfe", PROMPT.encode(), PROMPT.encode()])
    return pa.table({"image": image, "prompt": prompt, "id": ids})


def dirty(folder: Path, port: int) -> DataSet:
    data = DataSet(folder)
    by_name = named(folder, port)
    rows = singles()
    data.add([*rows, *lists(), *prompts()], list_of_structs, row_group=7)
    data.add([*rows, *prompts()], plain_bytes)
    data.add([], paths)
    data.add(rows, structs, row_group=10)
    data.add([*rows[:20], *lists()], large_lists)
    data.add(by_name, paths, row_group=1)
    data.add(by_name[:20], list_of_structs)
    data.add([Case(images=[IMAGE], kind=UNREADABLE)] * 2, nested)
    data.add([Case(images=[IMAGE], kind=UNREADABLE)] * 2, text_as_bytes)
    data.add([Case(images=None, prompt=None, kind="prompt_missing")] * 3, all_null)
    kinds = [None, "prompt_invalid", "image_invalid", "image_invalid"]
    data.add([Case(images=[IMAGE], kind=kind) for kind in kinds], not_utf8)
    return data


def run(*flags: str) -> int:
    return main(caption.JOB, [*flags, "--log-interval", "60"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model"), max_positions=768))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as number:
        yield number


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_every_row_comes_back_and_good_ones_are_none_the_wiser(
    model: str, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dirty(tmp_path / "in", port)
    kinds = Counter(case.kind for case in data.rows.values())
    good = kinds.pop(None)
    assert len(data.rows) >= 200 and good >= 80 and len(kinds) >= 13
    out, alone = tmp_path / "out", tmp_path / "alone"
    common = ["--model", model, "--retention", "0.4", "--max-new-tokens", "6"]
    flags = ["--input", str(tmp_path / "in"), "--output", str(out), "--rows-per-file", "30"]
    flags += ["--allow-remote-images", "--remote-images-from", f"http://127.0.0.1:{port}"]
    flags += ["--image-roots", str(tmp_path / "rooted"), "--row-timeout", "3", "--threads", "2"]
    assert run(*flags, *common, "--max-error-rate", "0.2") == 3
    captured = capsys.readouterr()
    assert "more than --max-error-rate 0.2" in captured.err
    table = pq.read_table(out / "rows").to_pylist()
    assert [row["id"] for row in table] == list(data.rows)
    assert len({row["row"] for row in table}) == len(table)
    wrong = [
        (row["id"], data.rows[row["id"]].kind, row["error"])
        for row in table
        if (row["error"] or "None: ").partition(": ")[0] != str(data.rows[row["id"]].kind)
    ]
    assert not wrong
    shown = [line.split() for line in captured.out.splitlines()]
    assert not [kind for kind, n in kinds.items() if [kind, str(n)] not in shown], captured.out
    for row in table:
        assert (row["finish_reason"] == "error") == (row["response"] is None)
        assert row["error"] is None or len(row["error"].partition(": ")[2]) > 5
        assert "secret" not in (row["error"] or "")
        assert len(row["error"] or "") < 500 and "iVBOR" not in (row["error"] or "")
    assert {row["note"] for row in table} == {None, mend.BARE, mend.NO_END}
    printed = captured.out + captured.err + (out / "run.yaml").read_text()
    assert "secret" not in printed and "Traceback" not in printed

    cases = {key: case for key, case in data.rows.items() if case.kind is None}
    clean = [
        {
            "id": key,
            "image": list(map(part, case.clean or case.images or [])),
            "prompt": case.prompt,
        }
        for key, case in cases.items()
    ]
    schema = pa.schema(
        [("id", pa.string()), ("image", pa.list_(BYTES_AND_PATH)), ("prompt", pa.string())]
    )
    write_shard(tmp_path / "clean" / "0.parquet", clean, schema)
    assert run("--input", str(tmp_path / "clean"), "--output", str(alone), *common) == 0
    expected = {row["id"]: row for row in pq.read_table(alone / "rows").to_pylist()}
    assert set(expected) == set(cases)
    for row in table:
        if row["id"] in cases:
            other = expected[row["id"]]
            assert [row[name] for name in FIGURES] == [other[name] for name in FIGURES], row["id"]
            assert row["visual_tokens"] == 64 * row["num_images"]
            assert row["prompt"] == cases[row["id"]].prompt
    assert len({row["response"] for row in expected.values()}) > 15


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_ids_are_integers_of_several_sizes_and_nulls(model: str, tmp_path: Path) -> None:
    numbers = [pa.int16(), pa.uint32(), pa.int64(), pa.dictionary(pa.int8(), pa.int32()), pa.null()]
    for n, kind in enumerate(numbers):
        ids = pa.array([None, None] if kind == pa.null() else [n, None], kind)
        table = pa.table({"id": ids, "image": [IMAGE] * 2, "prompt": [PROMPT] * 2})
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"{n}.parquet")
    common = ["--model", model, "--retention", "0.4", "--max-new-tokens", "2"]
    assert run("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *common) == 0
    got = pq.read_table(tmp_path / "out" / "rows")
    assert got.schema.field("id").type == pa.int64()
    assert got.column("id").to_pylist() == [0, None, 1, None, 2, None, 3, None, None, None]
    assert got.column("error").null_count == 10


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_id_that_is_no_text_and_a_uri_that_needs_a_flag(model: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": unchecked([b"ok", b"\xff", None, b"far"]),
            "image": [*map(part, [IMAGE] * 3), part("https://example.org/x.png?sig=secret")],
            "prompt": [PROMPT] * 4,
        }
    )
    pq.write_table(table, tmp_path / "text.parquet")
    flags = ["--input", str(tmp_path / "text.parquet"), "--output", str(tmp_path / "text")]
    assert run(*flags, "--model", model, "--retention", "0.4", "--max-new-tokens", "2") == 0
    rows = pq.read_table(tmp_path / "text" / "rows").to_pylist()
    assert [row["id"] for row in rows] == ["ok", None, None, "far"]
    remote = "image_remote: https:// is not fetched without --allow-remote-images"
    invalid = "id_invalid: the text is not UTF-8"
    assert [row["error"] for row in rows] == [None, invalid, None, remote]


def test_ids_that_no_type_holds_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key in (("0", "a"), ("1", 1)):
        (tmp_path / "in").mkdir(exist_ok=True)
        table = pa.table({"id": [key], "image": [IMAGE], "prompt": [PROMPT]})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    assert run("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")) == 2
    assert re.search(
        r"column .id. is string in .*0.parquet, int64 in .*1.parquet: give all",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "out").exists()
