"""Pictures of what the pruning kept of an image: `trio.viz.overlay`. Loads no torch."""

from trio.viz.drawing import fade, heat
from trio.viz.image_tokens import ImageTokens, StageTokens, image_tokens
from trio.viz.panels import overlay

__all__ = ["ImageTokens", "StageTokens", "fade", "heat", "image_tokens", "overlay"]
