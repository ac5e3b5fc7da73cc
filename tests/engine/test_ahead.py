"""Requests prepared in threads: as one after the other, in order, a few ahead."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from tests.engine.support import mixed_requests, picture
from tests.engine.test_preprocess import PROCESSORS, prepared, truncated
from tests.tiny.llava import tiny_processor
from trio.engine.preprocess import Preprocessor, ahead
from trio.engine.request import Prepared, Request, Result
from trio.families.llava import LlavaAdapter
from trio.families.pixel_tables import finished


def png(number: int) -> io.BytesIO:
    file = io.BytesIO()
    picture(number).save(file, "png")
    file.seek(0)
    return file


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_prepared_ahead_is_the_same_in_the_same_order(threads: int) -> None:
    preparer, requests = Preprocessor(PROCESSORS["words"], LlavaAdapter), mixed_requests(20)
    requests[5] = Request(prompt="what", images=("no image",), id="none")
    requests[6] = Request(prompt="what", images=(truncated(),), id="cut")
    given = [prepared(preparer, one) if i % 4 == 3 else one for i, one in enumerate(requests)]
    outcomes = list(ahead(preparer, given, threads=threads))
    for request, outcome in zip(requests, outcomes, strict=True):
        wanted = preparer(request)
        assert outcome.id == wanted.id == request.id
        if isinstance(wanted, Result):
            assert isinstance(outcome, Result) and outcome.error == wanted.error
            continue
        assert isinstance(outcome, Prepared) and outcome.input_ids == wanted.input_ids
        made = finished(outcome.image_inputs, torch.device("cpu"))
        for mine, theirs in zip(made, wanted.image_inputs, strict=True):
            assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
        was_given = any(outcome is one for one in given)
        kinds = {own["pixel_values"].dtype for own in outcome.image_inputs}
        assert was_given or kinds <= {torch.uint8}


def test_a_processor_that_cannot_be_stopped_prepares_floats_ahead() -> None:
    preparer = Preprocessor(tiny_processor(), LlavaAdapter)
    preparer.__dict__["_tables"] = "its pixels follow from others"
    request = Request(prompt="what", images=(picture(2),))
    (outcome,) = ahead(preparer, [request], threads=2)
    assert isinstance(outcome, Prepared)
    (mine,), (theirs,) = outcome.image_inputs, prepared(preparer, request).image_inputs
    assert torch.equal(mine["pixel_values"], theirs["pixel_values"])


def test_images_may_be_closed_and_changed_when_the_next_one_is_asked_for() -> None:
    preparer, canvas = Preprocessor(PROCESSORS["words"], LlavaAdapter), Image.new("RGB", (40, 30))

    def requests() -> Iterator[Request]:
        for number in range(12):
            canvas.paste((20 * number, 0, 0), (0, 0, 40, 30))
            yield Request(prompt="what", images=(canvas,))
            with Image.open(png(number)) as image:
                yield Request(prompt="what", images=(image,))
            image.close()

    outcomes = list(ahead(preparer, requests(), threads=2))
    for number in range(12):
        painted = Image.new("RGB", (40, 30), (20 * number, 0, 0))
        for outcome, image in zip(outcomes[2 * number :], (painted, picture(number)), strict=False):
            assert isinstance(outcome, Prepared), outcome
            (mine,) = finished(outcome.image_inputs, torch.device("cpu"))
            (theirs,) = prepared(preparer, Request(prompt="", images=(image,))).image_inputs
            assert torch.equal(mine["pixel_values"], theirs["pixel_values"])


def test_so_many_are_pulled_ahead_and_nothing_runs_on_when_it_is_left() -> None:
    preparer, pulled = Preprocessor(PROCESSORS["words"], LlavaAdapter), []

    def requests() -> Iterator[Request]:
        for number in range(100):
            pulled.append(number)
            yield Request(prompt="what", images=(picture(number),), id=number)

    source = ahead(preparer, requests(), threads=3)
    for number in range(10):
        assert next(source).id == number
        assert len(pulled) == number + 1 + 2 * 3
    source.close()
    for thread in threading.enumerate():
        if thread.name.startswith("trio-prepare"):
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_fewer_large_images_wait_at_a_time() -> None:
    preparer, pulled = Preprocessor(PROCESSORS["words"], LlavaAdapter), []

    def requests() -> Iterator[Request]:
        for number in range(6):
            pulled.append(number)
            yield Request(prompt="what", images=(Image.new("RGB", (5000, 5000)),), id=number)

    source = ahead(preparer, requests(), threads=4)
    for number in range(6):
        assert next(source).id == number
        assert len(pulled) == min(6, number + 3)


def test_what_the_source_of_requests_raises_comes_through() -> None:
    def requests() -> Iterator[Request]:
        yield Request(prompt="what")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(ahead(Preprocessor(PROCESSORS["words"], LlavaAdapter), requests(), threads=2))
