"""What the Qwen-VL families share: an image is seen at about its own size, and its tokens stand in
rows and columns.

The tower takes the patches of many images back to back. Positions of the decoder have three axes:
time, row and column. Videos are known to `trio.patch` alone, and their positions to transformers.

Shapes: P patches of all images, C numbers of a patch, I images, F videos, N visual tokens of one
image, K of them that a reduction keeps, T packed tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from trio.decoder.gpu import sent
from trio.encoders.merging import averaged, groups
from trio.encoders.packed_attention import packed
from trio.encoders.received_attention import attention_received
from trio.encoders.scan import scanned
from trio.errors import UserError
from trio.families.adapter import (
    Adapter,
    Features,
    Inputs,
    Join,
    Layout,
    Span,
    check_pixels,
    tensor_of,
)
from trio.families.coordinates import edges, grid_boxes, raster

_WINDOW = 4
"""Visual tokens along the edge of a window in which a scan takes its first half."""
_USUAL_SIDE = 1024
"""Pixels that an image of a usual size has at most along an edge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GridVisionShape:
    """Sizes of a Qwen-VL tower, which takes rows and columns of patches, and of its mergers."""

    blocks: int
    """Of the tower."""
    whole_blocks: int
    """Those that attend to a whole image; others do within windows."""
    ffn_products: int
    """Matrix products of a block's FFN."""
    mergers: int
    """One behind the last block, and one for each decoder layer that gets more of an image."""
    hidden_size: int
    intermediate_size: int
    window: int
    """Patches along a window's edge."""
    merge: int
    """Patches along the edge of what becomes one token."""
    patch_inputs: int
    decoder_hidden_size: int

    @classmethod
    def of_qwen2_5_config(cls, vision: Any) -> GridVisionShape:
        """From a Qwen2_5_VLVisionConfig."""
        merge = vision.spatial_merge_size
        return cls(
            whole_blocks=_blocks_among(vision.fullatt_block_indexes, vision),
            ffn_products=3,
            mergers=1,
            window=vision.window_size // vision.patch_size // merge * merge,
            **_common_sizes(vision),
        )

    @classmethod
    def of_qwen3_config(cls, vision: Any) -> GridVisionShape:
        """From a Qwen3VLVisionConfig, whose blocks all attend to a whole image."""
        return cls(
            whole_blocks=vision.depth,
            ffn_products=2,
            mergers=1 + _blocks_among(vision.deepstack_visual_indexes, vision),
            window=vision.spatial_merge_size,
            **_common_sizes(vision),
        )

    def flops(self, rows: int, columns: int) -> int:
        """One image of this many patches."""
        n, d, m = rows * columns, self.hidden_size, self.intermediate_size
        merged = d * self.merge**2
        blocks = self.blocks * n * (4 * d * d + self.ffn_products * d * m)
        merger = n // self.merge**2 * (merged * merged + merged * self.decoder_hidden_size)
        attention = self.attention_flops(rows, columns)
        return n * self.patch_inputs * d + blocks + attention + self.mergers * merger

    def scan_flops(self, rows: int, columns: int, keep: int) -> int:
        """Reducing one image of this many patches to `keep` tokens by the attention that they get.

        Scores of all pairs of patches once more, at two blocks that attend to the whole image. For
        merging, cosines of all tokens with the kept ones, and a product for the means of what each
        merger gives; nothing where all are kept.
        """
        patches = rows * columns
        tokens = patches // self.merge**2
        pairs = tokens * keep if keep < tokens else 0
        merging = (1 + self.mergers) * pairs * self.decoder_hidden_size
        return 2 * self.hidden_size * patches**2 + merging

    def attention_flops(self, rows: int, columns: int) -> int:
        """Of them those of scores and of sums of values."""
        # The windows are all pairs of a piece of the rows and a piece of the columns.
        pairs = self._pairs(rows) * self._pairs(columns)
        in_windows = (self.blocks - self.whole_blocks) * pairs
        return 2 * self.hidden_size * (in_windows + self.whole_blocks * (rows * columns) ** 2)

    def _pairs(self, edge: int) -> int:
        """Pairs of places along an edge that lie in the same window."""
        whole, rest = divmod(edge, self.window)
        return whole * self.window**2 + rest**2


def _common_sizes(vision: Any) -> dict[str, int]:
    """Of a Qwen-VL tower's config, whatever its version."""
    return {
        "blocks": vision.depth,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "merge": vision.spatial_merge_size,
        "patch_inputs": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        "decoder_hidden_size": vision.out_hidden_size,
    }


