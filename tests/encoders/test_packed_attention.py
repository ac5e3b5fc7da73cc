"""One call for all windows, against a call for each."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.support import MANY_SIZES, picture
from tests.tiny.qwen2_5_vl import tiny_qwen, tiny_qwen_processor
from tests.tiny.qwen3_vl import tiny_qwen3, tiny_qwen3_processor
from trio.encoders import packed_attention
from trio.encoders.packed_attention import packed, window_attention
from trio.families.adapter import Inputs
from trio.families.registry import adapt

KINDS = {
    "qwen2_5_vl": (tiny_qwen, tiny_qwen_processor),
    "qwen3_vl": (tiny_qwen3, tiny_qwen3_processor),
}
EDGES = [[0, 5], [0, 4, 8, 12], [0, 4, 6, 10, 12, 13], [0, 1, 2, 34, 36, 68]]


@pytest.fixture(params=KINDS)
def family(request: Any) -> tuple[Any, list[Inputs]]:
    """A model, and what its processor makes of pictures of many sizes."""
    model, processor = KINDS[request.param]
    adapter, prepare = adapt(model(layers=2)), processor()
    pictures = [picture(number, size) for number, size in enumerate(MANY_SIZES)]
    return adapter, [adapter.process_images(prepare, [one])[0] for one in pictures]


def window_by_window(query: Tensor, key: Tensor, value: Tensor, edges: list[int]) -> Tensor:
    pieces = []
    for a, b in pairwise(edges):
        own, keys, values = (x[:, :, a:b] for x in (query, key, value))
        pieces.append(F.scaled_dot_product_attention(own, keys, values, scale=0.3))
    return torch.cat(pieces, dim=2).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("edges", EDGES)
def test_windows_attend_as_they_do_one_by_one(
    edges: list[int], dtype: torch.dtype, apart: float
) -> None:
    chance = torch.Generator().manual_seed(0)
    packed_HPE = (torch.randn(edges[-1], 3, 8, generator=chance).to(dtype) for _ in range(3))
    query, key, value = (x.transpose(0, 1)[None] for x in packed_HPE)  # as a tower has them
    out, weights = window_attention(
        None,
        query,
        key,
        value,
        scaling=0.3,
        cu_seq_lens_q=torch.tensor(edges, dtype=torch.int32),
        max_length_q=99,
        is_causal=False,
    )
    assert weights is None
    wanted = window_by_window(query, key, value, edges)
    torch.testing.assert_close(out, wanted, atol=apart, rtol=apart)


def test_a_tower_attends_once_a_block(
    family: tuple[Any, list[Inputs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, inputs = family
    tower, calls = adapter.model.model.visual, []
    by_size = packed_attention._by_size

    def counted(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return by_size(query, *args)

    monkeypatch.setattr(packed_attention, "_by_size", counted)
    adapter.encode_images(inputs)
    patches = sum(len(image["pixel_values"]) for image in inputs)
    assert calls == [patches] * len(tower.blocks)
    assert tower.config._attn_implementation == "sdpa"
    adapter.model.get_image_features(inputs[0]["pixel_values"], inputs[0]["image_grid_thw"])
    assert len(calls) == len(tower.blocks)  # outside of the engine all is as it was


def test_windows_edges_are_read_once(
    family: tuple[Any, list[Inputs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kind of block, and not in each: on CUDA the host waits for them."""
    reads, tolist = [], Tensor.tolist

    def counted(edges: Tensor) -> Any:
        if edges.dtype == torch.int32 and edges.ndim == 1:
            reads.append(edges)
        return tolist(edges)

    adapter, inputs = family
    monkeypatch.setattr(Tensor, "tolist", counted)
    adapter.encode_images(inputs[:1])
    first = len(reads)
    adapter.encode_images(inputs)
    kinds = {id(edges) for edges in reads}
    assert len(reads) == len(kinds) and 0 < first <= 2 and len(reads) - first <= 2


def test_the_config_is_restored_after_a_fault(family: tuple[Any, list[Inputs]]) -> None:
    tower = family[0].model.model.visual
    set_to: list[str] = []

    def fail() -> None:
        with packed(tower):
            set_to.append(tower.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set_to == [packed_attention.NAME]
    assert tower.config._attn_implementation == "sdpa"


def test_a_tower_that_attends_otherwise_is_left_alone(
    family: tuple[Any, list[Inputs]], caplog: pytest.LogCaptureFixture
) -> None:
    adapter, inputs = family
    tower = adapter.model.model.visual
    ours = adapter.encode_images(inputs)
    tower.set_attn_implementation("eager")
    packed_attention._say_unpacked.cache_clear()
    with caplog.at_level(logging.WARNING, "trio"):
        for _ in range(2):
            theirs = adapter.encode_images(inputs)
    assert tower.config._attn_implementation == "eager"
    (record,) = caplog.records
    assert "one by one, which is slow: its attention is set to 'eager'" in record.message
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)


def test_a_version_that_calls_window_by_window_is_served_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 4).unbind()
    packed_attention._say_unpacked.cache_clear()
    module = torch.nn.Module()
    with caplog.at_level(logging.WARNING, "trio"):
        out, _ = window_attention(module, query, key, value, scaling=0.3, is_causal=False)
    torch.testing.assert_close(out, window_by_window(query, key, value, [0, 6]))
    assert "calls attention window by window" in caplog.text
