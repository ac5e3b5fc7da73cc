"""What a prune step holds at a time, at the size of LLaVA-NeXT-7B: no weights, shapes alone."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from trio.decoder.decoder import Decoder
from trio.pruning.methods.divprune import spread_out
from trio.pruning.scores.last_token_attention import last_attention
from trio.pruning.scores.layer_gradient import LayerGradient
from trio.pruning.scores.saliency import saliency
from trio.pruning.selection.nms import suppress_and_fill_up

VISUAL, TEXT, KEPT = 2880, 60, 436
TOKENS = VISUAL + TEXT


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations make: most at a time, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def watch(self, tensor: Tensor) -> None:
        """Not an allocation of what is measured."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def decoder() -> Decoder:
    """With normed keys, which take more."""
    config = Qwen3Config(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Decoder(model.model, model.lm_head)


def watched(decoder: Decoder) -> Allocations:
    counted = Allocations()
    for module in (decoder.model, decoder.lm_head):
        for tensor in (*module.parameters(), *module.buffers()):
            counted.watch(tensor)
    return counted


def layer_activations(decoder: Decoder) -> int:
    """Bytes that a layer's products and its attention read and write, counted sparingly: two normed
    inputs, queries, keys, values, attended, projected and the FFN's output; its gate before and
    after the activation, its other half and their product."""
    own = 8 * decoder.hidden_size + 4 * decoder.intermediate_size
    return TOKENS * own * decoder.dtype.itemsize


def test_scoring_takes_less_than_a_twentieth_of_one_layers_activations() -> None:
    own = decoder()
    hidden_TD = torch.empty(TOKENS, own.hidden_size, dtype=torch.bfloat16, device="meta")
    limit = layer_activations(own) / 20
    positions_T = torch.arange(TOKENS, device="meta")
    counted = watched(own)
    counted.watch(hidden_TD)
    with counted:
        result = saliency(
            LayerGradient(own, 1, "output"),
            hidden_TD,
            positions_T,
            [TOKENS],
            "reference",
            [(5, 5 + VISUAL)],
        )
    assert result.scores_T.shape == (TOKENS,)
    assert counted.peak < limit
    # Nothing of the size visual x visual, let alone tokens x vocabulary.
    assert counted.largest < min(VISUAL * VISUAL, TOKENS * own.vocab_size)


def test_attention_takes_less_than_a_twentieth_of_one_layers_activations() -> None:
    own = decoder()
    hidden_TD = torch.empty(TOKENS, own.hidden_size, dtype=torch.bfloat16, device="meta")
    positions_T = torch.arange(TOKENS, device="meta")
    counted = watched(own)
    counted.watch(hidden_TD)
    with counted:
        last_attention(own, 1, hidden_TD, positions_T, [TOKENS])
    assert counted.peak < layer_activations(own) / 20


def test_diversity_takes_one_copy_of_the_features_and_no_matrix() -> None:
    """In float32, beside what is gathered of them; at layer 0 no layer's activations are there."""
    hidden_TD = torch.randn(TOKENS, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    counted = Allocations()
    counted.watch(hidden_TD)
    with counted:
        order_NK = spread_out(hidden_TD, torch.tensor([5]), [VISUAL], [20])
    assert len(set(order_NK[0].tolist())) == 20
    assert counted.largest == VISUAL * 512 * 4 < VISUAL * VISUAL
    assert counted.peak < 1.8 * counted.largest


@pytest.mark.parametrize("similar", [False, True])
def test_choosing_takes_less_than_a_twentieth_of_one_layers_activations(similar: bool) -> None:
    own = decoder()
    shape = (TOKENS, own.hidden_size)
    limit = layer_activations(own) / 20
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(shape, generator=generator).bfloat16()
    coordinates_T2, keep = torch.rand(TOKENS, 2, generator=generator), KEPT
    if similar:  # the walk leaves most of the budget to the fill-up, slow in half precision
        keep = 12
        hidden_TD[:, 0] = 150
        hidden_TD[: TOKENS // 2, 1] = 200
    counted = Allocations()
    counted.watch(hidden_TD)
    with counted:
        kept_NK = suppress_and_fill_up(
            hidden_TD,
            coordinates_T2,
            torch.arange(5, 5 + VISUAL)[None],
            torch.tensor([VISUAL]),
            torch.tensor([keep]),
            torch.randperm(VISUAL, generator=generator)[None],
            keep,
            0.8,
            "mixed",
        )
    assert len(set(kept_NK[0].tolist())) == keep
    assert counted.peak < limit
    assert counted.largest < VISUAL * VISUAL
