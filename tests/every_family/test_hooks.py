"""What this package relies on in transformers, one by one.

A new minor version of it that changes one of these fails here, by name, and not in an answer.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from tests.engine.support import model_inputs, picture
from tests.every_family.family import LAYERS, Family, requests_with
from tests.patching.prompts import run
from trio.decoder.attention import NAME, ragged_attention
from trio.decoder.cache_argument import cache_of
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Request
from trio.families.adapter import Adapter
from trio.families.registry import adapt, adapter_class
from trio.patching.cache import RaggedLayer

TOKENS = 7
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@dataclass
class Spy:
    """A layout and a cache at once: notes what an attention layer hands over."""

    attended: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.attended.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        self.scales.append(scale)
        return query.transpose(1, 2)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.stored.append(layer_idx)
        return key, value


def test_layers_pass_layout_positions_and_cache_on_to_attention(any_family: Family) -> None:
    decoder = adapt(any_family.model).decoder
    hidden = torch.randn(TOKENS, decoder.hidden_size)
    spy = Spy()
    with torch.no_grad(), decoder.ragged():
        rotary = decoder.rotary(torch.arange(TOKENS))
        decoder.run_layers(0, LAYERS, hidden, rotary, spy, spy)
    assert spy.stored == list(range(LAYERS))
    heads, kv_heads, width = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    keys = (1, kv_heads, TOKENS, width)
    assert spy.attended == [((1, heads, TOKENS, width), keys, keys)] * LAYERS
    assert spy.scales == pytest.approx([width**-0.5] * LAYERS)
    assert [part.shape for part in rotary] == [(1, TOKENS, width)] * 2


def test_a_text_model_is_embeddings_layers_and_norm(any_family: Family) -> None:
    """Nothing else happens on the way, and a head follows that is one product."""
    adapter = adapt(any_family.model)
    decoder, text = adapter.decoder, any_family.model.model.language_model
    ids = torch.arange(10, 10 + TOKENS)
    with torch.no_grad():
        whole = any_family.model(input_ids=ids[None]).logits[0]
        hidden = decoder.embed(ids)[None]
        rotary = decoder.rotary(torch.arange(TOKENS))
        mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
        for layer in text.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        steps = decoder.head(hidden[0])
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)
    assert type(any_family.model.lm_head) is torch.nn.Linear


def test_the_attention_function_is_looked_up_at_every_call(any_family: Family) -> None:
    """In the config that the text model shares with its layers, under a name of ours."""
    text = any_family.model.model.language_model
    assert all(layer.self_attn.config is text.config for layer in text.layers)
    assert AttentionInterface().get_interface(NAME, lambda: None) is ragged_attention
    assert list(inspect.signature(sdpa_attention_forward).parameters)[:5] == [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
    ]


def test_the_encoder_gives_pooled_features_for_each_image(family: Family) -> None:
    """As many as placeholders, and the same whatever is encoded beside it."""
    adapter = adapt(family.model)
    prepare = Preprocessor(family.processor, type(adapter))
    for images in ((picture(1, (40, 40)),), (picture(1, (40, 40)), picture(2, (90, 20)))):
        request = prepare(Request(prompt="what", images=images))
        assert isinstance(request, Prepared)
        features = adapter.encode_images(request.image_inputs)
        assert [len(image) for image in features] == list(request.image_tokens)
        width = adapter.decoder.hidden_size
        assert all(image.tokens.shape[1] == width for image in features)
        layers = {len(image.injected) for image in features}
        assert len(layers) == 1
        for image in features:
            assert all(layer.shape == image.tokens.shape for layer in image.injected)
        for image, inputs in zip(features, request.image_inputs, strict=True):
            (alone,) = adapter.encode_images([inputs])
            close(image.tokens, alone.tokens)
            close(image.injected, alone.injected)


def test_generate_makes_of_a_prompt_what_patch_takes_for_one(family: Family) -> None:
    """One call with the whole prompt, logits of its last token, and an empty dynamic cache; then
    one token a call."""
    model, calls = family.model, []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        cache = cache_of(kwargs)
        length = kwargs["input_ids"].shape[1] if kwargs.get("input_ids") is not None else 0
        calls.append((length, cache.get_seq_length(), kwargs.get("logits_to_keep"), type(cache)))

    (request,) = requests_with([1])
    adapter = adapt(model)
    prepared = Preprocessor(family.processor, type(adapter))(request)
    assert isinstance(prepared, Prepared)
    inputs = dict(model_inputs(family.processor, request))
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        _, _, cache = run(model, inputs, max_new_tokens=3)
    finally:
        hook.remove()
    length = len(prepared.input_ids)
    assert calls == [
        (length, 0, 1, DynamicCache),
        (1, length, 1, DynamicCache),
        (1, length + 1, 1, DynamicCache),
    ]
    assert len(cache.layers) == LAYERS


def test_a_ragged_layer_is_all_that_a_cache_layer_has_to_be() -> None:
    needed = {
        name
        for name, member in vars(CacheLayerMixin).items()
        if getattr(member, "__isabstractmethod__", False)
    }
    assert needed <= set(vars(RaggedLayer))
    for name in needed:
        wanted = inspect.signature(getattr(CacheLayerMixin, name)).parameters
        own = inspect.signature(getattr(RaggedLayer, name)).parameters
        flexible = any(p.kind is p.VAR_POSITIONAL for p in own.values())
        assert flexible or list(own) == list(wanted), name
    assert {"layers", "layer_class_to_replicate"} <= set(vars(DynamicCache()))


def test_processors_tell_their_placeholder_and_have_a_fast_tokenizer(family: Family) -> None:
    processor = family.processor
    assert processor.image_token_id == family.model.config.image_token_id
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == (
        processor.image_token_id
    )
    assert processor.tokenizer.backend_tokenizer.to_str()
    assert processor.chat_template
    kind: type[Adapter] = adapter_class(family.model.config)
    assert "video_processor" not in getattr(kind.processor_class, "get_attributes", list)()
