"""Layers in few operations, against the modules of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.decoder.test_packed import RecordingCache
from tests.every_family.family import LAYERS, Family
from trio.decoder.attention import Packed
from trio.decoder.fused import fused_layer
from trio.families.registry import adapt

LENGTHS = (7, 31, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_gives_what_its_module_gives(
    any_family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and what a cache is given; also where the MLP takes tokens in parts."""
    model = any_family.model
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    plain, fused = adapt(model).decoder, adapt(model).decoder
    fused.fuse()
    assert fused.fused
    hidden_TD = torch.randn(sum(LENGTHS), plain.hidden_size).to(dtype)
    layout = Packed(LENGTHS)
    with torch.no_grad(), plain.ragged():
        rotary = plain.rotary(torch.arange(len(hidden_TD)))
        for layer in range(LAYERS):
            monkeypatch.setattr(fused_layer, "_FEWEST_ROWS", 512 if layer % 2 else 16)
            monkeypatch.setattr(fused_layer, "_ELEMENTS", 1)
            ran = []
            for decoder in (plain, fused):
                cache = RecordingCache()
                out = decoder.run_layers(layer, layer + 1, hidden_TD, rotary, layout, cache)
                ran.append([out, cache.keys[layer], cache.values[layer]])
            close(*ran)
            hidden_TD = ran[0][0]
        close([fused.head(hidden_TD)], [plain.head(hidden_TD)])


def close(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """But for the order of sums; in bfloat16 by a unit or two where a norm rounds the other way."""
    for own, other in zip(got, wanted, strict=True):
        off = (own - other).abs().max() / other.abs().max()
        assert off < (1e-5 if own.dtype == torch.float32 else 1e-2)
