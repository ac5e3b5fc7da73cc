"""The one seam to a text decoder of transformers.

Shapes: T packed tokens, A axes of positions, D hidden size, K key/value heads, E head dimension,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trio.decoder.attention import NAME, Layout, Packed
from trio.decoder.cache_argument import Once, cache_keyword
from trio.decoder.check_layers import check_layers
from trio.decoder.fused.fused_layer import FusedLayer
from trio.decoder.fused.fused_layers import FusedLayers, fused_layers
from trio.decoder.gpu import as_current, on_gpu, without_cudnn
from trio.decoder.matmul import linear
from trio.errors import UserError

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
        text_model: `LlamaModel`, `MistralModel`, `Qwen2Model`, `Qwen2_5_VLTextModel`,
            `Qwen3VLTextModel`: embeddings, layers, norm, rotary.
        lm_head: hidden state to logits.

    Raises:
        UserError: it is none of LLaMA's type.
    """

    def __init__(self, text_model: nn.Module, lm_head: nn.Module) -> None:
        model: Any = text_model
        check_layers(model, lm_head)
        config = model.config
        rope_type = model.rotary_emb.rope_type
        if rope_type in _BATCH_DEPENDENT_ROPE:
            raise UserError(
                f"decoder with rope type {rope_type!r}: its rotation depends on the longest prompt "
                "of a batch, which packed prompts cannot have; supported are default and linear "
                "scaling, yarn and llama3"
            )
        self.model = model
        self.lm_head: Any = lm_head
        self.config = config
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.layers[0].self_attn.head_dim
        self.intermediate_size: int = config.intermediate_size
        self._cache_keyword = cache_keyword(model.layers[0].forward)
        self.normed_keys = getattr(model.layers[0].self_attn, "k_norm", None) is not None
        self.vocab_size: int = config.vocab_size
        self.max_positions = _max_positions(model)
        self.position_axes = 3 if hasattr(model.rotary_emb, "mrope_section") else 1
        """Numbers that a position consists of: one, or with M-RoPE time, row and column."""
        self._fused: FusedLayers | None = None

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
        """Rotation for these positions, in the model's dtype unless another is given.

        positions_T: `[T]`, the same on all axes, or `[A, T]`.
        """
        on_host = positions_T.device.type == "cpu" and not on_gpu(positions_T)
        if on_host and positions_T.dim() == 1 and len(positions_T):
            # Prompts of a batch have most positions in common, and sines are slow there.
            every = torch.arange(int(positions_T.max()) + 1)
            if len(every) < len(positions_T) and int(positions_T.min()) >= 0:
                cos, sin = self._rotary(every, dtype)
                return cos[:, positions_T], sin[:, positions_T]
        return self._rotary(positions_T, dtype)

    def _rotary(self, positions_T: Tensor, dtype: torch.dtype | None) -> Rotary:
        like = torch.empty(0, dtype=dtype or self.dtype, device=positions_T.device)
        if self.position_axes > 1:
            positions_T = positions_T.expand(self.position_axes, -1)
        return self.model.rotary_emb(like, positions_T[..., None, :])

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
        once = Once(cache, layout, self._cache_keyword)
        for index in range(start, stop):
            fused = None if self._fused is None else self._fused.layer(index, hidden_TD)
            if fused is not None:
                hidden_TD = fused(hidden_TD, rotary, index, layout, cache)
            else:
                hidden_TD = self._run_module(index, hidden_TD, rotary, once)
        return hidden_TD

    def _run_module(self, index: int, hidden_TD: Tensor, rotary: Rotary, once: Once) -> Tensor:
        layer = self.model.layers[index]
        hidden = layer(
            hidden_TD[None],
            attention_mask=None,
            position_embeddings=rotary,
            use_cache=once.stores,
            **once.arguments,
        )
        once.check(index, layer)
        return hidden[0]

    def fuse(self) -> None:
        """From now on run layers in few operations, where that gives what their modules give; for
        inference alone. On a CPU weights are copied once if memory allows, see `check_copies`."""
        self._fused = fused_layers(self.model, self.lm_head, self._try)

    def unfuse(self) -> None:
        """From now on run layers as transformers has them."""
        self._fused = None

    @property
    def fused(self) -> bool:
        """Whether some layer runs fused."""
        return self._fused is not None and self._fused.used

    def check_copies(self) -> None:
        """Look at all weights for edits that `fuse` has not seen; to be called where work begins,
        since it reads each of them."""
        if self._fused is not None:
            self._fused.check()

    def drop_copies(self) -> None:
        """Give back the memory of weights that were copied; what is used again is copied anew."""
        if self._fused is not None:
            self._fused.drop_copies()

    @torch.no_grad()
    def _try(self, index: int, fused: FusedLayer | None) -> Tensor:
        """What a layer makes of a few tokens."""
        generator, tokens = torch.Generator().manual_seed(0), 3
        hidden_TD = torch.randn(tokens, self.hidden_size, generator=generator).to(
            self.device, self.dtype
        )
        rotary, layout = self.rotary(torch.arange(tokens, device=self.device)), Packed((tokens,))
        cache = _PassedOn()
        with self.ragged():
            if fused is not None:
                return fused(hidden_TD, rotary, index, layout, cache)
            once = Once(cache, layout, self._cache_keyword)
            return self._run_module(index, hidden_TD, rotary, once)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]` of hidden states `[N, D]`: final norm, then output head."""
        return self.project(self.model.norm(hidden))

    def project(self, normed: Tensor) -> Tensor:
        """Logits `[N, V]` of hidden states `[N, D]` that are normed already."""
        head = None if self._fused is None else self._fused.head
        if head is not None and not torch.is_grad_enabled() and normed.dtype == self.dtype:
            return head(normed)
        return linear(normed, self.lm_head.weight, self.lm_head.bias)

    @contextmanager
    def ragged(self) -> Iterator[None]:
        """Let this instance's attention go through `ragged_attention` for the time being.

        A config already switched for good is left as it is; nesting is fine.
        """
        before = self.config._attn_implementation
        self.config._attn_implementation = NAME
        try:
            with as_current(self.device), without_cudnn(self.device):
                yield
        finally:
            self.config._attn_implementation = before


class _PassedOn:
    """A cache that stores nothing."""

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key, value


def _max_positions(model: Any) -> int:
    """Longest sequence in reach. Within its window a sliding attention is a full one."""
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.layers]
    if not hasattr(model.layers[0].self_attn, "sliding_window"):
        windows = [getattr(model.config, "sliding_window", None)]
    bounds = [window for window in windows if window is not None]
    return min([model.config.max_position_embeddings, *bounds])
