"""Pictures whose file is damaged beside their pixels, and those that lack pixels."""

import io
import resource
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.job.fakes import encoded, png
from trio.job.images import mend
from trio.job.images.image_files import NOTE, decode, load_images, note_of
from trio.job.images.policy import ImagePolicy, RowError

POLICY = ImagePolicy()
SMALL = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
PHOTO = Image.fromarray(SMALL).resize((160, 120))
FLAT = Image.new("RGB", (160, 120), (120, 30, 60))
PNG = encoded(PHOTO)
SIDEWAYS = Image.Exif()
SIDEWAYS[274] = 6


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    check = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def with_chunk(*chunks: bytes, late: bool = False) -> bytes:
    at = len(PNG) - 12 if late else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def bomb(size: int) -> bytes:
    """Deflated zeros, without ever holding them."""
    deflate, zeros = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(deflate.compress(zeros) for _ in range(size >> 20)) + deflate.flush()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_segments(*segments: bytes, **options: Any) -> bytes:
    jpeg = encoded(PHOTO, "JPEG", **options)
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


LARGE = zlib.compress(b"x" * (2 << 20))
MPF = segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff" + b"\x80" * 40)


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(chunk(b"zTXt", b"parameters\0\0" + LARGE)),
        with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)),
        with_chunk(chunk(b"zTXt", b"parameters\0\0" + LARGE), late=True),
        with_chunk(*[chunk(b"tEXt", b"k\0" + b"x" * (1 << 20))] * 70),
        with_chunk(chunk(b"zTXt", b"k\0\0" + b"no deflate")),
        with_chunk(chunk(b"zTXt", b"k\0\7" + LARGE)),
        with_chunk(chunk(b"iCCP", b"icc\0\0" + LARGE)),
        with_chunk(chunk(b"iCCP", b"icc\0\1" + LARGE)),
        with_chunk(chunk(b"iCCP", b"")),
        with_chunk(chunk(b"tIME", b"\0" * 7, crc=1)),
        with_chunk(chunk(b"tEXt", b"k\0v", crc=1)),
        with_chunk(chunk(b"pHYs", b"\0")),
        with_chunk(chunk(b"gAMA", b"")),
        with_chunk(chunk(b"cHRM", b"\0" * 3)),
        with_chunk(chunk(b"acTL", b"\0\0\0\2")),
        with_chunk(chunk(b"eXIf", b"junk", crc=1)),
        with_chunk(chunk(b"tEXt", b"k\0v"), late=True)[:-15],
        with_segments(MPF),
        with_segments(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4" + b"\xff" * 9)),
        with_segments(*[segment(0xFE, b"c" * 65000)] * 9),
        with_segments(segment(0xE2, b"ICC_PROFILE\0\7\2" + b"x" * 60000)),
        with_segments(segment(0xE2, b"ICC_PROFILE\0")),
        with_segments(segment(0xE2, b"ICC_PROFILE\0"))[:-2],
        with_segments(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
        with_segments(segment(0xE1, b"Exif\0\0" + b"\xff" * 60000)),
        with_segments(segment(0xEC, b"Ducky"), b"\xff\xfe\0\2"),
    ],
)
def test_a_picture_is_taken_whatever_stands_beside_its_pixels(data: bytes) -> None:
    image = decode(data, POLICY)
    assert image.size == (160, 120)
    original = encoded(PHOTO, "JPEG") if data[:2] == b"\xff\xd8" else PNG
    assert image.tobytes() == decode(original, POLICY).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(chunk(b"zTXt", b"k\0\0" + LARGE), chunk(b"eXIf", SIDEWAYS.tobytes()[6:])),
        with_segments(MPF, exif=SIDEWAYS),
    ],
)
def test_what_is_mended_stays_upright(data: bytes) -> None:
    assert decode(data, POLICY).size == (120, 160)


def test_orientation_survives_tags_that_cannot_be_written_again() -> None:
    turned, maker = struct.pack("<HHII", 274, 3, 1, 6), struct.pack("<HHII", 271, 12, 1, 20)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + maker + bytes(20)
    assert decode(with_segments(segment(0xE1, exif)), POLICY).size == (120, 160)


