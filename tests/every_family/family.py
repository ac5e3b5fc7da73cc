"""Every supported family as a tiny random model, its processor, and its checkpoint on disk.

A new family gets an entry in `FAMILIES` and is then held to all that the tests here ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support import MANY_SIZES, mixed_requests, picture
from tests.tiny.llava import LLAVA_NEXT, PINPOINTS, save_tiny_checkpoint, tiny_llava, tiny_processor
from tests.tiny.llava_onevision import onevision_processor, save_tiny_onevision, tiny_onevision
from tests.tiny.qwen2_5_vl import LARGEST, save_tiny_qwen, tiny_qwen, tiny_qwen_processor
from tests.tiny.qwen3_vl import save_tiny_qwen3, tiny_qwen3, tiny_qwen3_processor
from trio.engine.request import Request, Sampling
from trio.families.adapter import Adapter

LAYERS = 6
LIVELY = 0.4
"""Standard deviation of the decoder's weights with which answers are varied: equal answers then
mean something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """model: over `LAYERS` decoder layers, lively, in eval mode. processor: that fits it.
    save: writes the same model and processor into a directory as they are on the hub.
    image_processor: class that the directory's is loaded as.
    planned: visual tokens of the image that the memory plan is for.
    per_image: whether images of different sizes give different numbers of visual tokens.
    sizes: the model input without which images cannot be told apart, if any.
    """

    model: Any
    processor: Any
    save: Callable[[Path], Path]
    image_processor: str
    planned: int
    per_image: bool = True
    sizes: str | None = None


def llava(**options: Any) -> Family:
    options = {"spread": LIVELY, "layers": LAYERS, "max_positions": 1024, **options}
    tower = {name: options[name] for name in ("tower", "strategy") if name in options}
    return Family(
        model=tiny_llava(**options),
        processor=tiny_processor(**tower),
        save=lambda path: save_tiny_checkpoint(path, **options),
        image_processor="SiglipImageProcessorPil" if tower else "CLIPImageProcessorPil",
        planned=64,
        per_image=False,
    )


def llava_next(**options: Any) -> Family:
    options = {"spread": LIVELY, "layers": LAYERS, **LLAVA_NEXT, **options}
    return Family(
        model=tiny_llava(**options),
        processor=tiny_processor(patch_size=8, pinpoints=PINPOINTS),
        save=lambda path: save_tiny_checkpoint(path, **options),
        image_processor="LlavaNextImageProcessorPil",
        planned=88,
        sizes="image_sizes",
    )


def llava_onevision() -> Family:
    return Family(
        model=tiny_onevision(spread=LIVELY, layers=LAYERS),
        processor=onevision_processor(),
        save=lambda path: save_tiny_onevision(path, spread=LIVELY, layers=LAYERS),
        image_processor="LlavaOnevisionImageProcessorPil",
        planned=25 + 15 * (8 + 1),
        sizes="image_sizes",
    )


def qwen2_5_vl() -> Family:
    return Family(
        model=tiny_qwen(spread=LIVELY, layers=LAYERS),
        processor=tiny_qwen_processor(),
        save=lambda path: save_tiny_qwen(path, spread=LIVELY, layers=LAYERS),
        image_processor="Qwen2VLImageProcessorPil",
        planned=LARGEST,
        sizes="image_grid_thw",
    )


def qwen3_vl(**options: Any) -> Family:
    options = {"seed": 1, "spread": LIVELY, "layers": LAYERS, **options}
    return Family(
        model=tiny_qwen3(**options),
        processor=tiny_qwen3_processor(),
        save=lambda path: save_tiny_qwen3(path, **options),
        image_processor="Qwen2VLImageProcessorPil",
        planned=LARGEST,
        sizes="image_grid_thw",
    )


_MISTRAL: dict[str, Any] = {"family": "mistral", "sliding_window": None}
FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": llava,
    "llava-mistral": lambda: llava(**_MISTRAL),
    "llava-qwen2": lambda: llava(family="qwen2"),
    "llava-siglip": lambda: llava(family="qwen2", tower="siglip", strategy="full"),
    "llava_next": llava_next,
    "llava_next-mistral": lambda: llava_next(**_MISTRAL),
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl-untied": lambda: qwen3_vl(tied=False),
}
ARCHITECTURES = [name for name in FAMILIES if "-" not in name]
"""One of each adapter, for what does not depend on the decoder."""


def covering(values: Mapping[str, Any], quick: Mapping[str, Sequence[str]]) -> list[Any]:
    """Each value with each architecture; all but those named in `quick` are slow."""
    return [
        pytest.param(name, value, id=f"{name}-{key}", marks=[pytest.mark.slow] * (name not in own))
        for key, value in values.items()
        for own in [quick.get(key, ())]
        for name in ARCHITECTURES
    ]


def skip_without(adapter: Adapter, encoder: str) -> None:
    """Ends the test where the family has no such reduction."""
    if encoder not in ("none", *adapter.encoders):
        pytest.skip(f"the family has no {encoder}")


def requests_of_many_sizes(count: int, *, seed: int = 0, **sampling: Any) -> list[Request]:
    """No, one or two images a prompt, and one prompt with every size, so with many images."""
    requests = mixed_requests(count, seed=seed, sizes=MANY_SIZES, **sampling)
    album = tuple(picture(n, size) for n, size in enumerate(MANY_SIZES))
    last = Sampling(**{"max_new_tokens": 9, **sampling})
    return [*requests, Request(prompt="how many", images=album, id=count, sampling=last)]


def requests_with(images: Sequence[int]) -> list[Request]:
    """Prompts with so many images each, all of different sizes, and short answers."""
    pictures = iter([picture(number, size) for number, size in enumerate(MANY_SIZES)])
    prompts = cycle(["what is this", "how many", "describe the picture please", "where is red ?"])
    return [
        Request(
            prompt=prompt,
            images=tuple(next(pictures) for _ in range(count)),
            id=number,
            sampling=Sampling(max_new_tokens=2),
        )
        for number, (count, prompt) in enumerate(zip(images, prompts, strict=False))
    ]
