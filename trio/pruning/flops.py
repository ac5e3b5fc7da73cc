"""What a pruned prefill costs: FLOPs, KV bytes, layer-average retention. No tensors in here.

FLOPs follow the field's convention (FastV, arXiv 2403.06764): per layer with n tokens, hidden
size d and FFN width m, `4nd² + 2n²d + 2ndm`, one per multiply-add; a gated FFN has three products
instead of two, `3ndm`. Grouped key/value heads make `4nd²` smaller: `2nd² + 2nd·kv`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Sizes of a decoder.

    ffn_products: matrix products of the FFN, 3 if it is gated; published figures count 2.
    normed_keys: whether each head's keys are divided by their root mean square.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    ffn_products: int = 3
    normed_keys: bool = False

    @classmethod
    def of_config(cls, config: Any, *, normed_keys: bool = False) -> DecoderShape:
        """From the config of a LLaMA-type text model (gated FFN), which does not tell of norms."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            normed_keys=normed_keys,
        )

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layer_flops(self, tokens: int) -> int:
        """One layer over `tokens` tokens of one sequence."""
        projections = 2 * self.hidden_size * (self.query_size + self.kv_size)
        ffn = self.ffn_products * self.hidden_size * self.intermediate_size
        return tokens * (projections + ffn) + 2 * tokens * tokens * self.query_size

    def prefill_flops(self, tokens_per_layer: Sequence[int]) -> int:
        """All layers of one prompt, given the tokens in each; without proxy, head and vision."""
        assert len(tokens_per_layer) == self.num_layers
        return sum(map(self.layer_flops, tokens_per_layer))

    def proxy_flops(self, tokens: int, rows: int) -> int:
        """One stage's scoring of a sequence with `tokens` tokens and a loss at `rows` rows.

        Keys of all tokens, forwards and backwards, and once more where they are normed. Attention
        of the rows: scores by keys in two products, for the rotation's cosines and sines, and their
        gradients; sums of hidden states, and two products for their gradients. For the rows the
        rest of a layer and the head, forwards and backwards (weights get no gradient).
        """
        keys = (2 + self.normed_keys) * tokens * self.hidden_size * self.kv_size
        # Query, value and output projection.
        per_row = 3 * self.hidden_size * self.query_size
        per_row += self.ffn_products * self.hidden_size * self.intermediate_size
        per_row += self.hidden_size * self.vocab_size
        queries = rows * self.num_heads
        attention = queries * tokens * (4 * self.head_dim + 3 * self.hidden_size)
        return keys + attention + 2 * rows * per_row

    def kv_bytes(self, tokens_per_layer: Sequence[int], bytes_per_element: int) -> int:
        """Keys and values of one sequence."""
        assert len(tokens_per_layer) == self.num_layers
        return sum(tokens_per_layer) * self.kv_size * 2 * bytes_per_element


CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Towers that take pictures of one size, and the tokens that they add to a picture's patches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """Sizes of a CLIP-like tower and a two-layer projector, for one picture that the tower takes.

    layers_run: tower layers. tokens: patches and the class token, if there is one.
    features: tokens that the projector gets.
    pooled: whether the tower also sums a picture up in one vector, by a query with attention and
        an FFN, though nobody uses it.
    """

    layers_run: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patches: int
    tokens: int
    features: int
    patch_inputs: int
    decoder_hidden_size: int
    pooled: bool = False

    @classmethod
    def of_llava_config(cls, config: Any) -> VisionShape:
        """From a LlavaConfig, a LlavaNextConfig or a LlavaOnevisionConfig."""
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches + CLASS_TOKENS[vision.model_type]
        # Where there is no class token, that strategy drops a patch.
        dropped = config.vision_feature_select_strategy == "default"
        return cls(
            layers_run=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            patches=patches,
            tokens=tokens,
            features=tokens - dropped,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            decoder_hidden_size=config.text_config.hidden_size,
            pooled=getattr(vision, "vision_use_head", False),
        )

    def flops(self, projected: int | None = None) -> int:
        """Tower and projector; without what a reduction itself costs.

        `projected`: tokens that a reduction leaves the projector; None if there is none. The tower
        runs as a whole in any case.
        """
        n, d, m = self.tokens, self.hidden_size, self.intermediate_size
        tower = self.layers_run * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
        if self.pooled:
            tower += 2 * d * (d + n * d + n + m)
        patches = self.patches * self.patch_inputs * d
        out = self.decoder_hidden_size
        projected = self.features if projected is None else projected
        return tower + patches + projected * (d * out + out * out)

    def visionzip_flops(self, contextual: int) -> int:
        """What VisionZip adds to the tower of one picture with so many contextual tokens.

        One row of attention, all heads; cosines between the keys of patches and of contextual
        tokens; sums of the patches' hidden states. Products are counted over all patches, as they
        are done; sorting, norms and the mean over heads are not.
        """
        head_dim = self.hidden_size // self.num_heads
        similarities = self.patches * contextual * head_dim
        return self._row_flops() + similarities + self._merging_flops(contextual)

    def scan_flops(self, keep: int) -> int:
        """What the scan adds to the tower of one picture of which so many patches stay: two rows of
        attention, cosines between patches and kept ones, sums of hidden states; counted as
        `visionzip_flops`."""
        similarities = self.patches * keep * self.hidden_size
        return 2 * self._row_flops() + similarities + self._merging_flops(keep)

    def _row_flops(self) -> int:
        return self.tokens * self.hidden_size

    def _merging_flops(self, targets: int) -> int:
        return self.patches * targets * self.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class GridVisionShape:
    """Sizes of a Qwen-VL tower, which takes rows and columns of patches, and of its mergers.

    blocks: of the tower. whole_blocks: those that attend to a whole image; others do within
        windows. ffn_products: matrix products of a block's FFN.
    mergers: one behind the last block, and one for each decoder layer that gets more of an image.
    window: patches along a window's edge. merge: those along the edge of what becomes one token.
    """

    blocks: int
    whole_blocks: int
    ffn_products: int
    mergers: int
    hidden_size: int
    intermediate_size: int
    window: int
    merge: int
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


def layer_average(visual_tokens: int, present: Sequence[int]) -> float:
    """Layer-average retention: mean visual tokens of a layer over those the encoder gave."""
    return sum(present) / len(present) / visual_tokens
