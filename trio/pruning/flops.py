"""What a pruned prefill costs: FLOPs, KV bytes, layer-average retention. No tensors in here.

FLOPs follow the field's convention (FastV, arXiv 2403.06764): per layer with n tokens, hidden
size d and FFN width m, `4nd² + 2n²d + 2ndm`, one per multiply-add; a gated FFN has three products
instead of two, `3ndm`. Grouped key/value heads make `4nd²` smaller: `2nd² + 2nd·kv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Sizes of a decoder."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    ffn_products: int = 3
    """Matrix products of the FFN, 3 if it is gated; published figures count 2."""
    normed_keys: bool = False
    """Whether each head's keys are divided by their root mean square."""

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


def layer_average(visual_tokens: int, present: Sequence[int]) -> float:
    """Layer-average retention: mean visual tokens of a layer over those the encoder gave."""
    return sum(present) / len(present) / visual_tokens
