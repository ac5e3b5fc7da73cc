"""Thumbnails: sizes, what they show, and how large they get."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.job.fakes import encoded
from trio.job.images.image_files import decode
from trio.job.images.policy import ImagePolicy
from trio.job.images.thumbnails import thumbnails

MOST_BYTES = 100_000


def opened(image: Image.Image) -> Image.Image:
    (file,) = thumbnails([image])
    return Image.open(io.BytesIO(file))


@pytest.mark.parametrize(
    ("size", "reduced"),
    [
        ((640, 480), (320, 240)),
        ((300, 1000), (96, 320)),
        ((320, 320), (320, 320)),
        ((12, 9), (12, 9)),
        ((4000, 20), (320, 2)),
        ((4000, 1), (320, 1)),
    ],
)
def test_the_longer_edge_is_bounded(size: tuple[int, int], reduced: tuple[int, int]) -> None:
    made = opened(Image.new("RGB", size, (10, 200, 30)))
    assert (made.size, made.format, made.mode) == (reduced, "JPEG", "RGB")
    assert np.abs(np.asarray(made).astype(int) - (10, 200, 30)).max() < 8


def test_it_is_upright_as_the_model_saw_it() -> None:
    lying = Image.new("RGB", (800, 400))
    lying.paste((255, 0, 0), (0, 0, 400, 400))
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: left is at the top then
    made = opened(decode(encoded(lying, "JPEG", exif=exif, quality=95), ImagePolicy()))
    assert made.size == (160, 320) and not made.getexif()
    pixels = np.asarray(made).astype(int)
    assert pixels[:150, :, 0].min() > 200 and pixels[170:].max() < 60


def test_the_first_four_images_of_a_row() -> None:
    images = [Image.new("RGB", (8, 8), (30 * n, 0, 0)) for n in range(6)]
    reds = [Image.open(io.BytesIO(file)).getpixel((4, 4)) for file in thumbnails(images)]
    assert [round(red / 30) for red, _, _ in reds] == [0, 1, 2, 3]  # type: ignore[misc]


@pytest.mark.parametrize("size", [(320, 320), (1000, 1000)])
def test_even_noise_stays_small(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    (file,) = thumbnails([Image.fromarray(noise)])
    assert len(file) < MOST_BYTES
