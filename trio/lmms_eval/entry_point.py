"""What lmms-eval finds under the entry points `lmms_eval.models`. Loads no torch."""

from __future__ import annotations

from typing import Any

NAME = "trio_vlm"
"""Of `--model`."""


def manifest() -> Any:
    """The model's name and where its class is, which lmms-eval imports when it is asked for.

    lmms-eval calls this whenever it starts, whatever model is evaluated.
    """
    from lmms_eval.models.registry_v2 import (  # type: ignore[import-not-found]
        ModelManifest,
    )

    return ModelManifest(model_id=NAME, simple_class_path="trio.lmms_eval.engine_model.TrioVlm")
