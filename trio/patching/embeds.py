"""Checks that `inputs_embeds` hold text only: image features in them could not be told apart.

Shapes: B rows, S tokens, V vocabulary, N vectors, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trio.errors import UserError

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 22  # numbers that are widened at a time


def check_embeds(call: Mapping[str, Any], table_VD: Tensor) -> None:
    """Look at a call that brings embeddings and no ids.

    table_VD: the model's token embeddings.

    Raises:
        UserError: an embedding, other than of padding, is none of a token.
    """
    embeds_BSD: Tensor = call["inputs_embeds"]
    mask = call.get("attention_mask")
    own_ND = embeds_BSD.flatten(0, -2)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        new_BS = mask[:, -embeds_BSD.shape[1] :].bool().to(own_ND.device)
        own_ND = embeds_BSD[new_BS]
    own_ND = own_ND.detach().to(table_VD)
    other = int((~torch.isin(_hashes(own_ND), _hashes(table_VD.detach()))).sum())
    if other:
        raise UserError(
            f"inputs_embeds with {other} vectors that are no token's, as features of images are: a "
            "patched model tells visual tokens from text by input_ids and would not prune them; "
            "pass input_ids and pixel_values, or call trio.unpatch(model) first"
        )


def _hashes(vectors_ND: Tensor) -> Tensor:
    """A number for each vector `[N]`, the same for the same bits alone, but for chance."""
    bits = vectors_ND.contiguous().view(_BITS[vectors_ND.element_size()])
    generator = torch.Generator().manual_seed(0)
    bound = torch.iinfo(torch.int64)
    factors_D = torch.randint(bound.min, bound.max, bits.shape[1:], generator=generator)
    factors_D = factors_D.to(bits.device)
    step = max(1, _BLOCK // max(1, bits.shape[1]))
    parts = [(part.long() * factors_D).sum(dim=1) for part in bits.split(step)]
    return torch.cat(parts) if parts else bits.new_zeros(0, dtype=torch.long)
