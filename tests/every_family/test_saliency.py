"""The proxy that is written out by hand, against autograd through each family's own layers."""

from __future__ import annotations

import pytest
import torch

from tests.every_family.family import FAMILIES
from trio.families.registry import adapt
from trio.pruning import reference
from trio.pruning.scores.layer_gradient import LayerGradient
from trio.pruning.scores.saliency import saliency

LENGTHS = (40, 7, 23)


@pytest.mark.parametrize(
    ("name", "layer"), [(name, index % 2 * 3) for index, name in enumerate(FAMILIES)]
)
def test_saliency_equals_the_textbook(name: str, layer: int) -> None:
    model = FAMILIES[name]().model
    decoder = adapt(model).decoder
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sum(LENGTHS), decoder.hidden_size, generator=generator)
    places = [torch.arange(length) for length in LENGTHS]
    got = saliency(LayerGradient(decoder, layer), hidden, torch.cat(places), LENGTHS, "with_last")
    text, head = reference.text_parts(model, torch.float64)
    for scores, own, place in zip(
        got.true_scores(LENGTHS).split(LENGTHS), hidden.double().split(LENGTHS), places, strict=True
    ):
        positions = place.expand(decoder.position_axes, -1) if decoder.position_axes > 1 else place
        book, _ = reference.saliency(text, head, layer, own, positions, "with_last")
        torch.testing.assert_close(scores.double(), book, rtol=5e-4, atol=1e-6 * float(book.max()))
