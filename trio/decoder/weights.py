"""Checks that weights are floating-point and on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trio.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights that are numbers; integers and 8-bit floats need scales that lie elsewhere."""
_WHY = "which tokens stay is computed from plain floating-point weights, and it has none"


def check_unquantised(config: Any, name: str) -> None:
    """Look at a config before its weights are fetched.

    name: of the checkpoint, for the message.

    Raises:
        UserError: the weights are quantised, with the method.
    """
    settings = _quantisation(config)
    if settings is not None:
        raise UserError(
            f"{name} is quantised ({_method(settings)}), and {_WHY}; give the checkpoint that it "
            "was made from, which --dtype or dtype loads as bfloat16 or float16"
        )


def check_weights(model: Any) -> None:
    """Look at a model in memory. One without any weights, all on the meta device, passes.

    Raises:
        UserError: its weights are quantised, or not all on one device.
    """
    method = _method_of(model) or _unreadable(model)
    if method is not None:
        raise UserError(
            f"this {type(model).__name__} is quantised ({method}), and {_WHY}; load the checkpoint "
            "that it was made from in bfloat16 or float16, or call model.dequantize() where its "
            "method has that"
        )
    spread = _spread(model)
    if spread is not None:
        raise UserError(
            f"this {type(model).__name__} is not on one device ({spread}); load it without "
            "device_map and move all of it: model.to('cuda:0'). One that does not fit there is not "
            "supported"
        )


def _quantisation(config: Any) -> Any:
    """What a config or one of its parts says of its weights' quantisation; None: nothing."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    found = (getattr(part, "quantization_config", None) for part in parts)
    return next((settings for settings in found if settings is not None), None)


def _method(settings: Any) -> str:
    """Name and bits, of settings as a mapping or as an object of transformers."""
    values = settings if isinstance(settings, Mapping) else vars(settings)
    four, eight = (values.get(f"load_in_{n}bit", values.get(f"_load_in_{n}bit")) for n in (4, 8))
    name = values.get("quant_method") or ("bitsandbytes" if four or eight else "unnamed method")
    bits = values.get("bits") or (4 if four else 8 if eight else None)
    return str(getattr(name, "value", name)) + (f", {bits} bit" if bits else "")


def _method_of(model: Any) -> str | None:
    """The method that transformers quantised a model by; None: by none."""
    quantiser = getattr(model, "hf_quantizer", None)
    settings = getattr(quantiser, "quantization_config", None) or _quantisation(model.config)
    if settings is not None:
        return _method(settings)
    method = getattr(model, "quantization_method", None)
    if method is None and quantiser is None and not getattr(model, "is_quantized", False):
        return None
    return _method({"quant_method": method})


def _unreadable(model: Any) -> str | None:
    """A weight that is no plain number, whoever made it so; None: all are."""
    for name, module in model.named_modules():
        packed, weight = getattr(module, "qweight", None), getattr(module, "weight", None)
        if isinstance(packed, Tensor):
            return f"{name}.qweight instead of a weight"
        if callable(weight) and not isinstance(weight, Tensor):
            return f"{name}.weight is packed"
        if isinstance(weight, Tensor) and weight.dtype not in DTYPES:
            return f"{name}.weight is {weight.dtype}"
        if isinstance(weight, Tensor) and type(weight.data) is not Tensor:
            return f"{name}.weight is a {type(weight.data).__name__}"
    return None


def _spread(model: Any) -> str | None:
    """On which devices a model lies; None: on one, or on none yet."""
    mapped = sorted(
        {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    )
    if len(mapped) > 1 or mapped == ["disk"]:
        return f"hf_device_map has {', '.join(mapped)}"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return ", ".join(devices)
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return "offloaded by accelerate" if devices == ["meta"] and hooked else None


def how_to_mend(dtype: torch.dtype) -> str:
    """What to do about numbers that are not finite, in a model of this dtype."""
    if dtype == torch.float16:
        return "its range ends at 65504, load the model in bfloat16 or float32 instead"
    return "look for damaged weights, and for an image that the encoder cannot stand"
