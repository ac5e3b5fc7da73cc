"""Pruning inside a transformers model that stays what it is: `patch` and `unpatch`."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from trio.errors import UserError
from trio.families.registry import adapt
from trio.patching.forward import PatchedDecoder, PatchedForward, PatchedGenerate
from trio.patching.override import Override
from trio.pruning.method_registry import needs_of
from trio.pruning.options import Pruning

__all__ = ["patch", "unpatch"]

COVERED = (
    "something else was put over a part of the patched model (an accelerate hook?): take that off "
    "before trio.unpatch"
)
Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, pruning: Pruning) -> Model:
    """Makes this one model prune the visual tokens of its prompts; `generate` is used as before.

    Only the instance changes (its `forward` and `generate`, and the `forward` of its text decoder),
    no class and no config. Patching again replaces the settings.

    What is pruned is a prefill: a call with images or videos, an empty cache and
    `logits_to_keep=1`, which is what `generate` makes of a prompt. Rows may be padded on either
    side; each gets the result that it gets alone. Text-only prompts run as before, except that
    right-padded ones become right. The cache that comes back reports the unpruned length and holds,
    in each layer, `lengths_B` tokens per row; the same model can go on from it with more text.

    A video has one budget, as an image has; where text stands between its frames, as the times of
    Qwen3-VL do, each run of its tokens has its own.

    Refused with a UserError where a prompt has images or videos: logits of other positions than the
    last (and so a loss), `output_attentions`, `output_hidden_states`, `use_cache=False`, caches
    that are not a plain DynamicCache, prefill in chunks, assisted generation, `inputs_embeds`,
    position ids of one's own (those of an M-RoPE are taken as they come), an M-RoPE without
    `mm_token_type_ids`, images or videos on top of a filled cache, and videos of a family whose
    adapter has none (LLaVA-1.5, LLaVA-NeXT). No gradient flows through a pruned prompt. Calls of
    `model.model` and its parts, past the model itself, are not pruned. Under `torch.compile` a
    patched model runs eagerly. One thread at a time.

    Args:
        model: a `...ForConditionalGeneration` of any family that has an adapter: those of
            `trio/families/README.md`, and what is added with `trio.register`; not quantised, on
            one device.
        pruning: how much to keep and how to choose.

    Returns:
        The same model.

    Raises:
        UserError: the model is not supported, or the settings do not fit it; it is left as it was.
    """
    if not isinstance(pruning, Pruning):
        raise UserError(f"pruning must be a trio.Pruning, got {pruning!r:.100}")
    if pruning.encoder != "none":
        raise UserError(
            f"encoder {pruning.encoder}: a patched model takes its features as the encoder gives "
            "them; use trio.Engine for a reduction in the encoder, or encoder none"
        )
    adapter = adapt(model)
    pruning = adapter.settle(pruning)
    if needs_of(pruning) & {"text_tower", "instruction"}:
        raise UserError(
            f"method {pruning.method} compares images with prompts before the decoder, and a "
            "patched model has no text for that; use trio.Engine, or another method"
        )
    if PatchedForward.of(model) is not None:
        unpatch(model)
    overrides: list[Override] = [
        PatchedForward(model, pruning, adapter),
        PatchedDecoder(adapter.decoder.model, pruning, adapter),
        PatchedGenerate(model, pruning, adapter),
    ]
    for override in overrides:
        override.install()
    return model


def unpatch(model: Model) -> Model:
    """Gives back exactly the model that `patch` got.

    Returns:
        The same model.

    Raises:
        UserError: the model is not patched.
    """
    forward = PatchedForward.of(model)
    if forward is None and PatchedGenerate.of(model) is not None:
        raise UserError(COVERED)
    if forward is None:
        raise UserError(
            f"this {type(model).__name__} is not patched: nothing to undo; call trio.patch(model, "
            "trio.Pruning(...)) first"
        )
    installed = [
        forward,
        PatchedDecoder.of(forward.adapter.decoder.model),
        PatchedGenerate.of(model),
    ]
    if None in installed:
        raise UserError(COVERED)
    for override in installed:
        assert override is not None
        override.remove()
    return model
