"""Processors of the sizes that checkpoints have, stopped at uint8; and some that cannot be."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.engine.support import picture
from tests.tiny.llava import tiny_processor
from tests.tiny.llava_onevision import onevision_processor
from tests.tiny.qwen2_5_vl import tiny_qwen_processor
from tests.tiny.qwen3_vl import tiny_qwen3_processor
from trio.engine.preprocess import Preprocessor, Unservable
from trio.engine.request import Prepared, Request, Result
from trio.errors import UserError
from trio.families.llava import LlavaAdapter
from trio.families.llava_next import LlavaNextAdapter
from trio.families.llava_onevision import LlavaOnevisionAdapter
from trio.families.pixel_tables import finished
from trio.families.qwen2_5_vl import Qwen25VLAdapter
from trio.families.qwen3_vl import Qwen3VLAdapter

SIDE: Any = {"height": 336, "width": 336}


def prepared(prepare: Preprocessor, images: Any) -> Prepared:
    outcome = prepare(Request(prompt="what", images=tuple(images)))
    assert isinstance(outcome, Prepared), outcome
    return outcome


def assert_same(one: Prepared, other: Prepared) -> None:
    assert (one.input_ids, one.image_tokens) == (other.input_ids, other.image_tokens)
    for mine, theirs in zip(one.image_inputs, other.image_inputs, strict=True):
        mine, theirs = finished([mine, theirs], torch.device("cpu"))
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name]), name


def with_images(processor: Any, image_processor: Any) -> Any:
    processor.image_processor = image_processor
    return processor


def checkpoints() -> dict[str, Preprocessor]:
    """The sizes of LLaVA-1.5 and those that the other classes come with; Qwen3-VL's of the hub."""
    qwen3 = Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    tiles = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=SIDE)
    llava: Any = {"image_size": 336, "patch_size": 14}
    return {
        "llava-1.5": Preprocessor(tiny_processor(**llava), LlavaAdapter),
        "llava-next": Preprocessor(with_images(tiny_processor(**llava), tiles), LlavaNextAdapter),
        "onevision": Preprocessor(
            with_images(onevision_processor(side=384, patch=14), LlavaOnevisionImageProcessorPil()),
            LlavaOnevisionAdapter,
        ),
        "qwen2.5-vl": Preprocessor(
            with_images(tiny_qwen_processor(), Qwen2VLImageProcessorPil()), Qwen25VLAdapter
        ),
        "qwen3-vl": Preprocessor(with_images(tiny_qwen3_processor(), qwen3), Qwen3VLAdapter),
    }


@pytest.mark.parametrize("name", list(checkpoints()))
def test_checkpoints_sizes_come_out_bit_for_bit(name: str) -> None:
    prepare = checkpoints()[name]
    assert prepare.why_not_cut == ""
    images = [picture(n, size) for n, size in enumerate([(640, 480), (97, 801), (900, 33), (1, 1)])]
    for album in (*([image] for image in images), images):
        made = prepare.process(album)
        assert all(image.inputs["pixel_values"].dtype == np.uint8 for image in made)
        assert_same(prepared(prepare, made), prepared(prepare, album))


def test_images_of_every_mode() -> None:
    prepare = Preprocessor(tiny_processor(), LlavaAdapter)
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "RGB")
    album = [picture(1, (50, 41)).convert("RGB").convert(mode) for mode in modes]
    assert_same(prepared(prepare, prepare.process(album)), prepared(prepare, album))


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
def test_images_with_tables_and_without_come_together(name: str) -> None:
    prepare, album = checkpoints()[name], [picture(1, (60, 50))]
    mixed = [*prepared(prepare, prepare.process(album)).image_inputs]
    mixed += prepared(prepare, album).image_inputs
    for images in (mixed, mixed[::-1]):
        made = finished(images, torch.device("meta"))
        assert [image["pixel_values"].device.type for image in made] == ["meta"] * 2
        sizes = [x for image in made for key, x in image.items() if key != "pixel_values"]
        assert sizes and all(x.device.type == "cpu" for x in sizes)
    assert finished(mixed[1:], torch.device("meta")) == mixed[1:]  # as they are


class Clips(CLIPImageProcessorPil):
    """What it does to a value hangs on the value alone."""

    def normalize(self, image: Any, *args: Any, **options: Any) -> Any:
        return super().normalize(image, *args, **options).clip(-1.5, 1.5)


class ClipsAlways(CLIPImageProcessorPil):
    def _preprocess(self, *args: Any, **options: Any) -> Any:
        made = super()._preprocess(*args, **options)
        made["pixel_values"] = made["pixel_values"].clip(0, 1)
        return made


class NormalisesInside(CLIPImageProcessorPil):
    def _preprocess(self, *args: Any, **options: Any) -> Any:
        return super()._preprocess(*args, **options | {"do_rescale": True, "do_normalize": True})


class Stretches(CLIPImageProcessorPil):
    def normalize(self, image: Any, *args: Any, **options: Any) -> Any:
        return super().normalize(image / image.max(), *args, **options)


