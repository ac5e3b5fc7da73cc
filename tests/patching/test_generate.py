import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import trio
from tests.patching.prompts import Batch, follow_up, pad, rows, run
from tests.tiny.llava import IMAGE_TOKEN_ID, tiny_llava
from trio.errors import UserError
from trio.families.coordinates import packed
from trio.families.registry import adapt
from trio.patching.forward import repeats_by_prompt
from trio.prefill import PackedPrompts, prefill
from trio.pruning import reference

LAYERS = 6
close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
SETTINGS = [
    trio.Pruning(retention=0.4),
    trio.Pruning(retention=0.4, position_ids="keep", proxy_positions="last"),
    # So low that the suppression leaves little, and places decide.
    trio.Pruning(schedule="0:40,2:9,5:1", similarity_threshold=0.1),
    trio.Pruning(schedule="1:0.2", method="random", seed=3),
    trio.Pruning(schedule="2:12", method="gradient"),
    trio.Pruning(schedule="2:20,6:5", proxy_layer="previous", proxy_head="input_embedding"),
]


@pytest.fixture
def model() -> Any:
    return tiny_llava(layers=LAYERS)


def assert_same(got: tuple[Tensor, Tensor, Any], wanted: tuple[Tensor, Tensor, Any]) -> None:
    assert torch.equal(got[0], wanted[0])
    close(got[1], wanted[1])


def row_of(result: tuple[Tensor, Tensor, Any], index: int) -> tuple[Tensor, Tensor, Any]:
    return result[0][index, None], result[1][index, None], None


def cached_tokens(cache: Any) -> list[list[int]]:
    return [layer.lengths_B.tolist() for layer in cache.layers]


def present(model: Any, batch: Batch, pruning: trio.Pruning) -> tuple[Tensor, list[list[int]]]:
    """Decoder input of a single prompt, and which of its tokens each layer sees."""
    adapter = adapt(model)
    images = [{"pixel_values": p[None]} for p in batch["pixel_values"]]
    features = adapter.encode_images(images)
    embeds = adapter.embed(batch["input_ids"][0], features)
    spans = tuple(adapter.spans(batch["input_ids"][0], list(map(len, features))))
    places = [own for image in images for own in adapter.coordinates(image)]
    entering = PackedPrompts(
        embeds_TD=embeds,
        lengths=(len(embeds),),
        images=(spans,),
        coordinates_T2=packed([len(embeds)], [spans], places),
    )
    (kept,) = prefill(adapter.decoder, entering, pruning, None).kept
    visual = (batch["input_ids"][0] == IMAGE_TOKEN_ID).nonzero()[:, 0].tolist()
    text = sorted(set(range(len(embeds))) - set(visual))
    layers = [list(range(len(embeds)))] * LAYERS
    stages = pruning.stages(adapter.max_visual_tokens, LAYERS)
    for (layer, _), tokens in zip(stages, kept, strict=True):
        layers[layer:] = [sorted([*text, *(visual[i] for i in tokens)])] * (LAYERS - layer)
    return embeds, layers


@torch.no_grad()
def recomputed(
    model: Any, prompt_SD: Tensor, layers: list[list[int]], new_ids: list[int], renumber: bool
) -> Tensor:
    """Logits [V] after the prompt and some new tokens, in float64 and without a cache.

    layers: for each the prompt tokens that are in it, rising.
    renumber: positions count the tokens present in the layer; else those of the whole prompt.
    """
    text, head = reference.text_parts(model, torch.float64)
    new_ND = text.embed_tokens(torch.tensor(new_ids, dtype=torch.long))
    states = dict(enumerate(torch.cat([prompt_SD.double(), new_ND])))
    new = range(len(prompt_SD), len(states))
    for layer, tokens in enumerate(layers):
        order = [*tokens, *new]
        positions = torch.arange(len(order)) if renumber else torch.tensor(order)
        hidden = torch.stack([states[token] for token in order])
        out = reference.run_layer(text, layer, hidden, positions)
        states = dict(zip(order, out, strict=True))
    return head(text.norm(states[max(states)]))


def assert_oracle(
    model: Any, batch: Batch, pruning: trio.Pruning, new: Tensor, got: Tensor
) -> None:
    """Every step's logits [N, V] against the decoder that recomputes all and caches nothing."""
    embeds, layers = present(model, batch, pruning)
    renumber = pruning.position_ids != "keep"
    for step, logits in enumerate(got):
        want = recomputed(model, embeds, layers, new[:step].tolist(), renumber)
        close(logits.double(), want)


