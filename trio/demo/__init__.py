"""A small vision-language model that really answers, and the scenes it answers about."""

from trio.bundled import CLIP, MODEL, SHARD, write_images

__all__ = ["CAPTION_PROMPT", "CLIP", "MODEL", "SHARD", "write_images"]

CAPTION_PROMPT = "describe the image ."
"""The prompt that asks the bundled model for a caption."""
