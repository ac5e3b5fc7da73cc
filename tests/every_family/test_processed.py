"""Images processed up to uint8 elsewhere, packed and sent: what is prepared of them is the same."""

from __future__ import annotations

import warnings

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.engine.support import MANY_SIZES, Size, picture
from tests.every_family.family import Family
from tests.families.test_pixel_tables import assert_same, prepared
from trio.engine.preprocess import Preprocessor
from trio.families.registry import adapter_class
from trio.job.images.pixel_cell import pack, unpack

EDGE = st.integers(1, 200)


@settings(max_examples=12, deadline=None)
@example(sizes=list(MANY_SIZES))
@example(sizes=[(200, 1)])
@example(sizes=[(1, 200)])
@given(sizes=st.lists(st.tuples(EDGE, EDGE), min_size=1, max_size=3))
def test_processed_images_are_prepared_bit_for_bit(any_family: Family, sizes: list[Size]) -> None:
    family = adapter_class(any_family.model.config)
    images = [picture(n, size) for n, size in enumerate(sizes)]
    here = Preprocessor(any_family.processor, family)
    there = Preprocessor(any_family.processor, family)
    cell, headers = pack([there.process(images)])
    assert len(headers[0]) < 4000  # all pixels are in the cell
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished = prepared(here, unpack(cell, *headers))
    assert_same(finished, prepared(here, images))