@pytest.mark.parametrize("pruning", SETTINGS, ids=str)
def test_batch_equals_singles(model: Any, pruning: trio.Pruning) -> None:
    singles = rows(model, [1, 2, 0, 1])
    unpruned = [run(model, single) for single in singles]
    trio.patch(model, pruning)
    alone = [run(model, single) for single in singles]
    left, right = run(model, pad(singles, "left")), run(model, pad(singles, "right"))
    for index, single in enumerate(alone):
        assert_same(row_of(left, index), single)
        assert_same(row_of(right, index), single)
        pruned = not torch.allclose(single[1], unpruned[index][1], atol=1e-3)
        assert pruned == ("pixel_values" in singles[index])


def test_right_padded_text_without_images(model: Any) -> None:
    singles = rows(model, [0, 0, 0])
    trio.patch(model, SETTINGS[0])
    together = run(model, pad(singles, "right"))
    for index, single in enumerate(singles):
        assert_same(row_of(together, index), run(model, single))


@pytest.mark.parametrize(("pruning", "images"), [*zip(SETTINGS[:3], (1, 3, 1), strict=True)])
def test_decoding_equals_recomputing_without_a_cache(
    model: Any, pruning: trio.Pruning, images: int
) -> None:
    (single,) = rows(model, [images], seed=1)
    trio.patch(model, pruning)
    new, logits, _ = run(model, single)
    assert_oracle(model, single, pruning, new[0], logits[0])


def test_each_sampled_sequence_follows_its_own_path(model: Any) -> None:
    (single,) = rows(model, [1], seed=2)
    trio.patch(model, SETTINGS[0])
    torch.manual_seed(5)
    options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    sampled = run(model, single, max_new_tokens=4, **options)
    assert len({tuple(row) for row in sampled[0].tolist()}) == 3
    for new, logits in zip(*sampled[:2], strict=True):
        assert_oracle(model, single, SETTINGS[0], new, logits)
    torch.manual_seed(5)
    again = run(model, single, max_new_tokens=4, **options)
    assert_same(again, sampled)


def test_beams_of_a_batch_equal_those_of_singles(model: Any) -> None:
    singles = rows(model, [1, 0, 1], seed=3)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    greedy = [run(model, single)[0] for single in singles]
    trio.patch(model, SETTINGS[0])
    alone = [run(model, single, **options)[0] for single in singles]
    together = run(model, pad(singles, "right"), **options)[0]
    assert torch.equal(together, torch.cat(alone))
    assert any(not torch.equal(beam[0], one[0]) for beam, one in zip(alone, greedy, strict=True))


def test_several_images_under_beams(model: Any) -> None:
    (single,) = rows(model, [2], seed=2)
    trio.patch(model, SETTINGS[0])
    if not repeats_by_prompt(model):
        with pytest.raises(UserError, match="mixes up the images"):
            run(model, single, num_beams=2)
        return
    greedy, logits, _ = run(model, single, max_new_tokens=3)
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    alike, same, _ = run(model, single, max_new_tokens=3, **options)
    assert torch.equal(alike, greedy.expand(3, -1))
    close(same, logits.expand_as(same))


