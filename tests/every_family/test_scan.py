"""What enters the decoder behind a reduction in the towers of the Qwen-VL families."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import by_id
from tests.every_family.family import (
    FAMILIES,
    LAYERS,
    Family,
    requests_with,
)
from tests.every_family.test_engine import engine
from trio.engine import model_runner as runner
from trio.engine.request import Prepared
from trio.families.adapter import Features
from trio.prefill import PackedPrompts, Prefilled
from trio.pruning.options import Pruning

SCAN = Pruning(retention=1 / 4, encoder="scan")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: Any) -> Family:
    return FAMILIES[request.param]()


class Entered:
    """Notes what enters the decoder, and what leaves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[PackedPrompts] = []
        self.done: list[Prefilled] = []
        own = runner.prefill

        def prefill(decoder: Any, prompts: PackedPrompts, *args: Any) -> Prefilled:
            self.prompts.append(prompts)
            self.done.append(own(decoder, prompts, *args))
            return self.done[-1]

        monkeypatch.setattr(runner, "prefill", prefill)


def model_positions(family: Family, prepared: Prepared) -> torch.Tensor:
    """`[3, S]` of the whole prompt, from the model's own function."""
    ids = torch.tensor([list(prepared.input_ids)])
    kinds = (ids == family.model.config.image_token_id).long()
    grids = [image["image_grid_thw"] for image in prepared.image_inputs]
    positions, _ = family.model.model.get_rope_index(ids, kinds, image_grid_thw=torch.cat(grids))
    return positions[:, 0]


@pytest.mark.parametrize("method", ["none", "trio"])
def test_tokens_and_the_text_behind_them_keep_their_positions(
    family: Family, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    requests = requests_with([2, 1, 3])
    worker = engine(family, replace(SCAN, method=method))
    noted = Entered(monkeypatch)
    results = by_id(worker.generate(requests))
    (prompts,), (done,) = noted.prompts, noted.done
    assert prompts.positions_T is not None
    for row, (request, own) in enumerate(
        zip(requests, prompts.positions_T.split(prompts.lengths, dim=1), strict=True)
    ):
        prepared = worker.prepare(request)
        assert isinstance(prepared, Prepared)
        whole = model_positions(family, prepared)
        entered = set((results[request.id].kept_tokens or [])[0])
        visual = itertools.count()
        image_token = family.model.config.image_token_id
        stays = [
            place
            for place, token in enumerate(prepared.input_ids)
            if token != image_token or next(visual) in entered
        ]
        assert len(stays) < len(prepared.input_ids)
        assert torch.equal(own, whole[:, stays])
        # The answer goes on where that of the whole prompt does.
        assert {layer[row] for layer in done.next_positions} == {int(whole.max()) + 1}


def test_numbered_anew_they_enter_as_0_1_2(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = engine(family, replace(SCAN, method="none", position_ids="renumber"))
    noted = Entered(monkeypatch)
    list(worker.generate(requests_with([2, 0, 1])))
    (prompts,), (done,) = noted.prompts, noted.done
    assert prompts.positions_T is None
    assert all(layer == list(prompts.lengths) for layer in done.next_positions)


def test_the_features_that_enter_are_those_of_their_images(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is injected beside them, too."""
    worker = engine(family, replace(SCAN, method="none"))
    noted = Entered(monkeypatch)
    requests = requests_with([2, 0, 3])
    list(worker.generate(requests))
    (prompts,) = noted.prompts
    images: list[Features] = []
    for request in requests:
        prepared = worker.prepare(request)
        assert isinstance(prepared, Prepared)
        for inputs, count in zip(prepared.image_inputs, prepared.image_tokens, strict=True):
            keep = worker._runner.pruning.encoded(count, LAYERS)
            images += worker._runner.adapter.encode_images([inputs], "scan", [keep])
    places = [
        start + place
        for start, own in zip(
            itertools.accumulate(prompts.lengths, initial=0), prompts.images, strict=False
        )
        for span in own
        for place in range(*span)
    ]
    wanted = torch.cat([image.tokens for image in images])
    torch.testing.assert_close(prompts.embeds_TD[places], wanted, atol=1e-4, rtol=1e-4)
    layers = zip(*(image.injected for image in images), strict=True)
    for got, layer in zip(prompts.injected, layers, strict=True):
        torch.testing.assert_close(got, torch.cat(layer), atol=1e-4, rtol=1e-4)
