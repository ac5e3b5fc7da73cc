"""Qwen2.5-VL: its tower attends within windows of an image, and in few blocks to all of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Qwen2_5_VLProcessor
from transformers.vision_utils import get_vision_window_index

from trio.encoders.scan import windows
from trio.families.adapter import Features, ImageOnly, Inputs
from trio.families.qwen_vision import GridAdapter, GridVisionShape


class ImageProcessor(ImageOnly, Qwen2_5_VLProcessor):
    """The model's processor for images."""


class Qwen25VLAdapter(GridAdapter):
    """Of a `Qwen2_5_VLForConditionalGeneration`."""

    text_models = ("qwen2_5_vl_text",)
    encoders = ("scan",)
    processor_class = ImageProcessor

    def _vision_shape(self) -> GridVisionShape:
        return GridVisionShape.of_qwen2_5_config(self.model.config.vision_config)

    def _scanned(self) -> tuple[int, int]:
        vision = self.model.config.vision_config
        last = vision.depth - 1
        return min((*vision.fullatt_block_indexes, last)), last

    def _tower_order(self, rows: int, columns: int) -> Tensor:
        """Window by window."""
        vision = self.model.config.vision_config
        edge = vision.window_size // vision.patch_size // vision.spatial_merge_size
        return windows(rows * columns, columns, edge).argsort(stable=True)

    def _places(self, grids: Tensor) -> dict[str, Tensor | int]:
        vision = self.model.config.vision_config
        index, edges = get_vision_window_index(
            grids,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return super()._places(grids) | {
            "window_index": index,
            "cu_window_seqlens": edges,
            "max_window_seqlen": int(edges.diff().max()),
        }

    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Features]:
        return [Features(image) for image in self._encode(inputs).pooler_output]
