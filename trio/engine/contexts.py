"""Text features and image features for pruning methods that compare both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from trio.engine.sequence import SequenceState
from trio.errors import UserError
from trio.families.adapter import Adapter, Features, Join
from trio.families.text_tower import TextTower
from trio.pruning.method import Context, Method, Text

_TEXTS = 256
"""Prompts whose embeddings are held: many rows ask the same."""


class Contexts:
    """Makes the `Context` of every image of some requests.

    Args:
        method: whose needs count.
        adapter: of the model.
        text_tower: that belongs to the model's vision encoder, for methods that need it.

    Raises:
        UserError: the model does not have what the method needs.
    """

    def __init__(self, method: Method, adapter: Adapter, text_tower: TextTower | None) -> None:
        self._adapter = adapter
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self._with_instruction = "instruction" in method.needs
        self.text_tower: TextTower | None = None
        """None where the method does not need it."""
        if {"instruction", "text_tower"} <= method.needs:
            raise UserError(f"method {method.name} needs two spaces of text: one is to be had")
        if "text_tower" in method.needs:
            self.text_tower = _checked(method, adapter, text_tower)

    @property
    def join(self) -> Join | None:
        """Projects patches into the space of the text tower; None if that is not needed."""
        return None if self.text_tower is None else self.text_tower.project

    @property
    def needed(self) -> bool:
        return self._with_instruction or self.text_tower is not None

    def __call__(
        self, sequences: Sequence[SequenceState], features: Sequence[Sequence[Features]]
    ) -> list[list[Context]]:
        """Of each sequence's images, by their features."""
        if self._with_instruction:
            return [
                list(self._by_instruction(sequence, own))
                for sequence, own in zip(sequences, features, strict=True)
            ]
        prompts = [sequence.prepared.prompt for sequence in sequences]
        texts = self._embedded([p for p, own in zip(prompts, features, strict=True) if own])
        return [
            [_by_text(image, texts[prompt]) for image in own]
            for prompt, own in zip(prompts, features, strict=True)
        ]

    def _by_instruction(
        self, sequence: SequenceState, features: Sequence[Features]
    ) -> Iterator[Context]:
        decoder = self._adapter.decoder
        ids_L = torch.tensor(sequence.prepared.instruction_ids, device=decoder.device)
        instruction_LD = decoder.embed(ids_L)
        for inputs, image in zip(sequence.prepared.image_inputs, features, strict=True):
            if image.sources:
                # What a reduction leaves stands in no grid.
                yield Context(places_V=torch.arange(len(image)), instruction_LD=instruction_LD)
            else:
                (layout,) = self._adapter.layouts(inputs)
                yield Context(
                    places_V=layout.places, grids=layout.grids, instruction_LD=instruction_LD
                )

    def _embedded(self, prompts: Sequence[str]) -> dict[str, Text]:
        assert self.text_tower is not None
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        self._texts |= zip(fresh, self.text_tower.embed(fresh), strict=True)
        texts = {prompt: self._texts[prompt] for prompt in prompts}
        for prompt in texts:
            self._texts.move_to_end(prompt)
        while len(self._texts) > _TEXTS:
            self._texts.popitem(last=False)
        return texts


def _by_text(image: Features, text: Text) -> Context:
    joint = image.joint
    assert joint is not None, "features without what `join` makes of them"
    return Context(places_V=joint.places, grids=joint.grids, joint_MP=joint.tokens, text=text)


def _checked(method: Method, adapter: Adapter, text_tower: TextTower | None) -> TextTower:
    if adapter.clip_tower is None:
        raise UserError(
            f"method {method.name} needs a CLIP vision encoder, which this "
            f"{type(adapter.model).__name__} does not have; use eadp_llm, or cdpruner "
            "with --method-options space=language"
        )
    if text_tower is None:
        raise UserError(
            f"method {method.name} compares images with prompts in the space that CLIP's towers "
            "share: give as text_tower (--text-tower) the CLIP checkpoint that the model's vision "
            "encoder was taken from, openai/clip-vit-large-patch14-336 for LLaVA-1.5"
        )
    return text_tower
