"""Which of a decoder's layers run fused, and the head with them on a CPU.

A layer runs fused if one of its kind, tried out, gives what the module of transformers gives, and
for as long as nobody has put a hook on it; else the module itself runs.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trio import cgroups
from trio.decoder import onednn
from trio.decoder.fused.fused_layer import FusedLayer, OnCPU, OnGPU, foreign, kind
from trio.decoder.fused.side_by_side import SideBySide
from trio.decoder.gpu import on_gpu
from trio.errors import kind_and_line

_log = logging.getLogger(__name__)
# What copies of weights may take of the memory that is free.
_SHARE = 1 / 4
# What fused and plain may differ by, beside the largest number.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_made: WeakKeyDictionary[nn.Module, FusedLayers] = WeakKeyDictionary()

Try = Callable[[int, FusedLayer | None], Tensor]
"""What the layer of that number makes of some hidden states, fused or by its module."""


def fused_layers(model: Any, lm_head: nn.Linear, run: Try) -> FusedLayers:
    """Those of a text decoder, shared by all who ask while its modules stay the same."""
    found = _made.get(model)
    if found is None or not found.is_of(model, lm_head):
        if found is not None:
            found.drop_copies()  # which others may hold
        found = _made[model] = FusedLayers(model, lm_head, run)
    return found


class FusedLayers:
    """Layers of a text decoder and its output head.

    Holds parts of the model and not the model, so that it goes with it.
    """

    def __init__(self, model: Any, lm_head: nn.Linear, run: Try) -> None:
        self._parts = _parts(model, lm_head)
        self._layers: list[FusedLayer | None] = [None] * len(model.layers)
        self._products: list[SideBySide] = []
        self.head: SideBySide | None = None
        """Final hidden states, normed, to logits; None where `F.linear` does it."""
        weight = model.embed_tokens.weight
        self._kind = weight.dtype, weight.device
        why = _unfit(weight)
        if why is None:
            why = next(filter(None, map(foreign, model.layers)), None)
        if why is None:
            self._layers, why = _tried(self._make(model, lm_head), model.layers, run)
        if why:
            _log.warning("decoder layers run as transformers has them: %s", why)

    def is_of(self, model: Any, lm_head: nn.Linear) -> bool:
        """Whether it holds the modules that these have now, in their kind of numbers."""
        weight, parts = model.embed_tokens.weight, _parts(model, lm_head)
        return self._kind == (weight.dtype, weight.device) and self._parts == parts

    @property
    def used(self) -> bool:
        """Whether some layer may run fused."""
        return any(layer is not None for layer in self._layers)

    def layer(self, index: int, hidden_TD: Tensor) -> FusedLayer | None:
        """The layer of that number for these hidden states; None where its module is to run."""
        layer = self._layers[index]
        if layer is None or layer.hooked or self._kind != (hidden_TD.dtype, hidden_TD.device):
            return None
        return layer

    def check(self) -> None:
        """Look at all weights that were copied, which may have been edited past what PyTorch
        counts; a copy that is old is made anew."""
        for product in self._products:
            product.check()

    def drop_copies(self) -> None:
        """Give copies back; they are made anew where they are used."""
        for product in self._products:
            product.drop()

    def _make(self, model: Any, lm_head: nn.Linear) -> list[FusedLayer]:
        dtype, device = self._kind
        if on_gpu(device):
            return [OnGPU(layer) for layer in model.layers]
        copied = _room_for_copies([*model.layers, lm_head])
        if not onednn.usable(device, dtype):
            _log.warning("this PyTorch has no oneDNN for %s: products are slower", dtype)
        layers = [OnCPU(layer, copied=copied) for layer in model.layers]
        self.head = SideBySide([lm_head], copied=copied)
        self._products = [self.head, *(own for layer in layers for own in layer.products)]
        return list(layers)


def _parts(model: Any, lm_head: nn.Linear) -> list[nn.Module]:
    return [lm_head, *model.layers.modules()]


def _unfit(weight: Tensor) -> str | None:
    """Why layers with weights like this one cannot be fused; empty where nobody expects it."""
    if weight.is_meta or weight.dtype not in _TOLERANCE:
        return ""
    if on_gpu(weight):
        missing = importlib.util.find_spec("triton") is None
        return "Triton is missing, which CUDA builds of PyTorch bring" if missing else None
    return None if weight.device.type == "cpu" and weight.dtype != torch.float16 else ""


def _room_for_copies(modules: list[nn.Module]) -> bool:
    wanted = sum(p.nbytes for module in modules for p in module.parameters())
    free = cgroups.free_main_memory()
    if wanted <= free * _SHARE:
        return True
    _log.warning(
        "decoding is slower, since copies of the decoder's weights for this CPU would take %.1f GB "
        "of %.1f GB that are free",
        wanted / 1e9,
        free / 1e9,
    )
    return False


def _tried(
    made: list[FusedLayer], layers: Any, run: Try
) -> tuple[list[FusedLayer | None], str | None]:
    """Those of kinds that give what their modules give, and what is wrong with another."""
    why = None
    good: dict[tuple[type, ...], bool] = {}
    for index, layer in enumerate(made):
        if (own := kind(layers[index])) not in good and not layer.hooked:
            fault = _fault(index, layer, run)
            good[own], why = fault is None, why or fault
    hooked = [index for index in range(len(made)) if kind(layers[index]) not in good]
    if hooked and why is None:
        why = f"all layers like layer {hooked[0]} have hooks, so that none of them could be tried"
    kept = [layer if good.get(kind(layers[i])) else None for i, layer in enumerate(made)]
    return kept, why


def _fault(index: int, layer: FusedLayer, run: Try) -> str | None:
    wanted = run(index, None)
    try:
        got = run(index, layer)
    except Exception as error:  # Triton, its compilers and devices have errors of their own
        return f"fused, layer {index} fails: {kind_and_line(error)}"
    off, size = (got - wanted).abs().max().item(), wanted.abs().max().item()
    if not math.isfinite(size):
        return f"layer {index} gives numbers that are not finite, so that none can be compared"
    if off <= _TOLERANCE[wanted.dtype] * size:
        return None
    return f"fused, layer {index} gives numbers that differ by {off:.2g} of {size:.2g}"