def test_a_beam_is_scored_by_the_tokens_it_holds(model: Any) -> None:
    """Beams swap rows at every step; a cache row left behind would change the score."""
    (single,) = rows(model, [1], seed=4)
    trio.patch(model, SETTINGS[0])
    out = model.generate(
        **single,
        max_new_tokens=6,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = out.sequences[:, single["input_ids"].shape[1] :]
    assert len({tuple(beams) for beams in out.beam_indices[:, :6].tolist()}) > 1
    embeds, layers = present(model, single, SETTINGS[0])
    for tokens, score in zip(new.tolist(), out.sequences_scores, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for step, token in enumerate(tokens):
            logits = recomputed(model, embeds, layers, tokens[:step], True)
            total = total + logits.log_softmax(dim=-1)[token]
        torch.testing.assert_close(score.double(), total, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pruning", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_each_layer_caches_what_the_schedule_leaves(model: Any, pruning: trio.Pruning) -> None:
    singles = rows(model, [1, 2, 0], seed=6)
    trio.patch(model, pruning)
    _, _, cache = run(model, pad(singles, "left"), max_new_tokens=5)
    visual = [64] * LAYERS
    for layer, keep in pruning.stages(64, LAYERS):
        visual[layer:] = [keep] * (LAYERS - layer)
    decoded = 4  # the fifth token is never fed
    for index, single in enumerate(singles):
        ids = single["input_ids"]
        images = int((ids == IMAGE_TOKEN_ID).sum()) // 64
        text = ids.shape[1] - 64 * images
        stored = [lengths[index] for lengths in cached_tokens(cache)]
        assert stored == [text + images * count + decoded for count in visual]
    assert cache.get_seq_length() == max(s["input_ids"].shape[1] for s in singles) + decoded
    if pruning.retention is not None:
        assert abs(sum(visual) / LAYERS - pruning.retention * 64) <= 1


def test_the_users_own_cache(model: Any) -> None:
    one, other, text = rows(model, [1, 2, 0], seed=8)
    trio.patch(model, SETTINGS[0])
    wanted = [run(model, batch) for batch in (one, other, text)]
    cache = DynamicCache()
    for batch, want in zip(
        (one, other, one, text), [*wanted[:2], wanted[0], wanted[2]], strict=True
    ):
        got = run(model, batch, cache=cache)
        assert got[2] is cache
        assert_same(got, want)
        assert cache.get_seq_length() == batch["input_ids"].shape[1] + 5
        cache.reset()


def test_a_conversation_goes_on_from_its_cache(model: Any) -> None:
    (single,) = rows(model, [1], seed=9)
    trio.patch(model, SETTINGS[0])
    new, _, cache = run(model, single)
    question = torch.tensor([[20, 21, 22, 23]])
    ids = torch.cat([single["input_ids"], new, question], dim=1)
    follow = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answer, logits, _ = run(model, follow, cache=cache)
    path = torch.cat([new, question, answer], dim=1)[0]
    embeds, layers = present(model, single, SETTINGS[0])
    for step, got in enumerate(logits[0]):
        so_far = path[: new.shape[1] + 4 + step].tolist()
        want = recomputed(model, embeds, layers, so_far, True)
        close(got.double(), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_follow_ups_of_different_lengths(model: Any, side: str) -> None:
    singles = rows(model, [1, 2], seed=10)
    questions = [torch.tensor([[20, 21, 22]]), torch.tensor([[30]])]
    trio.patch(model, SETTINGS[0])
    alone = []
    for single, question in zip(singles, questions, strict=True):
        new, _, cache = run(model, single)
        alone.append(run(model, follow_up(single, new, question), cache=cache))
    batch = pad(singles, "left")
    new, _, cache = run(model, batch)
    asked = pad([{"input_ids": ids} for ids in questions], side)
    both = follow_up(batch, new, asked["input_ids"], asked["attention_mask"])
    together = run(model, both, cache=cache)
    for index, wanted in enumerate(alone):
        assert_same(row_of(together, index), wanted)


def test_a_second_patch_replaces_the_first(model: Any) -> None:
    (single,) = rows(model, [1], seed=11)
    first = run(trio.patch(model, SETTINGS[0]), single)
    second = run(trio.patch(model, SETTINGS[2]), single)
    assert_same(second, run(trio.patch(tiny_llava(layers=LAYERS), SETTINGS[2]), single))
    assert not torch.allclose(first[1], second[1], atol=1e-3)
    assert_same(run(trio.patch(model, SETTINGS[0]), single), first)


def test_rows_that_stop_early(model: Any) -> None:
    singles = rows(model, [1, 1, 2], seed=13)
    trio.patch(model, SETTINGS[0])
    free = [run(model, single)[0][0].tolist() for single in singles]
    stop = free[0][2]
    assert free[0].index(stop) < 5
    together = run(model, pad(singles, "right"), eos_token_id=stop)[0].tolist()
    for row, tokens in zip(together, free, strict=True):
        wanted = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert row == wanted + [0] * (len(row) - len(wanted))


def test_half_precision(model: Any) -> None:
    batch = pad(rows(model, [1, 2], seed=14), "left")
    trio.patch(model, SETTINGS[0])
    wanted = run(model, batch)[1][:, 0].softmax(dim=-1)
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    got = run(model, batch)[1][:, 0].softmax(dim=-1)
    assert (got - wanted).abs().max() < 0.1


def test_a_sliding_window_bounds_a_pruned_prompt() -> None:
    model = tiny_llava(layers=4, family="mistral", sliding_window=100)
    short, long = rows(model, [1, 2], seed=16)
    trio.patch(model, trio.Pruning(schedule="1:10"))
    run(model, short)
    for batch, tokens in ((long, 2), (short, 40)):
        with pytest.raises(UserError, match="window of 100"):
            run(model, batch, max_new_tokens=tokens)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_decoders(family: Any) -> None:
    model = tiny_llava(layers=4, family=family)
    singles = rows(model, [1, 2, 0], seed=15)
    trio.patch(model, trio.Pruning(schedule="1:10,2:3"))
    together = run(model, pad(singles, "right"))
    for index, single in enumerate(singles):
        assert_same(row_of(together, index), run(model, single))
