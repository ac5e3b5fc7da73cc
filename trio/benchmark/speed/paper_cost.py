"""FLOPs and KV bytes of one prompt by retention, computed from shapes alone.

Counting follows `trio.pruning.flops`. No weights are needed: models live on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from trio.engine.metrics import choosing_flops
from trio.engine.preprocess import MAX_ASPECT_RATIO
from trio.errors import UserError
from trio.families.registry import adapt
from trio.pruning.flops import layer_average
from trio.pruning.options import Pruning
from trio.pruning.schedule import tokens_per_layer
from trio.tables import aligned

Stages = list[tuple[int, int]]
_MOST_PIXELS = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One image and some text, unpruned over pruned."""

    visual_tokens: int
    stages: Stages
    retention: float
    decoder: float
    """FLOPs of the decoder's layers."""
    chosen: float
    """With scoring and choosing."""
    whole: float
    """With the vision encoder, too."""
    kv_cache: float
    """Bytes."""


def cost(
    model: Any,
    processor: Any,
    pruning: Pruning,
    *,
    image: tuple[int, int],
    prompt_tokens: int,
) -> Cost:
    """Count for one prompt.

    Args:
        model: may be on the meta device. processor: that fits it.
        pruning: retention or schedule; what is open is the family's choice.
        image: width and height in pixels.
        prompt_tokens: of text.

    Raises:
        UserError: the model cannot be pruned like that.
    """
    adapter = adapt(model)
    if max(image) > MAX_ASPECT_RATIO * min(image) or image[0] * image[1] > _MOST_PIXELS:
        raise UserError(
            f"--image {image[0]}x{image[1]}: one edge may be at most {MAX_ASPECT_RATIO} times the "
            f"other, and there may be {_MOST_PIXELS} pixels"
        )
    (inputs,) = adapter.process_images(processor, [Image.new("RGB", image)])
    shape, (visual,) = adapter.shape(), adapter.visual_tokens(inputs)
    settled = adapter.settle(pruning)
    stages = settled.stages(visual, shape.num_layers)
    entering = settled.encoded(visual, shape.num_layers)
    if not stages and entering == visual:
        raise UserError("these settings prune nothing; give --retention below 1 or --schedule")
    present = tokens_per_layer(entering, stages, shape.num_layers)
    pruned = [tokens + prompt_tokens for tokens in present]
    full = [visual + prompt_tokens] * shape.num_layers
    before, after = shape.prefill_flops(full), shape.prefill_flops(pruned)
    choosing = choosing_flops(shape, settled, (visual,), prompt_tokens)
    vision = adapter.vision_flops(inputs)
    reduced = vision
    if settled.encoder != "none":
        reduced = adapter.reduced_flops(inputs, settled.encoder, entering)
        stages = [(0, entering), *stages]
    return Cost(
        visual_tokens=visual,
        stages=stages,
        retention=layer_average(visual, present),
        decoder=before / after,
        chosen=before / (after + choosing),
        whole=(before + vision) / (after + choosing + reduced),
        kv_cache=shape.kv_bytes(full, 2) / shape.kv_bytes(pruned, 2),
    )


def table(rows: Sequence[tuple[str, Cost]]) -> str:
    """Unpruned over pruned, as aligned text."""
    heads = "model|visual tokens|stages|retention|decoder|with choosing|with encoder|KV cache"
    lines = [heads.split("|")]
    for name, row in rows:
        stages = ",".join(f"{layer}:{keep}" for layer, keep in row.stages)
        ratios = (row.decoder, row.chosen, row.whole, row.kv_cache)
        figures = [f"{ratio:.2f}" for ratio in ratios]
        lines.append([name, str(row.visual_tokens), stages, f"{row.retention:.4f}", *figures])
    return aligned(lines)