class PadsAfterwards(CLIPImageProcessorPil):
    def _preprocess(self, *args: Any, **options: Any) -> Any:
        made = super()._preprocess(*args, **options)
        made["pixel_values"][..., -3:] = 0
        return made


class Posterises(CLIPImageProcessorPil):
    def resize(self, image: Any, *args: Any, **options: Any) -> Any:
        return super().resize(image, *args, **options) & 0xF0


class SwapsChannels(CLIPImageProcessorPil):
    def normalize(self, image: Any, *args: Any, **options: Any) -> Any:
        return super().normalize(image, *args, **options)[::-1]


class RefusesOptions(CLIPImageProcessorPil):
    def _preprocess(self, *args: Any, **options: Any) -> Any:
        if not options["do_normalize"]:
            raise RuntimeError("always normalises")
        return super()._preprocess(*args, **options)


class ChannelsLast(CLIPImageProcessorPil):
    def _preprocess(self, *args: Any, **options: Any) -> Any:
        made = super()._preprocess(*args, **options)
        made["pixel_values"] = made["pixel_values"].permute(0, 2, 3, 1)
        return made


def of(kind: type[CLIPImageProcessorPil]) -> Preprocessor:
    side: Any = {"height": 32, "width": 32}
    images = kind(size={"shortest_edge": 32}, crop_size=side)
    return Preprocessor(with_images(tiny_processor(), images), LlavaAdapter)


def test_what_hangs_on_single_values_is_in_the_table() -> None:
    prepare, album = of(Clips), [picture(n, (70, 50)) for n in range(2)]
    assert prepare.cut
    made = prepared(prepare, prepare.process(album))
    assert made.image_inputs[0]["pixel_values"].dtype == torch.uint8
    (image,) = finished(made.image_inputs[:1], torch.device("cpu"))
    assert image["pixel_values"].max() == 1.5
    assert_same(made, prepared(prepare, album))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ClipsAlways, "pixel_values does not follow from uint8 pixels value by value"),
        (NormalisesInside, "pixel_values is not uint8 without rescaling and normalising"),
        (Stretches, "pixel_values does not follow from uint8"),
        (PadsAfterwards, "pixel_values does not follow from uint8"),
        (Posterises, "pixels of 240 values never come out of it, as 1"),
        (SwapsChannels, "pixel_values does not follow from uint8"),
        (RefusesOptions, "fails: RuntimeError: always normalises"),
        (ChannelsLast, "has no known place of the channels"),
    ],
)
def test_a_processor_that_cannot_be_cut_is_found_out(
    kind: type[CLIPImageProcessorPil], reason: str
) -> None:
    prepare = of(kind)
    assert reason in prepare.why_not_cut and not prepare.cut
    with pytest.raises(UserError, match="cannot be stopped at uint8: "):
        prepare.process([picture(0)])


def test_a_family_of_ones_own_may_take_no_options() -> None:
    class Old(LlavaAdapter):
        @staticmethod
        def process_images(processor: Any, images: Any) -> Any:  # type: ignore[override]
            return LlavaAdapter.process_images(processor, images)

    assert "unexpected keyword argument" in Preprocessor(tiny_processor(), Old).why_not_cut


def test_what_was_found_out_goes_along() -> None:
    for kind in (CLIPImageProcessorPil, Stretches):
        prepare = of(kind)
        reason = prepare.why_not_cut
        copy = pickle.loads(pickle.dumps(prepare))
        copy._processor.image_processor = None  # whose use would fail
        assert copy.why_not_cut == reason
    assert pickle.loads(pickle.dumps(of(CLIPImageProcessorPil))).cut


def test_images_at_fault() -> None:
    prepare = of(CLIPImageProcessorPil)
    with pytest.raises(Unservable, match="image 1 is 201 x 1; ") as caught:
        prepare.process([picture(0), picture(1, (201, 1))])
    assert caught.value.kind == "image"
    assert prepare.process([]) == []


def test_processed_images_that_do_not_belong_to_the_request() -> None:
    prepare = of(CLIPImageProcessorPil)
    qwen = Preprocessor(tiny_qwen_processor(), Qwen25VLAdapter)
    one, two = prepare.process([picture(0), picture(1)])
    (alone,) = prepare.process([picture(0)])
    (other,) = qwen.process([picture(0)])
    other.inputs.pop("pixel_values")  # type: ignore[attr-defined]

    def fault(*images: Image.Image | Any, by: Preprocessor = prepare) -> str:
        outcome = by(Request(prompt="what", images=images, id=1))
        assert isinstance(outcome, Result) and outcome.error is not None
        return outcome.error

    assert prepared(prepare, [one, two])
    assert fault(one, picture(1)) == "image: image 1 is not processed, and others of its prompt are"
    assert fault(one).startswith("mismatch: image 0 was processed as one of 2 of a prompt")
    assert "image 0 was not processed for this model: it has no pixel_values" in fault(other)
    alone.inputs["pixel_values"] = other.inputs["image_grid_thw"]  # type: ignore[index]
    assert "it has no pixel_values of uint8" in fault(alone)
    assert "cannot be stopped at uint8" in fault(alone, by=of(Stretches))
