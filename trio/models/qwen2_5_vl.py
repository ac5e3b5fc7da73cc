"""Qwen2.5-VL: its tower attends within windows of an image, and in few blocks to all of it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Qwen2_5_VLProcessor

from trio.models.adapter import Features, ImageOnly, Inputs
from trio.models.grids import GridAdapter
from trio.pruning.cost import GridVisionShape


class ImageProcessor(ImageOnly, Qwen2_5_VLProcessor):
    """The model's processor for images."""


class Qwen25VLAdapter(GridAdapter):
    """Of a `Qwen2_5_VLForConditionalGeneration`."""

    text_models = ("qwen2_5_vl_text",)
    processor_class = ImageProcessor

    def _vision_shape(self) -> GridVisionShape:
        return GridVisionShape.of_qwen2_5_config(self.model.config.vision_config)

    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Features]:
        return [Features(image) for image in self._encode(inputs).pooler_output]
