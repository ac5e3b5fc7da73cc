"""The one seam to a text decoder of transformers.

Shapes: T packed tokens, R proxy rows, D hidden size, K key/value heads, E head dimension,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trio.errors import UserError
from trio.models.attention import NAME, Layout, Rows, ValueProjection

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, `[1, T, E]` each."""

# Their frequencies depend on the longest position of a call, so a packed batch would change them.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


class LayerCache(Protocol):
    """Where keys and values go: the hook that every attention layer of transformers calls."""

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[., K, ., E]` of a layer; give back what this layer's queries attend to."""
        ...


class Decoder:
    """A LLaMA-type decoder, run layer by layer over packed tokens.

    Holds references into the model and changes nothing of it, except the name of the attention
    function in its config while `ragged()` is entered.

    Args:
        text_model: `LlamaModel`, `MistralModel`, `Qwen2Model`: embeddings, layers, norm, rotary.
        lm_head: hidden state to logits.
    """

    def __init__(self, text_model: nn.Module, lm_head: nn.Module) -> None:
        model: Any = text_model
        config = model.config
        rope_type = model.rotary_emb.rope_type
        if rope_type in _BATCH_DEPENDENT_ROPE:
            raise UserError(
                f"decoder with rope type {rope_type!r}: its rotation depends on the longest prompt "
                "of a batch, which packed prompts cannot have; supported are default and linear "
                "scaling, yarn and llama3"
            )
        self.model = model
        self.lm_head = lm_head
        self.config = config
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.layers[0].self_attn.head_dim
        self.intermediate_size: int = config.intermediate_size
        self.gated = hasattr(model.layers[0].mlp, "gate_proj")
        self.vocab_size: int = config.vocab_size
        self.max_positions = _max_positions(model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, `[..., D]` for ids `[...]`."""
        return self.model.embed_tokens(ids)

    def rotary(self, positions_T: Tensor, dtype: torch.dtype | None = None) -> Rotary:
        """Rotation for these positions, in the model's dtype unless another is given."""
        like = torch.empty(0, dtype=dtype or self.dtype, device=positions_T.device)
        return self.model.rotary_emb(like, positions_T[None])

    def run_layers(
        self,
        start: int,
        stop: int,
        hidden_TD: Tensor,
        rotary: Rotary,
        layout: Layout,
        cache: LayerCache | None,
    ) -> Tensor:
        """Layers `start … stop-1` over packed hidden states.

        Keys and values pass through `cache.update(key, value, layer)`. Call inside `ragged()`.

        Returns:
            Hidden states `[T, D]` that leave layer `stop - 1`.
        """
        assert self.config._attn_implementation == NAME, "run_layers outside of Decoder.ragged()"
        hidden = hidden_TD[None]
        for layer in self.model.layers[start:stop]:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=cache is not None,
                layout=layout,
            )
        return hidden[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`: final norm, then output head."""
        return self.lm_head(self.model.norm(hidden))

    def proxy(self, layer: int) -> Proxy:
        """One layer, the final norm and the head in float32, for the saliency."""
        return Proxy(self, layer)

    @contextmanager
    def ragged(self) -> Iterator[None]:
        """Let this instance's attention go through `ragged_attention` for the time being.

        A config already switched for good is left as it is; nesting is fine.
        """
        before = self.config._attn_implementation
        self.config._attn_implementation = NAME
        try:
            yield
        finally:
            self.config._attn_implementation = before


class Proxy:
    """The stand-in for the decoder's result at one layer, in float32 whatever the model's dtype.

    Half-precision weights are copied to float32 when the proxy is made and go with it; float32
    and float64 weights are used as they are. Gradients flow to hidden states, never to weights.
    """

    def __init__(self, decoder: Decoder, layer: int) -> None:
        self._decoder = decoder
        self._layer: Any = decoder.model.layers[layer]
        wide = torch.float64 if decoder.dtype == torch.float64 else torch.float32
        self.dtype = wide
        self._params = _lift(self._layer, wide)
        self._norm = _lift(decoder.model.norm, wide)
        self._head = _lift(decoder.lm_head, wide)

    def logits(
        self,
        hidden_TD: Tensor,
        positions_T: Tensor,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
    ) -> Tensor:
        """Logits of a few rows of each sequence after one more layer, norm and head.

        Only keys are computed for all tokens; everything else for the rows alone, values too:
        they are projected after attention has summed them up.

        Args:
            hidden_TD: hidden states that enter the layer, packed, in `self.dtype`.
            positions_T: their positions.
            rows: for each sequence the indices of its rows, rising.
            lengths: tokens of each sequence.

        Returns:
            `[R, V]`, rows of all sequences in order.
        """
        starts = [0, *accumulate(lengths)]
        index_R = torch.tensor(
            [start + row for start, own in zip(starts, rows, strict=False) for row in own],
            device=hidden_TD.device,
        )
        cos, sin = self._decoder.rotary(positions_T, self.dtype)
        normed_TD = self._call("input_layernorm", hidden_TD)
        keys = self._keys(normed_TD, cos, sin)
        layout = Rows(tuple(map(tuple, rows)), tuple(lengths), self._value_projection())
        with self._decoder.ragged():
            hidden = functional_call(
                self._layer,
                self._params,
                (hidden_TD[None, index_R],),
                {
                    "attention_mask": None,
                    "position_embeddings": (cos[:, index_R], sin[:, index_R]),
                    "past_key_values": _Given(keys, normed_TD[None]),
                    "use_cache": True,
                    "layout": layout,
                },
            )
        normed = functional_call(self._decoder.model.norm, self._norm, (hidden[0],))
        return functional_call(self._decoder.lm_head, self._head, (normed,))

    def _keys(self, normed_TD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys `[1, K, T, E]` that the layer's attention would see."""
        keys = self._call("self_attn.k_proj", normed_TD).unflatten(-1, (-1, self._decoder.head_dim))
        keys = keys * cos[0, :, None] + _rotate_half(keys) * sin[0, :, None]
        return keys.transpose(0, 1)[None]

    def _value_projection(self) -> ValueProjection:
        bias = self._params.get("self_attn.v_proj.bias")
        heads = (self._decoder.num_kv_heads, self._decoder.head_dim)
        return ValueProjection(
            self._params["self_attn.v_proj.weight"].unflatten(0, heads),
            None if bias is None else bias.unflatten(0, heads),
        )

    def _call(self, name: str, x: Tensor) -> Tensor:
        prefix = name + "."
        params = {
            k.removeprefix(prefix): v for k, v in self._params.items() if k.startswith(prefix)
        }
        return functional_call(self._layer.get_submodule(name), params, (x,))


class _Given:
    """A cache that holds one layer's keys and values already, those of the rows among them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._pair = (keys, values)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._pair


def _lift(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: param.detach().to(dtype) for name, param in module.named_parameters()}


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _max_positions(model: Any) -> int:
    """Longest sequence in reach. Within its window a sliding attention is a full one."""
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.layers]
    if not hasattr(model.layers[0].self_attn, "sliding_window"):
        windows = [getattr(model.config, "sliding_window", None)]
    bounds = [window for window in windows if window is not None]
    return min([model.config.max_position_embeddings, *bounds])