def _blocks_among(indexes: Iterable[int], vision: Any) -> int:
    """How many of the indexes are those of a block that the tower has."""
    return len({*indexes} & {*range(vision.depth)})


class GridAdapter(Adapter):
    """Of a model that takes `pixel_values [P, C]` and `image_grid_thw [I, 3]`: of each image its
    frames, always 1, and its rows and columns of patches; and `video_grid_thw [F, 3]`, the same of
    videos."""

    default_position_ids = "keep"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        self._merge: int = vision.spatial_merge_size
        self.video_token_id = model.config.video_token_id
        # What bounds an image beside the processor is that the context must hold it.
        self.max_visual_tokens = self.decoder.max_positions
        token_side = self._merge * vision.patch_size
        self._edge = min(_USUAL_SIDE // token_side, isqrt(self.max_visual_tokens))
        self.largest_image = (self._edge * token_side, self._edge * token_side)

    @property
    def planned_visual_tokens(self) -> int:
        return self._edge**2

    @abstractmethod
    def _vision_shape(self) -> GridVisionShape:
        """Sizes of tower and mergers."""

    def _scanned(self) -> tuple[int, int]:
        """Blocks of the tower whose attention a scan reads: a shallow one and the last."""
        raise NotImplementedError(f"{type(self).__name__}._scanned")

    def _tower_order(self, rows: int, columns: int) -> Tensor:
        """`[N]`, which token of an image of so many rows and columns of them the tower has at each
        place."""
        return torch.arange(rows * columns)

    def visual_tokens(self, inputs: Inputs) -> list[int]:
        return [rows * columns // self._merge**2 for rows, columns in _grids(inputs)]

    def coordinates(self, inputs: Inputs) -> list[Tensor]:
        return [
            raster(rows // self._merge, columns // self._merge, rows / columns)
            for rows, columns in _grids(inputs)
        ]

    def boxes(self, inputs: Inputs) -> list[Tensor]:
        # The processor stretches an image to whole tokens.
        sizes = [(rows // self._merge, columns // self._merge) for rows, columns in _grids(inputs)]
        return [
            grid_boxes(edges(rows, 1 / max(1, rows)), edges(columns, 1 / max(1, columns)))
            for rows, columns in sizes
        ]

    def layouts(self, inputs: Inputs) -> list[Layout]:
        sizes = [(rows // self._merge, columns // self._merge) for rows, columns in _grids(inputs)]
        return [Layout((size,), torch.arange(prod(size))) for size in sizes]

    def video_tokens(self, inputs: Inputs) -> list[int]:
        grids = tensor_of(inputs, "video_grid_thw").tolist()
        return [prod(grid) // self._merge**2 for grid in grids]

    def check_inputs(self, inputs: Inputs) -> None:
        vision = self.model.config.vision_config
        grids = list(_grids(inputs))
        if len(grids) != 1 or any(edge < 1 or edge % self._merge for edge in grids[0]):
            raise UserError(
                f"image_grid_thw of an image is {tensor_of(inputs, 'image_grid_thw').tolist()}, "
                f"and the model takes one grid with edges in multiples of {self._merge}; use the "
                "model's own processor"
            )
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        check_pixels(inputs, [prod(grids[0]), numbers])

    def vision_flops(self, inputs: Inputs) -> int:
        shape = self._vision_shape()
        return sum(shape.flops(rows, columns) for rows, columns in _grids(inputs))

    def reduced_flops(self, inputs: Inputs, encoder: str, keep: int) -> int:
        shape = self._vision_shape()
        (grid,) = _grids(inputs)
        reading = shape.scan_flops(*grid, keep) if keep < self.visual_tokens(inputs)[0] else 0
        return shape.flops(*grid) + reading

    def _encode(self, inputs: Sequence[Inputs]) -> Any:
        """What the model's `get_image_features` makes of images, one in each of `inputs`."""
        tower = self.model.model.visual
        weight = tower.patch_embed.proj.weight
        pixels = torch.cat([tensor_of(image, "pixel_values") for image in inputs])
        # Grids stay on the host: what the tower reads off them is made there and sent.
        grids = torch.cat([tensor_of(image, "image_grid_thw") for image in inputs]).cpu()
        places = {
            name: sent(found, weight.device) if isinstance(found, Tensor) else found
            for name, found in self._places(grids).items()
        }
        with packed(tower):
            return self.model.model.get_image_features(
                sent(pixels, weight.device, weight.dtype), grids, return_dict=True, **places
            )

    def _places(self, grids: Tensor) -> dict[str, Tensor | int]:
        """What the tower would read off the grids of images `[I, 3]`, under the names by which it
        takes it ready-made; tensors on the CPU."""
        edges = get_vision_cu_seqlens(grids)
        return {
            "position_ids": get_vision_position_ids(grids, self._merge),
            "cu_seqlens": edges,
            "max_seqlen": int(edges.diff().max()),
        }

    def _reduced(
        self, inputs: Sequence[Inputs], encoder: str, keeps: Sequence[int], join: Join | None
    ) -> Sequence[Features]:
        """As of all families, with `scan`: a tower without a class token is asked which patches
        receive attention, and what enters the decoder is merged."""
        blocks = self.model.model.visual.blocks
        with attention_received([blocks[block].attn for block in self._scanned()]) as received:
            images = self._features(inputs)
        grids = [grid for image in inputs for grid in _grids(image)]
        layers = [
            layer_P.split([rows * columns for rows, columns in grids]) for layer_P in received
        ]
        return [
            self._scan(image, grid, own, keep)
            for image, grid, own, keep in zip(
                images, grids, zip(*layers, strict=True), keeps, strict=True
            )
        ]

    def _scan(
        self, image: Features, grid: tuple[int, int], received: Sequence[Tensor], keep: int
    ) -> Features:
        """One image of this grid with K = `keep` tokens, by what its patches received."""
        if keep == len(image):
            return replace(image, sources=tuple(range(keep)))
        rows, columns = (edge // self._merge for edge in grid)
        shallow_N, deep_N = (self._by_token(layer_P, rows, columns) for layer_P in received)
        kept_1N = scanned(shallow_N[None], deep_N[None], [keep], columns, _WINDOW)
        kept_K = kept_1N[0].nonzero().flatten()
        group_KN = groups(image.tokens, kept_K)
        return Features(
            tokens=averaged(group_KN, image.tokens),
            injected=tuple(averaged(group_KN, layer_ND) for layer_ND in image.injected),
            sources=tuple(kept_K.tolist()),
        )

    def _by_token(self, patches_P: Tensor, rows: int, columns: int) -> Tensor:
        """`[N]`, means over the patches that become one token, of an image's patches in the tower's
        order."""
        tower_N = self._tower_order(rows, columns).to(patches_P.device)
        token_N = patches_P.view(-1, self._merge**2).mean(dim=1)
        return torch.empty_like(token_N).index_copy_(0, tower_N, token_N)

    def positions(
        self, lengths: Sequence[int], spans: Sequence[Sequence[Span]], inputs: Sequence[Inputs]
    ) -> Tensor:
        """As of all families, with A = 3.

        Text counts on in all axes alike. The tokens of an image share their time; row and column
        start where the time is, and what follows the image comes after the larger of them.
        """
        grids = (grid for image in inputs for grid in _grids(image))
        prompts = zip(lengths, spans, strict=True)
        return torch.cat([self._positions(length, own, grids) for length, own in prompts], dim=1)

    def _positions(
        self, length: int, spans: Sequence[Span], grids: Iterator[tuple[int, int]]
    ) -> Tensor:
        """`[3, length]` of one prompt; takes its images' grids off the front."""
        pieces = []
        place = position = 0
        for start, stop in spans:
            pieces.append(torch.arange(position, position + start - place).expand(3, -1))
            position += start - place
            rows, columns = (edge // self._merge for edge in next(grids))
            row_N = torch.arange(rows).repeat_interleave(columns)
            column_N = torch.arange(columns).repeat(rows)
            pieces.append(torch.stack([torch.zeros_like(row_N), row_N, column_N]) + position)
            position += max(rows, columns)
            place = stop
        pieces.append(torch.arange(position, position + length - place).expand(3, -1))
        return torch.cat(pieces, dim=1)


def _grids(inputs: Inputs) -> Iterator[tuple[int, int]]:
    """Rows and columns of patches of each image."""
    for frames, rows, columns in tensor_of(inputs, "image_grid_thw").tolist():
        if frames != 1:
            raise UserError(
                f"image_grid_thw says {frames} frames: videos are not supported; give single "
                "images, each with its own grid"
            )
        yield rows, columns
