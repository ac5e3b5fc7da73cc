"""Reduced features against the model's own: which they are, how many, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.support import MANY_SIZES, picture
from tests.tiny.llava import LLAVA_NEXT, PINPOINTS, Strategy, tiny_llava, tiny_processor
from tests.tiny.llava_onevision import tiny_onevision
from trio.encoders.merging import shared
from trio.encoders.visionzip import zip_split
from trio.errors import UserError
from trio.families.adapter import Features, Inputs
from trio.families.class_token_tower import ClassTokenAdapter
from trio.families.registry import adapt
from trio.pruning.options import Pruning

ENCODERS = ("visionzip", "scan", "scope", "prunesid")


def adapter_of(**options: Any) -> ClassTokenAdapter:
    adapter = adapt(tiny_llava(layers=2, **options))
    assert isinstance(adapter, ClassTokenAdapter)
    return adapter


@pytest.fixture(scope="module")
def tiled() -> ClassTokenAdapter:
    return adapter_of(**LLAVA_NEXT)


def square(count: int) -> list[dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(4)
    return [{"pixel_values": torch.randn(1, 3, 32, 32, generator=chance)} for _ in range(count)]


def of_many_sizes() -> list[dict[str, Tensor]]:
    processor = tiny_processor(patch_size=8, pinpoints=PINPOINTS)
    made = [
        processor(images=[picture(n, size)], text=["<image>"], return_tensors="pt")
        for n, size in enumerate(MANY_SIZES)
    ]
    return [{name: one[name] for name in ("pixel_values", "image_sizes")} for one in made]


def patches(adapter: ClassTokenAdapter, image: Inputs) -> Tensor:
    """Of each tile, without padding."""
    return (adapter._places(image) >= 0).sum(dim=1)


def assert_own(image: Features, unreduced: Features, tokens: Sequence[int]) -> None:
    """These tokens are the model's own features, at the places that they name."""
    sources = [image.sources[token] for token in tokens]
    assert None not in sources
    expected = unreduced.tokens[torch.tensor(sources, dtype=torch.long)]
    torch.testing.assert_close(image.tokens[list(tokens)], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("strategy", "encoder"), [*zip(("default", "full") * 2, ENCODERS, strict=True)]
)
def test_any_number_of_tokens_can_be_kept(strategy: Strategy, encoder: str) -> None:
    adapter = adapter_of(strategy=strategy)
    count = adapter.max_visual_tokens
    assert count == 64 + (strategy == "full")
    images = square(1) * count
    for keep, image in enumerate(adapter.encode_images(images, encoder, range(1, count + 1)), 1):
        assert len(image) == len(image.sources) == keep
        assert_well_formed(image, count)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_number_of_tokens_can_be_kept_of_tiles(tiled: ClassTokenAdapter, encoder: str) -> None:
    for inputs in of_many_sizes():
        (count,) = tiled.visual_tokens(inputs)
        keeps = [*range(1, count + 1, 7), count - 2, count - 1, count]
        keeps = [keep for keep in keeps if keep > 0]
        for keep, image in zip(
            keeps, tiled.encode_images([inputs] * len(keeps), encoder, keeps), strict=True
        ):
            assert len(image) == len(image.sources) == keep
            assert_well_formed(image, count)


def assert_well_formed(image: Features, count: int) -> None:
    places = [source for source in image.sources if source is not None]
    assert len({*places}) == len(places)
    assert all(0 <= place < count for place in places)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_image_that_keeps_all_is_left_as_it_is(tiled: ClassTokenAdapter, encoder: str) -> None:
    for adapter, images in ((adapter_of(), square(3)), (tiled, of_many_sizes())):
        counts = [adapter.visual_tokens(image)[0] for image in images]
        keeps = [count - index % 2 for index, count in enumerate(counts)]
        reduced = adapter.encode_images(images, encoder, keeps)
        own = adapter.encode_images(images[::2])
        for image, unreduced in zip(reduced[::2], own, strict=True):
            torch.testing.assert_close(image.tokens, unreduced.tokens, atol=1e-6, rtol=1e-6)
            assert image.sources == tuple(range(len(image)))


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_dominant_tokens_are_the_models_own_features(strategy: Strategy) -> None:
    adapter = adapter_of(strategy=strategy)
    images, keeps = square(3), [40, 20, 7]
    reduced = adapter.encode_images(images, "visionzip", keeps)
    for keep, image, unreduced in zip(keeps, reduced, adapter.encode_images(images), strict=True):
        dominant, _ = zip_split(keep)
        assert image.sources[0] == (0 if strategy == "full" else None)
        assert None not in image.sources[1:]
        assert list(image.sources[1:dominant]) == sorted(image.sources[1:dominant], key=int_of)
        assert_own(image, unreduced, range(strategy == "default", dominant))


def int_of(source: int | None) -> int:
    assert source is not None
    return source


