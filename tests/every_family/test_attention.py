"""The attention of a prompt's last token, against what each family's own model tells of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.every_family.family import FAMILIES, LAYERS
from trio.families.registry import adapt
from trio.pruning import reference
from trio.pruning.scores import tiled_attention as keys
from trio.pruning.scores.last_token_attention import last_attention

LENGTHS = (40, 7, 7, 23)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_equals_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name]().model
    decoder = adapt(model).decoder
    text, _ = reference.text_parts(model, torch.float64)
    generator = torch.Generator().manual_seed(5)
    entered, books, places = [], [], []
    for length in LENGTHS:
        embeds = torch.randn(1, length, decoder.hidden_size, generator=generator).double()
        shape = (decoder.position_axes, length)
        place = torch.randint(3, shape, generator=generator).cumsum(dim=-1)
        out = text(
            inputs_embeds=embeds,
            position_ids=place[:, None] if len(place) > 1 else place,
            attention_mask=torch.ones(1, length, dtype=torch.long),
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
        entered.append(torch.cat(out.hidden_states[:LAYERS]))
        books.append(torch.stack([own[0, :, -1].mean(dim=0) for own in out.attentions]))
        places.append(place if len(place) > 1 else place[0])
    for layer, tile_tokens in itertools.product((0, 3), (5, 40, 1000)):
        monkeypatch.setattr(keys, "_TILE", tile_tokens * decoder.hidden_size)
        hidden_TD, place_T = torch.cat([own[layer] for own in entered]), torch.cat(places, dim=-1)
        got_T = last_attention(decoder, layer, hidden_TD, place_T, LENGTHS)
        book_T = torch.cat([own[layer] for own in books])
        torch.testing.assert_close(got_T.double(), book_T, rtol=1e-4, atol=1e-7)
        sums = torch.stack([own.sum() for own in got_T.split(LENGTHS)])
        torch.testing.assert_close(sums, torch.ones(len(LENGTHS)))