def test_a_bomb_beside_the_pixels_costs_no_memory() -> None:
    data = with_chunk(chunk(b"zTXt", b"k\0\0" + bomb(1 << 30)), chunk(b"iCCP", b"i\0\0" + LARGE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(data, POLICY).info[NOTE] == mend.BARE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


SEQUENTIAL: list[dict[str, Any]] = [
    {},
    {"quality": 100, "subsampling": 0},
    {"restart_marker_blocks": 7},
    {"restart_marker_rows": 1},
]
PROGRESSIVE = [{"progressive": True}, {"progressive": True, "restart_marker_rows": 1}]


@pytest.mark.parametrize("options", SEQUENTIAL)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_taken(mode: str, options: dict[str, Any]) -> None:
    data = encoded(PHOTO.convert(mode), "JPEG", **options)
    whole = decode(data, POLICY)
    assert NOTE not in whole.info
    for cut in (data[:-1], data[:-2], data[:-2] + b"\0" * 50):
        image = decode(cut, POLICY)
        assert image.info[NOTE] == mend.NO_END
        assert image.tobytes() == whole.tobytes()


def ends(data: bytes) -> Sequence[int]:
    """Where to cut: near the end, all over, and before and behind every marker."""
    scan = data.index(b"\xff\xda") + 20
    markers = [n for n in range(scan, len(data) - 2) if data[n] == 0xFF and data[n + 1]]
    near = [n + k for n in markers for k in range(3) if n + k < len(data) - 3]
    return [*range(len(data) - 24, len(data) - 3), *range(scan, len(data) - 24, 331), *near[:30]]


@pytest.mark.parametrize("options", [*SEQUENTIAL, *PROGRESSIVE])
def test_a_jpeg_that_lacks_pixels_is_an_error(options: dict[str, Any]) -> None:
    data = encoded(PHOTO, "JPEG", **options)
    for end in ends(data):
        with pytest.raises(RowError) as caught:
            decode(data[:end], POLICY)
        assert caught.value.kind == "image_truncated", len(data) - end


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000"])
def test_other_formats_that_lack_pixels_are_errors(kind: str) -> None:
    data = encoded(PHOTO.resize((40, 30)), kind)
    for cut in (1, 2, 12, 40, 120):
        if kind in ("PNG", "GIF") and cut < 40:  # their end, a checksum
            continue
        with pytest.raises(RowError):
            decode(data[:-cut], POLICY)


def test_missing_pixels_of_one_colour_are_missed() -> None:
    data = encoded(FLAT, "JPEG")
    for cut in (4, 40, 100):
        with pytest.raises(RowError, match="image_truncated"):
            decode(data[:-cut], POLICY)


def test_a_png_without_its_end_chunk_says_so() -> None:
    assert decode(PNG[:-12], POLICY).info == {NOTE: mend.NO_END}
    assert decode(PNG + b"more", POLICY).info == {}
    assert decode(encoded(PHOTO, "JPEG") + b"more", POLICY).info == {}
    with pytest.raises(RowError, match="image_truncated"):
        decode(PNG[:-40], POLICY)


def test_notes_name_their_image() -> None:
    whole, cut = png(), encoded(PHOTO, "JPEG")[:-2]
    assert note_of(load_images(whole, None, POLICY)) is None
    assert note_of(load_images(cut, None, POLICY)) == mend.NO_END
    assert note_of(load_images([whole, cut, cut], None, POLICY)) == (
        f"image 2 of 3: {mend.NO_END}; image 3 of 3: {mend.NO_END}"
    )


def test_text_in_a_file_is_no_note() -> None:
    assert decode(with_chunk(chunk(b"tEXt", b"note\0all is well")), POLICY).info == {}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_files_are_errors_of_their_own(kind: str) -> None:
    """Whatever is broken, nothing but an image or a RowError comes out."""
    data, random = encoded(PHOTO, kind), np.random.default_rng(3)
    for _ in range(60):
        broken = bytearray(data[: random.integers(1, len(data) + 1)])
        for at in random.integers(0, len(broken), 3):
            broken[at] = random.integers(256)
        with suppress(RowError):
            decode(bytes(broken), ImagePolicy(max_pixels=1_000_000)).tobytes()


def test_good_files_are_left_alone() -> None:
    assert all(mend.bare_png(data) is None for data in (PNG, encoded(PHOTO, "JPEG"), b"junk", b""))
    assert decode(encoded(PHOTO, "JPEG"), POLICY).info == {} == decode(PNG, POLICY).info


@pytest.mark.parametrize("options", PROGRESSIVE)
def test_of_a_progressive_jpeg_without_its_end_nobody_knows(options: dict[str, Any]) -> None:
    """Whole scans may be missing."""
    with pytest.raises(RowError, match="image_truncated"):
        decode(encoded(PHOTO, "JPEG", **options)[:-2], POLICY)


def test_a_second_picture_may_be_cut() -> None:
    frames = io.BytesIO()
    PHOTO.save(frames, "MPO", save_all=True, append_images=[FLAT])
    two = frames.getvalue()
    first = encoded(PHOTO, "JPEG")
    assert decode(two[: len(first) + 200], POLICY).tobytes() == decode(first, POLICY).tobytes()
