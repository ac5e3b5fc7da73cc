"""From a model of transformers to the adapter of its family."""

from __future__ import annotations

from typing import Any

from trio.errors import UserError
from trio.models.adapter import Adapter
from trio.models.llava import LlavaAdapter
from trio.models.llava_next import LlavaNextAdapter
from trio.models.qwen2_5_vl import Qwen25VLAdapter
from trio.models.weights import check_weights

_ADAPTERS: dict[str, type[Adapter]] = {
    "llava": LlavaAdapter,
    "llava_next": LlavaNextAdapter,
    "qwen2_5_vl": Qwen25VLAdapter,
}


def adapt(model: Any) -> Adapter:
    """The adapter for a model.

    Raises:
        UserError: the family is not supported, or the weights are quantised or on many devices.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in _ADAPTERS or not hasattr(model, "lm_head"):
        raise _unsupported(f"{kind!r} ({type(model).__name__})")
    check_weights(model)
    return _ADAPTERS[kind](model)


def check_supported(config: Any) -> None:
    """Look at a config before its weights are fetched.

    Raises:
        UserError: the family is not supported.
    """
    if config.model_type not in _ADAPTERS:
        raise _unsupported(repr(config.model_type))


def processor_class(config: Any) -> Any:
    """Whose `from_pretrained` loads the processor of a model with this config.

    Raises:
        UserError: the family is not supported.
    """
    check_supported(config)
    return _ADAPTERS[config.model_type].processor_class


def _unsupported(kind: str) -> UserError:
    return UserError(
        f"models of type {kind} are not supported; supported: LlavaForConditionalGeneration "
        "(LLaVA-1.5), LlavaNextForConditionalGeneration (LLaVA-NeXT) and "
        "Qwen2_5_VLForConditionalGeneration (Qwen2.5-VL)"
    )
