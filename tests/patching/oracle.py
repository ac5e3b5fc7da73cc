"""A LLaMA decoder written out, that recomputes everything for every token and knows no cache.

Shapes: S prompt tokens, P tokens present in a layer, D hidden size, H heads, K key/value heads,
E head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def logits(
    model: Any,
    prompt_SD: Tensor,
    present: Sequence[Sequence[int]],
    new_ids: Sequence[int],
    *,
    renumber: bool,
) -> Tensor:
    """Logits [V] after the prompt and some new tokens, in float64.

    present: for each layer the prompt tokens that are in it, rising.
    renumber: positions count the tokens present in the layer; else those of the whole prompt.
    """
    text = model.model.language_model
    new_ND = text.embed_tokens.weight[torch.tensor(new_ids, dtype=torch.long)]
    states = dict(enumerate(torch.cat([prompt_SD, new_ND]).double()))
    new = range(len(prompt_SD), len(states))
    for layer, tokens in zip(text.layers, present, strict=True):
        order = [*tokens, *new]
        positions = torch.arange(len(order)) if renumber else torch.tensor(order)
        hidden_PD = _layer(layer, torch.stack([states[token] for token in order]), positions)
        states = dict(zip(order, hidden_PD, strict=True))
    last_D = _norm(text.norm, states[max(states)])
    return model.lm_head.weight.double() @ last_D


def _layer(layer: Any, hidden_PD: Tensor, positions: Tensor) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    normed = _norm(layer.input_layernorm, hidden_PD)
    query_PHE, key_PKE, value_PKE = (
        _linear(projection, normed).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    group = query_PHE.shape[1] // key_PKE.shape[1]
    query_PHE, key_PKE = _rotate(query_PHE, positions), _rotate(key_PKE, positions)
    heads = []
    causal = torch.ones(len(positions), len(positions)).tril().bool()
    for head in range(query_PHE.shape[1]):
        scores = query_PHE[:, head] @ key_PKE[:, head // group].T / attention.head_dim**0.5
        weights = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
        heads.append(weights @ value_PKE[:, head // group])
    hidden_PD = hidden_PD + _linear(attention.o_proj, torch.cat(heads, dim=-1))
    normed = _norm(layer.post_attention_layernorm, hidden_PD)
    gate = torch.nn.functional.silu(_linear(mlp.gate_proj, normed))
    return hidden_PD + _linear(mlp.down_proj, gate * _linear(mlp.up_proj, normed))


def _rotate(x_PHE: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    half = x_PHE.shape[-1] // 2
    frequency = base ** (-torch.arange(half).double() / half)
    angle = (positions.double()[:, None] * frequency)[:, None]
    first, second = x_PHE[..., :half], x_PHE[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    scale = (x.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return x * scale * norm.weight.double()


def _linear(linear: Any, x: Tensor) -> Tensor:
    out = x @ linear.weight.double().T
    return out if linear.bias is None else out + linear.bias.double()
