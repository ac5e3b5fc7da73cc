"""What reading a prompt takes beside the decoder's layers: the vision encoder and the choice."""

from __future__ import annotations

from collections.abc import Sequence

from trio.engine.request import Prepared
from trio.families.adapter import Adapter
from trio.families.text_tower import TextTower
from trio.pruning.flops import DecoderShape
from trio.pruning.method_registry import create
from trio.pruning.options import Pruning


def choosing_flops(
    shape: DecoderShape, pruning: Pruning, image_tokens: Sequence[int], prompt_tokens: int
) -> int:
    """Scoring and choosing at all stages of a prompt.

    Args:
        image_tokens: that the encoder gave for each image.
        prompt_tokens: of text.
    """
    if not pruning.chooses:
        return 0
    method = create(pruning)
    layers = shape.num_layers
    stages = [dict(pruning.stages(count, layers)) for count in image_tokens]
    flops, left = 0, [pruning.encoded(count, layers) for count in image_tokens]
    for layer in sorted({layer for own in stages for layer in own}):
        keeps = [own.get(layer, now) for own, now in zip(stages, left, strict=True)]
        if keeps == left:
            continue
        tokens = sum(left) + prompt_tokens
        pairs = zip(left, keeps, strict=True)
        losing = [(count, keep) for count, keep in pairs if keep < count]
        flops += method.flops(shape, tokens, losing)
        left = keeps
    return flops


def encoder_flops(
    adapter: Adapter, pruning: Pruning, prepared: Prepared, text_tower: TextTower | None = None
) -> int:
    """Of all images of a prompt, reduced if the settings say so, and of the text tower.

    Args:
        pruning: settled.
        text_tower: where it takes part.
    """
    flops = 0
    for count, inputs in zip(prepared.image_tokens, prepared.image_inputs, strict=True):
        left = pruning.encoded(count, adapter.decoder.num_layers)
        if pruning.encoder == "none":
            flops += adapter.vision_flops(inputs)
        else:
            flops += adapter.reduced_flops(inputs, pruning.encoder, left)
        flops += 0 if text_tower is None else text_tower.flops(prepared.prompt, left)
    return flops


def beside_decoder(
    adapter: Adapter, pruning: Pruning, prepared: Prepared, text_tower: TextTower | None = None
) -> tuple[int, int]:
    """Encoder and choosing of a prompt, pruned, and the encoder of the same unpruned."""
    text = len(prepared.input_ids) - sum(prepared.image_tokens)
    choosing = choosing_flops(adapter.shape(), pruning, prepared.image_tokens, text)
    plain = sum(adapter.vision_flops(inputs) for inputs in prepared.image_inputs)
    own = plain
    if pruning.encoder != "none" or text_tower is not None:
        own = encoder_flops(adapter, pruning, prepared, text_tower)
    return own + choosing, plain