def test_dominant_tokens_of_tiles_are_the_models_own_features(tiled: ClassTokenAdapter) -> None:
    images = of_many_sizes()
    keeps = [max(1, tiled.visual_tokens(image)[0] // 2) for image in images]
    reduced = tiled.encode_images(images, "visionzip", keeps)
    unreduced = tiled.encode_images(images)
    compared = 0
    for inputs, keep, image, whole in zip(images, keeps, reduced, unreduced, strict=True):
        first = 0
        for tile, share in enumerate(shared(keep, patches(tiled, inputs).tolist())):
            if share:
                dominant, _ = zip_split(share)
                assert image.sources[first] is None
                assert_own(image, whole, range(first + 1, first + dominant))
                own = {*tiled._places(inputs)[tile].tolist()}
                assert {*image.sources[first + 1 : first + share]} <= own
                compared += dominant - 1
            first += share
        assert first == keep
    assert compared > 100


@pytest.mark.parametrize("more", [0, 2])
def test_a_scan_of_all_patches_gives_the_models_own_features(
    tiled: ClassTokenAdapter, more: int
) -> None:
    """Without newlines, or with the first two of them."""
    images = of_many_sizes()
    keeps = [int(patches(tiled, image).sum()) + more for image in images]
    counts = [tiled.visual_tokens(image)[0] for image in images]
    taken = [index for index, keep in enumerate(keeps) if keep < counts[index]]
    assert len(taken) >= 5
    own = [images[index] for index in taken]
    reduced = tiled.encode_images(own, "scan", [keeps[index] for index in taken])
    for inputs, image, unreduced in zip(own, reduced, tiled.encode_images(own), strict=True):
        assert_own(image, unreduced, range(len(image)))
        places = {*tiled._places(inputs).flatten().tolist()} - {-1}
        newlines = sorted({*range(len(unreduced))} - places)[:more]
        assert list(image.sources) == sorted(places | {*newlines})
        newline = tiled.model.model.image_newline
        for place in newlines:
            token = image.tokens[image.sources.index(place)]
            torch.testing.assert_close(token, newline)


def test_the_scan_keeps_a_class_token_that_is_one_of_the_models_own() -> None:
    adapter = adapter_of(strategy="full")
    image, one = adapter.encode_images(square(1) * 2, "scan", [64, 1])
    assert image.sources[0] == 0 and one.sources[0] != 0
    (unreduced,) = adapter.encode_images(square(1))
    torch.testing.assert_close(image.tokens[0], unreduced.tokens[0], atol=1e-5, rtol=1e-5)
    (other,) = adapter_of().encode_images(square(1), "scan", [63])
    assert None not in other.sources


@pytest.mark.parametrize("encoder", ENCODERS)
def test_one_pass_of_the_tower_and_few_tokens_for_the_projector(
    tiled: ClassTokenAdapter, encoder: str
) -> None:
    images = of_many_sizes()
    keeps = [max(1, tiled.visual_tokens(image)[0] // 3) for image in images]
    seen: dict[str, list[int]] = {"tower": [], "projector": []}
    model = tiled.model.model

    def note(name: str, values: Any) -> None:
        seen[name].append(len(values[0]))

    hooks = [
        model.vision_tower.register_forward_pre_hook(lambda _, given: note("tower", given)),
        model.multi_modal_projector.register_forward_pre_hook(
            lambda _, given: note("projector", given)
        ),
    ]
    reduced = tiled.encode_images(images, encoder, keeps)
    for hook in hooks:
        hook.remove()
    # Of an image of 1 x 150 pixels no feature of a tile is left without its padding.
    used = [(patches(tiled, image) > 0).sum() for image in images]
    assert seen == {"tower": [sum(used)], "projector": [sum(keeps)]}
    for image, keep, inputs in zip(reduced, keeps, images, strict=True):
        (alone,) = tiled.encode_images([inputs], encoder, [keep])
        assert alone.sources == image.sources
        torch.testing.assert_close(alone.tokens, image.tokens, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_of_other_layers_are_reduced_by_what_these_do(encoder: str) -> None:
    """Several layers side by side, or the last: attention is that of the last of them."""
    model = tiny_llava(layers=2)
    for layers in ([-2, -1], 1):
        model.config.vision_feature_layer = layers
        width = 24 * (len(layers) if isinstance(layers, list) else 1)
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(width, 32)
        adapter = adapt(model)
        (image,) = adapter.encode_images(square(1), encoder, [63])
        (unreduced,) = adapter.encode_images(square(1))
        own = {"visionzip": (1, zip_split(63)[0]), "scope": (0, 63), "prunesid": (1, 63)}
        if encoder in own:
            assert_own(image, unreduced, range(*own[encoder]))
        else:
            same = (image.tokens - unreduced.tokens[list(image.sources)]).abs().amax(dim=1) < 1e-4
            assert same.sum() == 62
    model.config.vision_feature_layer = 0
    assert adapt(model).encoders == ()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_models_without_a_class_token_say_so(encoder: str) -> None:
    for model in (tiny_llava(layers=2, tower="siglip", strategy="full"), tiny_onevision(layers=2)):
        adapter = adapt(model)
        assert adapter.encoders == ()
        with pytest.raises(UserError, match=rf"encoder {encoder} is not available .* there is: no"):
            adapter.settle(Pruning(retention=1 / 3, encoder=encoder))


def test_half_precision() -> None:
    adapter = adapter_of(dtype=torch.bfloat16)
    for encoder in ENCODERS:
        (image,) = adapter.encode_images(square(1), encoder, [20])
        assert image.tokens.dtype == torch.bfloat16 and bool(image.tokens.isfinite().all())
