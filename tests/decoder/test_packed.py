"""One packed pass equals separate forwards of the very same model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import trio
from tests.patching.prompts import rows
from tests.tiny.llava import Family, tiny_llava, tiny_processor
from trio.decoder.cache_argument import CACHE, cache_of
from trio.decoder.decoder import Decoder
from trio.engine.engine import Engine
from trio.engine.request import Request
from trio.errors import UserError
from trio.prefill import PackedPrompts, prefill


class RecordingCache:
    """Keeps what each layer's hook was given."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, tuple[int, ...]]] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def begin_prefill(self, first_layer: int, lengths: tuple[int, ...]) -> None:
        self.groups.append((first_layer, tuple(lengths)))

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys[layer_idx], self.values[layer_idx] = key, value
        return key, value


def decoder_of(model: Any) -> Decoder:
    return Decoder(model.model.language_model, model.lm_head)


@pytest.mark.parametrize(
    ("family", "kv_heads", "lengths"),
    [
        ("llama", 4, (7, 31, 12)),
        ("mistral", 2, (9, 9, 9)),
        ("qwen2", 1, (1, 5, 5, 1, 40)),
        ("qwen3", 2, (7, 31, 12)),
    ],
)
def test_packed_equals_separate(family: Family, kv_heads: int, lengths: tuple[int, ...]) -> None:
    model = tiny_llava(family=family, kv_heads=kv_heads, layers=3)
    text = model.model.language_model
    decoder = decoder_of(model)
    torch.manual_seed(1)
    embeds = torch.randn(sum(lengths), decoder.hidden_size)
    cache = RecordingCache()
    done = prefill(
        decoder,
        PackedPrompts(embeds_TD=embeds, lengths=lengths, images=((),) * len(lengths)),
        None,
        cache,
    )
    assert cache.groups == [(0, lengths)]
    start = 0
    for row, length in enumerate(lengths):
        piece = slice(start, start + length)
        with torch.no_grad():
            one = text(inputs_embeds=embeds[None, piece], use_cache=True)
            logits = model.lm_head(one.last_hidden_state[0, -1])
        torch.testing.assert_close(done.logits_BV[row], logits, atol=1e-5, rtol=1e-5)
        for layer in range(3):
            expected = cache_of(one).layers[layer]
            torch.testing.assert_close(
                cache.keys[layer][:, :, piece], expected.keys, atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                cache.values[layer][:, :, piece], expected.values, atol=1e-5, rtol=1e-5
            )
        start += length
    assert done.cache_lengths == [list(lengths)] * 3
    assert done.next_positions == [list(lengths)] * 3
    assert done.prune_seconds == 0.0


def test_the_config_is_given_back_also_after_an_error() -> None:
    model = tiny_llava(layers=2)
    decoder = decoder_of(model)
    before = model.config.text_config._attn_implementation
    with decoder.ragged():
        assert model.config.text_config._attn_implementation == "trio_ragged"
        assert model.config.vision_config._attn_implementation == before
    assert model.config.text_config._attn_implementation == before
    with pytest.raises(RuntimeError, match="inside"), decoder.ragged():
        raise RuntimeError("inside")
    assert model.config.text_config._attn_implementation == before


def test_a_switched_model_still_works_as_usual() -> None:
    model = tiny_llava(layers=2)
    ids = torch.arange(6, 20)[None]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
        with decoder_of(model).ragged():
            got = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def forgetful(keyword: str) -> Any:
    """A layer's forward that takes an argument and makes nothing of it."""
    forward = LlamaDecoderLayer.forward

    @functools.wraps(forward)
    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, keyword: None})

    return without


@pytest.mark.parametrize("keyword", [CACHE, "layout"])
def test_a_layer_that_ignores_cache_or_layout_is_an_error(
    keyword: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava(layers=2)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgetful(keyword))
    message = f"transformers {transformers.__version__} layer 0, a LlamaDecoderLayer.*answers would"
    with pytest.raises(UserError, match=message):
        list(Engine(model, tiny_processor()).generate([Request(prompt="what")]))
    (inputs,) = rows(model, [1])
    with pytest.raises(UserError, match=message):
        trio.patch(model, trio.Pruning(schedule="1:4")).generate(**inputs)


def test_a_layer_that_knows_no_such_argument_is_an_error() -> None:
    def forward(hidden_states: Tensor, kept: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states

    model = tiny_llava(layers=1)
    model.model.language_model.layers[0].forward = forward
    with pytest.raises(
        UserError, match=f"forward takes its cache by none.*{transformers.__version__}"
    ):
        decoder_of(model)
