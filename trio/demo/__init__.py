"""A small vision-language model that really answers, and the scenes it answers about."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""The trained model with its processor, as `save_pretrained` wrote it."""
CLIP = Path(__file__).parent / "clip"
"""A `CLIPModel` with its tokenizer: `MODEL`'s vision tower, unchanged, and a text tower for it."""
SHARD = Path(__file__).parent / "data" / "heldout.parquet"
"""The bundled input: held-out scenes with prompts and right answers."""
CAPTION_PROMPT = "describe the image ."
"""The prompt that asks the bundled model for a caption."""
