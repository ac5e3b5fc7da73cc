"""What visual tokens matter for their prompts, for method eadp.

Shapes: N visual tokens of an image as they enter the decoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from trio.families.adapter import Features, Joint
from trio.families.text_tower import Text, TextTower
from trio.pruning.candidates import Relevance
from trio.pruning.eadp import importance

_TEXTS = 256
"""Prompts whose embeddings are held: many rows ask the same."""


class Relevances:
    """EADP's importance (arXiv 2607.02484), for prompts and the images that they come with."""

    def __init__(self, text_tower: TextTower) -> None:
        self._text_tower = text_tower
        self._texts: OrderedDict[str, Text] = OrderedDict()

    def __call__(
        self, prompts: Sequence[str], features: Sequence[Sequence[Features]]
    ) -> list[list[Relevance]]:
        """Of each prompt's images, whose features have `joint`."""
        texts = self._embedded([p for p, own in zip(prompts, features, strict=True) if own])
        return [
            [_relevance(texts[prompt], image.joint) for image in own if image.joint is not None]
            for prompt, own in zip(prompts, features, strict=True)
        ]

    def _embedded(self, prompts: Sequence[str]) -> dict[str, Text]:
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        self._texts |= zip(fresh, self._text_tower.embed(fresh), strict=True)
        texts = {prompt: self._texts[prompt] for prompt in prompts}
        for prompt in texts:
            self._texts.move_to_end(prompt)
        while len(self._texts) > _TEXTS:
            self._texts.popitem(last=False)
        return texts


def _relevance(text: Text, joint: Joint) -> Relevance:
    matters_M = importance(
        joint.tokens, text.tokens_MLP, text.pooled_MP, joint.grids, mask_ML=text.mask_ML
    )
    places_N = joint.places.to(matters_M.device)
    # What is no patch is nothing that the kept tokens have to stand for.
    importance_N = matters_M[places_N.clamp(min=0)].where(places_N >= 0, 0)
    return Relevance(importance_N, _tiles(joint))


def _tiles(joint: Joint) -> Tensor | None:
    """The tile of each visual token, `[N]`; what is no patch is a tile of its own."""
    if joint.grids is None or len(joint.grids) == 1:
        return None
    sizes = torch.tensor([rows * columns for rows, columns in joint.grids])
    tile_M = torch.arange(len(sizes)).repeat_interleave(sizes)
    return tile_M[joint.places.clamp(min=0)].where(joint.places >= 0, len(sizes))
