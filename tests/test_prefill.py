"""Packed pruned prefill against the textbook one, prompt by prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pruning.other_methods import CHOOSE, rules_of
from tests.tiny.llava import tiny_llava
from trio.decoder.decoder import Decoder
from trio.errors import UserError
from trio.prefill import PackedPrompts, Prefilled, Trace, prefill
from trio.pruning import reference
from trio.pruning.method_registry import chooses_before_decoder
from trio.pruning.options import Pruning

LAYERS = 6
# (length, visual spans): one image, none, two images side by side and apart, an image at the very
# end, one at the very start, a prompt that is almost nothing but an image.
PROMPTS: list[tuple[int, list[tuple[int, int]]]] = [
    (90, [(5, 69)]),
    (12, []),
    (150, [(3, 67), (67, 131)]),
    (80, [(2, 34), (40, 56)]),
    (70, [(6, 70)]),
    (40, [(0, 30)]),
    (3, [(1, 3)]),
]


class GroupCache:
    """Checks that every layer's packed keys fit the announced lengths."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()
        self.groups: dict[int, tuple[int, ...]] = {}
        self.seen: dict[int, int] = {}

    def begin_prefill(self, first_layer: int, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.groups[first_layer] = lengths

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert key.shape[2] == value.shape[2] == sum(self.lengths)
        self.seen[layer_idx] = key.shape[2]
        return key, value


def pack(hidden_size: int, seed: int = 4) -> PackedPrompts:
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(length for length, _ in PROMPTS)
    embeds = torch.randn(sum(lengths), hidden_size, generator=generator)
    start = 0
    for length, spans in PROMPTS:  # near duplicates, so that suppression has work to do
        for first, last in spans:
            centres = torch.randn(6, hidden_size, generator=generator)
            which = torch.randint(6, (last - first,), generator=generator)
            own = embeds[start + first : start + last]
            own.mul_(0.4).add_(centres[which])
        start += length
    images = [spans for _, spans in PROMPTS]
    coordinates = torch.rand(len(embeds), 2, generator=generator)
    return PackedPrompts(
        embeds_TD=embeds, lengths=lengths, images=images, coordinates_T2=coordinates
    )


def run(
    model: Any, prompts: PackedPrompts, pruning: Pruning | None, cache: Any = None
) -> Prefilled:
    decoder = Decoder(model.model.language_model, model.lm_head)
    return prefill(decoder, prompts, pruning, cache)


SETTINGS = [
    Pruning(schedule="1:20,3:12,5:5"),
    Pruning(schedule="0:24,2:8"),
    Pruning(schedule="0:40,2:30"),
    Pruning(schedule="0:40,2:30", fill_up="reference"),
    Pruning(schedule="2:0.5,4:0.2", position_ids="keep"),
    Pruning(schedule="1:40,2:32,4:6", proxy_positions="with_last", similarity_threshold=0.6),
    Pruning(schedule="2:64,4:64"),
    Pruning(schedule="1:10", method="gradient", proxy_positions="last"),
    Pruning(retention=0.35),
    Pruning(schedule="1:20,3:12", proxy_layer="previous"),
    Pruning(schedule="2:20,6:5", proxy_layer="previous", proxy_head="input_embedding"),
    Pruning(schedule="6:7", proxy_layer="previous", position_ids="keep", method="gradient"),
    Pruning(schedule="0:24,2:8", proxy_head="input_embedding"),
    Pruning(schedule="2:20", method="fastv"),
    Pruning(schedule="1:20,3:12,5:5", method="fastv", position_ids="keep"),
    Pruning(schedule="0:14", method="divprune"),
    Pruning(retention=0.35, method="divprune", position_ids="keep"),
]


@pytest.mark.parametrize(
    ("pruning", "kv_heads"),
    [*((own, 2) for own in SETTINGS), *((own, 4) for own in SETTINGS if own.method != "trio")],
    ids=str,
)
def test_equals_the_textbook_prompt_by_prompt(pruning: Pruning, kv_heads: int) -> None:
    model = tiny_llava(layers=LAYERS, kv_heads=kv_heads)
    prompts = pack(32)
    cache = GroupCache()
    got = run(model, prompts, pruning, cache)
    text, head = reference.text_parts(model, torch.float32)
    assert prompts.coordinates_T2 is not None
    coordinates = prompts.coordinates_T2.split(list(prompts.lengths))
    for request, embeds in enumerate(prompts.embeds_TD.split(list(prompts.lengths))):
        spans = list(prompts.images[request])
        book = reference.prefill(
            text,
            head,
            embeds,
            spans,
            [pruning.stages(stop - start, LAYERS) for start, stop in spans],
            rules_of(pruning),
            choose=CHOOSE[pruning.method],
            coordinates=coordinates[request],
        )
        assert got.kept[request] == book.kept
        assert got.visual_tokens_stages[request] == [len(stage) for stage in book.kept]
        assert [own[request] for own in got.cache_lengths] == book.lengths
        assert [own[request] for own in got.next_positions] == book.next_positions
        torch.testing.assert_close(got.logits_BV[request], book.logits_U, atol=2e-4, rtol=2e-4)
    assert cache.seen == {layer: sum(own) for layer, own in enumerate(got.cache_lengths)}
    for first, lengths in cache.groups.items():
        assert list(lengths) == got.cache_lengths[first]
    assert got.prune_seconds > 0


@pytest.mark.parametrize("method", ["trio", "gradient", "random", "fastv", "divprune"])
def test_a_batch_is_its_singles(method: str) -> None:
    model = tiny_llava(layers=LAYERS)
    packed = pack(32)
    salts = tuple(range(len(packed.lengths)))
    prompts = PackedPrompts(
        embeds_TD=packed.embeds_TD, lengths=packed.lengths, images=packed.images, salts=salts
    )
    schedule = "0:14" if chooses_before_decoder(method) else "1:20,3:9"
    pruning = Pruning(schedule=schedule, method=method, seed=2)
    together = run(model, prompts, pruning)
    start = 0
    for request, length in enumerate(prompts.lengths):
        one = PackedPrompts(
            embeds_TD=prompts.embeds_TD[start : start + length],
            lengths=(length,),
            images=[prompts.images[request]],
            salts=(salts[request],),
        )
        alone = run(model, one, pruning)
        assert alone.kept[0] == together.kept[request]
        torch.testing.assert_close(
            alone.logits_BV[0], together.logits_BV[request], atol=1e-4, rtol=1e-4
        )
        start += length


def test_stages_come_from_each_images_own_size() -> None:
    """64 and 32 tokens at one retention: other counts in the same layers, other cache lengths."""
    model = tiny_llava(layers=LAYERS)
    embeds = torch.randn(110, 32, generator=torch.Generator().manual_seed(0))
    images = [[(2, 66)], [(1, 33)]]
    prompts = PackedPrompts(embeds_TD=embeds, lengths=(70, 40), images=images)
    got = run(model, prompts, Pruning(retention=0.4))
    for request, visual in enumerate((64, 32)):
        present = [own[request] - (6, 8)[request] for own in got.cache_lengths]
        assert abs(sum(present) / LAYERS - 0.4 * visual) <= 1
    assert got.visual_tokens_stages[0] != got.visual_tokens_stages[1]


def test_rewriting_positions_reaches_requests_that_lose_nothing() -> None:
    """Given positions start elsewhere; a stage that removes nothing still counts anew from 0."""
    model = tiny_llava(layers=4)
    embeds = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20) + 7, torch.arange(20) + 7])
    prompts = PackedPrompts(
        embeds_TD=embeds, lengths=(20, 20), images=[[(2, 12)], []], positions_T=positions
    )
    got = run(model, prompts, Pruning(schedule="1:30,2:4"))
    assert [own[0] for own in got.next_positions] == [27, 20, 14, 14]
    assert [own[1] for own in got.next_positions] == [27] * 4
    kept = run(model, prompts, Pruning(schedule="1:30,2:4", position_ids="keep"))
    assert [own[0] for own in kept.next_positions] == [27] * 4


