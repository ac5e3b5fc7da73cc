"""The engine with a reduction in the towers of the Qwen-VL families."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.support import assert_lively, by_id, tokens
from tests.families.family import FAMILIES, LAYERS, Family, requests_of_many_sizes, requests_with
from trio.engine import model_runner as runner
from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request, Result
from trio.families.adapter import Features
from trio.prefill import PackedPrompts, Prefilled
from trio.pruning.options import Pruning

SCAN = Pruning(retention=1 / 4, encoder="scan")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: Any) -> Family:
    return FAMILIES[request.param]()


def engine(family: Family, pruning: Pruning | None, **options: Any) -> Engine:
    return Engine(family.model, family.processor, pruning=pruning, kv_bytes=1 << 26, **options)


def one_by_one(worker: Engine, requests: Sequence[Request]) -> dict[Any, Result]:
    return by_id(itertools.chain.from_iterable(worker.generate([r]) for r in requests))


@pytest.mark.parametrize(
    ("method", "position_ids"),
    [
        ("trio", "keep"),
        pytest.param("trio", "renumber", marks=pytest.mark.slow),
        pytest.param("none", "renumber", marks=pytest.mark.slow),
        pytest.param("random", "keep", marks=pytest.mark.slow),
    ],
)
def test_a_batch_equals_singles_and_counts_are_as_asked(
    family: Family, method: str, position_ids: str
) -> None:
    pruning = replace(SCAN, method=method, position_ids=position_ids)
    requests = requests_of_many_sizes(7, seed=2, max_new_tokens=8)
    assert {len(request.images) for request in requests} >= {0, 1, 2, 9}
    worker = engine(family, pruning)
    alone = one_by_one(worker, requests)
    late = engine(family, pruning, max_running=5, batch_tokens=250)
    together = by_id(late.generate(requests))
    assert_lively({key: result.token_ids for key, result in alone.items()})
    for request in requests:
        result, single = together[request.id], alone[request.id]
        assert result.token_ids == single.token_ids
        assert result.kept_tokens == single.kept_tokens
        prepared = worker.prepare(request)
        assert isinstance(prepared, Prepared)
        counts = prepared.image_tokens
        entered = [worker._runner.pruning.encoded(count, LAYERS) for count in counts]
        stages = [worker._runner.pruning.stages(count, LAYERS) for count in counts]
        assert result.visual_tokens == sum(counts)
        assert result.visual_tokens_encoder == sum(entered)
        assert result.visual_tokens_stages == [
            sum(keep for _, keep in stage) for stage in zip(*stages, strict=True)
        ]
        starts = itertools.accumulate(counts, initial=0)
        kept: list[list[int | None]] = list(result.kept_tokens or [])
        for start, count, own, later in zip(starts, counts, entered, stages, strict=False):
            for keep, indices in zip((own, *(keep for _, keep in later)), kept, strict=True):
                image = range(start, start + count)
                assert sum(index in image for index in indices) == keep
        for before, after in itertools.pairwise(kept):
            assert set(after) <= set(before)


def test_what_keeps_all_answers_as_unpruned(family: Family) -> None:
    requests = requests_of_many_sizes(5, seed=5, max_new_tokens=8)
    whole = tokens(engine(family, None).generate(requests))
    assert_lively(whole)
    for pruning in (
        Pruning(schedule="0:1000", encoder="scan", method="none"),
        Pruning(retention=1, encoder="scan"),
    ):
        results = by_id(engine(family, pruning).generate(requests))
        assert {key: result.token_ids for key, result in results.items()} == whole
        assert all(r.visual_tokens_encoder == r.visual_tokens for r in results.values())


def test_what_is_left_out_changes_answers(family: Family) -> None:
    """Guards the equalities above."""
    requests = [r for r in requests_of_many_sizes(3, seed=5, max_new_tokens=4) if r.images]
    whole = tokens(engine(family, None).generate(requests))
    pruning = replace(SCAN, method="none")
    assert tokens(engine(family, pruning).generate(requests)) != whole


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
