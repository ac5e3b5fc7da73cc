"""Limits on the size to which images are resized."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support import picture
from tests.tiny.llava import LLAVA_NEXT, save_tiny_checkpoint
from tests.tiny.qwen2_5_vl import LARGEST, PATCH, save_tiny_qwen, tiny_qwen_processor
from trio.engine.engine import Engine
from trio.engine.kv_budget import TEXT_TOKENS
from trio.engine.loading import load_processor
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Request, Sampling
from trio.errors import UserError
from trio.families.pixel_limits import limit_images, most_visual_tokens
from trio.families.qwen2_5_vl import Qwen25VLAdapter

TOKEN = (2 * PATCH) ** 2
"""Pixels of a visual token."""
SMALL, LARGE = (16, 16), (240, 200)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_qwen(tmp_path_factory.mktemp("qwen")))


def visual_tokens(prepare: Preprocessor, size: tuple[int, int]) -> int:
    made = prepare(Request(prompt="what", images=(picture(0, size),)))
    assert isinstance(made, Prepared)
    (count,) = made.image_tokens
    return count


def test_images_are_resized_to_between_the_limits(qwen: str) -> None:
    assert visual_tokens(Preprocessor(load_processor(qwen), Qwen25VLAdapter), SMALL) == 4
    limits: Any = {"min_pixels": 20 * TOKEN, "max_pixels": 30 * TOKEN}
    engine = Engine.from_pretrained(qwen, device="cpu", kv_bytes=1 << 26, **limits)
    own = Preprocessor(load_processor(qwen, **limits), Qwen25VLAdapter)
    for prepare in (engine.prepare, pickle.loads(pickle.dumps(own))):
        assert visual_tokens(prepare, SMALL) == 25
        assert visual_tokens(prepare, LARGE) == 30
    results = list(engine.generate([Request(prompt="what", images=(picture(0, LARGE),))]))
    assert [(result.error, result.visual_tokens) for result in results] == [(None, 30)]


def test_the_other_limit_stays(qwen: str) -> None:
    others: list[tuple[dict[str, Any], tuple[int, int], int]] = [
        ({"max_pixels": 30 * TOKEN}, SMALL, 4),
        ({"min_pixels": 20 * TOKEN}, LARGE, 72),
    ]
    for limits, size, expected in others:
        preparer = Preprocessor(load_processor(qwen, **limits), Qwen25VLAdapter)
        assert visual_tokens(preparer, size) == expected


def test_the_memory_plan_follows(qwen: str) -> None:
    for tokens, planned in ((30, 30), (1 << 20, 32 * 32)):
        engine = Engine.from_pretrained(
            qwen, device="cpu", max_pixels=tokens * TOKEN, kv_bytes=1 << 26,
            sampling=Sampling(max_new_tokens=10),
        )  # fmt: skip
        need = engine._runner.need(planned + TEXT_TOKENS, [planned], 10)
        assert engine.memory_plan.request_bytes == engine._cache.bytes_of(need)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_pixels": 0}, "min_pixels must be a whole number of pixels, at least 1, got 0"),
        ({"max_pixels": 1e6}, "max_pixels must be a whole number of pixels"),
        ({"max_pixels": True}, "max_pixels must be a whole number of pixels"),
        ({"min_pixels": 900, "max_pixels": 800}, "min_pixels 900 is above max_pixels 800;"),
        (
            {"min_pixels": 6000},
            f"min_pixels 6000 is above max_pixels {LARGEST * TOKEN} of the processor itself",
        ),
        ({"max_pixels": 100}, "min_pixels 256 of the processor itself is above max_pixels 100"),
        ({"min_pixels": 1, "max_pixels": 63}, "less than one visual token's 64 pixels"),
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, Any], said: str) -> None:
    processor = tiny_qwen_processor()
    with pytest.raises(UserError) as caught:
        limit_images(processor, **{"min_pixels": None, "max_pixels": None, **limits})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert most_visual_tokens(processor) == LARGEST


@pytest.mark.parametrize("options", [{}, LLAVA_NEXT], ids=["llava", "llava_next"])
def test_models_with_pictures_of_fixed_size_take_no_limits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = str(save_tiny_checkpoint(tmp_path, **options))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"max_pixels cannot be set: .* of fixed size"):
        Engine.from_pretrained(model, device="cpu", max_pixels=100_000)
    with pytest.raises(UserError, match="min_pixels and max_pixels cannot be set"):
        load_processor(model, min_pixels=10, max_pixels=100_000)
    assert most_visual_tokens(load_processor(model)) is None