@pytest.mark.parametrize(
    "pruning", [None, Pruning(), Pruning(retention=1.0), Pruning(method="none")]
)
def test_without_pruning_nothing_is_timed_or_removed(pruning: Pruning | None) -> None:
    model = tiny_llava(layers=3)
    prompts = pack(32)
    got = run(model, prompts, pruning)
    assert got.prune_seconds == 0.0
    assert got.cache_lengths == [list(prompts.lengths)] * 3
    assert got.kept == [[] for _ in prompts.lengths]


def test_half_precision_runs_in_its_own_dtype() -> None:
    model = tiny_llava(layers=LAYERS, dtype=torch.bfloat16)
    packed = pack(32)
    prompts = PackedPrompts(
        embeds_TD=packed.embeds_TD.bfloat16(), lengths=packed.lengths, images=packed.images
    )
    got = run(model, prompts, Pruning(schedule="1:20,3:9"))
    assert got.logits_BV.dtype == torch.bfloat16
    assert got.visual_tokens_stages[0] == [20, 9]


def test_a_trace_shows_each_stage() -> None:
    model = tiny_llava(layers=LAYERS)
    decoder = Decoder(model.model.language_model, model.lm_head)
    trace = Trace()
    prompts = pack(32)
    prefill(decoder, prompts, Pruning(schedule="1:20,3:9"), None, trace=trace)
    assert [stage.layer for stage in trace.stages] == [1, 3]
    for stage in trace.stages:
        assert stage.hidden_in_TD.shape[0] == sum(stage.before.lengths)
        assert stage.hidden_out_TD.shape[0] == sum(stage.after.lengths)
        assert stage.positions_out_T.shape[0] == sum(stage.after.lengths)
    assert trace.hidden_TD is not None
    assert trace.hidden_TD.shape[0] == sum(trace.stages[-1].after.lengths)


def test_what_cannot_be_served_is_refused() -> None:
    model = tiny_llava(layers=4)
    with pytest.raises(UserError, match="out of reach"):
        run(model, pack(32), Pruning(retention=0.1))
    with pytest.raises(UserError, match="decoder has 4 layers"):
        run(model, pack(32), Pruning(schedule="4:3"))
    with pytest.raises(UserError, match="decoder has 4 layers"):
        run(model, pack(32), Pruning(schedule="5:3", proxy_layer="previous"))
    assert model.config.text_config._attn_implementation != "trio_ragged"
