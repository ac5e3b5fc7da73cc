"""Layers of LLaMA's type in few operations, over the weights that the model has.

What a layer of transformers does in some thirty small operations is done here in a third of them:
on a CPU with products side by side (`side_by_side`), on a GPU with kernels (`fused_kernels`).
Numbers are the same up to the order of sums, in bfloat16 they are rounded where the model's own
are.

Shapes: T packed tokens, D hidden size, H query heads, K key/value heads, E head dimension, F
intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from trio.decoder.fused.side_by_side import SideBySide

if TYPE_CHECKING:
    from trio.decoder.decoder import Rotary

# On a CPU the MLP takes tokens in parts, whose numbers stay near the processor and in memory that
# the allocator has: all at once took a sixth longer. Elements of gate or up in a part, and tokens
# that it has at least.
_ELEMENTS, _FEWEST_ROWS = 1 << 21, 512
# Whose hooks stay on layers for good and do nothing while a model's own forward is not running.
_OUTPUTS = "transformers.utils.output_capturing"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def foreign(layer: Any) -> str | None:
    """What keeps a layer of LLaMA's type, as `check_layers` wants it, from being fused."""
    attention, mlp = layer.self_attn, layer.mlp
    for name, _ in mlp.named_children():
        if name not in (*_PROJECTIONS, "act_fn"):
            return f"its MLP has a {name}"
    if any(type(getattr(mlp, name, None)) is not nn.Linear for name in _PROJECTIONS):
        return f"its MLP is a {type(mlp).__name__}"
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if any(norm is None for norm in norms) and norms != [None, None]:
        return "queries or keys alone are normed"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, *norms):
        if norm is not None and not hasattr(norm, "variance_epsilon"):
            return f"a norm is a {type(norm).__name__}"
    return None


def kind(layer: Any) -> tuple[type, ...]:
    """Layers of one kind do the same."""
    return tuple(type(module) for module in layer.modules())


class FusedLayer:
    """One layer; subclasses say how on their device.

    layer: of transformers, not `foreign`.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._attention, self._mlp = attention, layer.mlp
        self._head_dim: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._hooks = list(_hooks(layer))
        self._members = [module.__dict__ for module in layer.modules()]

    @property
    def hooked(self) -> bool:
        """Whether somebody wants to see or change what a module of it takes or gives."""
        if any("forward" in own for own in self._members):
            return True
        put = (hook for own in self._hooks if own for hook in own.values())
        return any(getattr(hook, "__module__", None) != _OUTPUTS for hook in put)

    def __call__(
        self, hidden_TD: Tensor, rotary: Rotary, index: int, layout: Any, cache: Any
    ) -> Tensor:
        """Hidden states that leave it, `[T, D]`; arguments as of `Decoder.run_layers`."""
        normed_TD = self._norm(hidden_TD, self._norms[0])
        query_THE, key_TKE, value_TKE = self._rotated(normed_TD, rotary)
        query, key, value = (x.transpose(0, 1)[None] for x in (query_THE, key_TKE, value_TKE))
        if cache is not None:
            key, value = cache.update(key, value, index)
        attended = layout.attend(query, key, value, self._attention.scaling)
        return self._rest(attended.reshape(len(hidden_TD), -1), hidden_TD)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        raise NotImplementedError

    def _rotated(self, normed_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, H, E]`, keys and values `[T, K, E]`."""
        raise NotImplementedError

    def _rest(self, attended: Tensor, hidden_TD: Tensor) -> Tensor:
        """From attention `[T, H * E]` to what leaves the layer."""
        raise NotImplementedError


class OnCPU(FusedLayer):
    """With weights side by side.

    copied: they may be copied.
    """

    def __init__(self, layer: Any, *, copied: bool) -> None:
        super().__init__(layer)
        own, mlp = self._attention, self._mlp
        self.products = qkv, out, gate_up, down = tuple(
            SideBySide(linears, copied=copied)
            for linears in (
                (own.q_proj, own.k_proj, own.v_proj),
                (own.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            )
        )
        self._qkv, self._out, self._gate_up, self._down = qkv, out, gate_up, down

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return rms_norm(x, norm.weight, norm.variance_epsilon)

    def _rotated(self, normed_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self._heads, self._kv_heads
        all_TxE = self._qkv(normed_TD).unflatten(-1, (-1, self._head_dim))
        both_TxE, value_TKE = all_TxE.split([heads + kv_heads, kv_heads], dim=1)
        query_norm, key_norm = self._head_norms
        if query_norm is not None and key_norm is not None:
            weight_HE = query_norm.weight.expand(heads, -1)
            weight_xE = torch.cat([weight_HE, key_norm.weight.expand(kv_heads, -1)])
            both_TxE = rms_norm(both_TxE, weight_xE, key_norm.variance_epsilon)
        query_THE, key_TKE = rotate(both_TxE, rotary).split([heads, kv_heads], dim=1)
        return query_THE, key_TKE, value_TKE

    def _rest(self, attended: Tensor, hidden_TD: Tensor) -> Tensor:
        hidden_TD = self._out(attended, hidden_TD)
        rows = max(_FEWEST_ROWS, _ELEMENTS // self._mlp.gate_proj.out_features)
        if len(hidden_TD) <= rows:
            return self._after_mlp(hidden_TD)
        out_TD = torch.empty_like(hidden_TD)
        for own, target in zip(hidden_TD.split(rows), out_TD.split(rows), strict=True):
            target.copy_(self._after_mlp(own))
        return out_TD

    def _after_mlp(self, hidden_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self._gate_up(self._norm(hidden_TD, self._norms[1])).chunk(2, dim=-1)
        return self._down(self._mlp.act_fn(gate_TF).mul_(up_TF), hidden_TD)


class OnGPU(FusedLayer):
    """With norms, rotation and SwiGLU in a kernel each."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        from trio.decoder.fused import fused_kernels  # wants Triton

        self._kernels = fused_kernels

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return self._kernels.rms_norm(x, norm.weight, norm.variance_epsilon)

    def _rotated(self, normed_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        own = self._attention
        query_THE, key_TKE, value_TKE = (
            _linear(normed_TD, linear).unflatten(-1, (-1, self._head_dim))
            for linear in (own.q_proj, own.k_proj, own.v_proj)
        )
        if self._head_norms[0] is not None:
            query_THE, key_TKE = map(self._norm, (query_THE, key_TKE), self._head_norms)
        self._kernels.rotate_(query_THE, key_TKE, rotary[0][0], rotary[1][0])
        return query_THE, key_TKE, value_TKE

    def _rest(self, attended: Tensor, hidden_TD: Tensor) -> Tensor:
        norm, mlp = self._norms[1], self._mlp
        hidden_TD, normed_TD = self._kernels.add_rms_norm(
            hidden_TD, _linear(attended, self._attention.o_proj), norm.weight, norm.variance_epsilon
        )
        gate_TF, up_TF = (_linear(normed_TD, own) for own in (mlp.gate_proj, mlp.up_proj))
        return _linear(self._kernels.swiglu(gate_TF, up_TF), mlp.down_proj).add_(hidden_TD)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last dimension, computed in float32, by few passes over memory."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    scaled = wide * inverse if wide is x else wide.mul_(inverse)
    return scaled.to(x.dtype).mul_(weight)


def rotate(x_ThE: Tensor, rotary: Rotary) -> Tensor:
    """Heads `[T, ., E]` turned by the angles of their tokens."""
    cos, sin = (angles[0][:, None] for angles in rotary)
    half = x_ThE.shape[-1] // 2
    out = x_ThE * cos
    out[..., :half] -= x_ThE[..., half:] * sin[..., :half]
    out[..., half:] += x_ThE[..., :half] * sin[..., half:]
    return out


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _hooks(layer: nn.Module) -> Iterator[Any]:
    """Empty as long as nobody has put a hook on the layer, a part of it, or all modules."""
    yield torch_module._global_forward_hooks
    yield torch_module._global_forward_pre_hooks
    for module in layer.modules():
        yield module._forward_hooks
        yield module._forward_pre_hooks
