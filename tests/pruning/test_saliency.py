"""The short way to the saliency against the textbook one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny.llava import Family, tiny_llava
from trio.decoder.decoder import Decoder
from trio.pruning import reference
from trio.pruning.scores import tiled_attention as keys
from trio.pruning.scores.layer_gradient import LayerGradient
from trio.pruning.scores.saliency import Saliency, proxy_rows, saliency

LAYER = 2


def score(
    model: Any,
    hidden_TD: Tensor,
    lengths: tuple[int, ...],
    rows: str = "reference",
    wanted: list[tuple[int, int]] | None = None,
    proxy_head: str = "output",
) -> Saliency:
    decoder = Decoder(model.model.language_model, model.lm_head)
    positions = torch.cat([torch.arange(n) for n in lengths])
    proxy = LayerGradient(decoder, LAYER, proxy_head)
    return saliency(proxy, hidden_TD, positions, lengths, rows, wanted)


def by_the_book(
    model: Any,
    hidden_TD: Tensor,
    lengths: tuple[int, ...],
    rows: str = "reference",
    dtype: torch.dtype = torch.float64,
    proxy_head: str = "output",
) -> tuple[list[Tensor], list[Tensor]]:
    text, head = reference.text_parts(model, dtype)
    if proxy_head == "input_embedding":
        head = reference.embedding_head(text)
    scores, losses = [], []
    for hidden in hidden_TD.to(dtype).split(list(lengths)):
        positions = torch.arange(len(hidden))
        own, loss = reference.saliency(text, head, LAYER, hidden, positions, rows)
        scores.append(own)
        losses.append(loss)
    return scores, losses


def hidden_for(lengths: tuple[int, ...], seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 32, generator=generator)


@pytest.mark.parametrize(
    ("family", "kv_heads", "rows"),
    [
        ("llama", 4, "reference"),
        ("mistral", 2, "with_last"),
        ("qwen2", 1, "last"),
        ("qwen3", 2, "reference"),
    ],
)
def test_equals_the_textbook_gradient_of_each_prompt(
    family: Family, kv_heads: int, rows: str
) -> None:
    lengths = (40, 7, 40, 23)
    model = tiny_llava(family=family, kv_heads=kv_heads, layers=4)
    hidden = hidden_for(lengths)
    got = score(model, hidden, lengths, rows)
    expected, losses = by_the_book(model, hidden, lengths, rows)
    for mine, book in zip(got.true_scores(lengths).split(list(lengths)), expected, strict=True):
        torch.testing.assert_close(mine.double(), book, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(got.loss_B.double(), torch.stack(losses), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_embedding_as_head_equals_the_textbook(dtype: torch.dtype) -> None:
    lengths = (40, 7, 23)
    model = tiny_llava(layers=4, dtype=dtype)
    hidden = hidden_for(lengths).to(dtype)
    got = score(model, hidden, lengths, proxy_head="input_embedding")
    expected, losses = by_the_book(model, hidden, lengths, proxy_head="input_embedding")
    for mine, book in zip(got.true_scores(lengths).split(list(lengths)), expected, strict=True):
        torch.testing.assert_close(mine.double(), book, rtol=5e-5, atol=1e-8)
    torch.testing.assert_close(got.loss_B.double(), torch.stack(losses), rtol=1e-5, atol=1e-6)
    other = score(model, hidden, lengths).loss_B
    assert not torch.isclose(got.loss_B, other, rtol=1e-2).any()


@pytest.mark.parametrize("rows", ["reference", "with_last", "last"])
def test_short_prompts_have_fewer_rows(rows: str) -> None:
    model = tiny_llava(layers=4)
    lengths = (1, 2, 3, 4, 5, 12)
    hidden = hidden_for(lengths)
    got = score(model, hidden, lengths, rows)
    expected, _ = by_the_book(model, hidden, lengths, rows)
    for mine, book in zip(got.true_scores(lengths).split(list(lengths)), expected, strict=True):
        torch.testing.assert_close(mine.double(), book, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "tile_tokens", "dtype"),
    [
        ("llama", 1, torch.float32),
        ("qwen3", 7, torch.bfloat16),
        ("llama", 64, torch.bfloat16),
        ("qwen3", 1000, torch.float32),
    ],
)
def test_tiles_of_any_size_give_the_same(
    family: Family, tile_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences cut into several tiles, and several of equal and different lengths in one."""
    monkeypatch.setattr(keys, "_TILE", tile_tokens * 32)
    lengths = (40, 7, 7, 7, 3, 40, 23, 1)
    model = tiny_llava(family=family, layers=4, dtype=dtype)
    hidden = hidden_for(lengths).to(dtype)
    got = score(model, hidden, lengths, "with_last")
    expected, _ = by_the_book(model, hidden, lengths, "with_last")
    for mine, book in zip(got.true_scores(lengths).split(list(lengths)), expected, strict=True):
        torch.testing.assert_close(mine.double(), book, rtol=5e-5, atol=1e-8)


@pytest.mark.parametrize(("family", "tile_tokens"), [("llama", 5), ("qwen3", 1000)])
def test_only_what_is_wanted_is_scored(
    family: Family, tile_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_TILE", tile_tokens * 32)
    lengths = (40, 9, 40, 23)
    wanted = [(3, 30), (0, 9), (36, 40), (8, 21)]  # without rows, with all, with some
    model = tiny_llava(family=family, layers=4)
    hidden = hidden_for(lengths)
    whole = score(model, hidden, lengths).scores_T.split(list(lengths))
    part = score(model, hidden, lengths, wanted=wanted).scores_T.split(list(lengths))
    for all_S, some_S, (start, stop) in zip(whole, part, wanted, strict=True):
        torch.testing.assert_close(some_S[start:stop], all_S[start:stop], rtol=1e-5, atol=1e-9)


def test_rows_are_clamped_and_merged() -> None:
    assert proxy_rows(10, "reference") == [5, 6, 7, 8]
    assert proxy_rows(10, "with_last") == [6, 7, 8, 9]
    assert proxy_rows(10, "last") == [9]
    assert proxy_rows(3, "reference") == [0, 1]
    assert proxy_rows(1, "with_last") == [0]


def test_a_neighbour_changes_nothing_and_no_loss_is_averaged() -> None:
    model = tiny_llava(layers=4)
    lengths = (30, 17, 51)
    hidden = hidden_for(lengths)
    together = score(model, hidden, lengths)
    start = 0
    for number, length in enumerate(lengths):
        alone = score(model, hidden[start : start + length], (length,))
        mine = together.scores_T[start : start + length]
        torch.testing.assert_close(mine, alone.scores_T, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(together.loss_B[number], alone.loss_B[0])
        start += length


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("qwen3", torch.float16)])
def test_half_precision_models_are_scored_in_float32(family: Family, dtype: torch.dtype) -> None:
    lengths = (60, 33)
    model = tiny_llava(family=family, layers=4, dtype=dtype)
    hidden = hidden_for(lengths).to(dtype)
    got = score(model, hidden, lengths)
    assert got.scores_T.dtype == torch.float32
    expected, _ = by_the_book(model, hidden, lengths, dtype=torch.float32)
    for mine, book in zip(got.true_scores(lengths).split(list(lengths)), expected, strict=True):
        torch.testing.assert_close(mine, book, rtol=5e-5, atol=1e-8)
        assert len(set(mine[:-1].tolist())) == len(mine) - 1  # nothing collides
    assert model.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("seed", [1, 2])
def test_a_saturated_loss_still_ranks(seed: int) -> None:
    lengths = (48, 31)
    model = tiny_llava(layers=4, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(2e4)
    hidden = hidden_for(lengths, seed)
    text, head = reference.text_parts(model, torch.float32)
    naive, _ = reference.saliency(text, head, LAYER, hidden[:48], torch.arange(48), "reference")
    assert int(naive.count_nonzero()) == 0  # in float32 the textbook gradient is gone
    got = score(model, hidden, lengths)
    expected = saturated_reference(model, hidden, lengths)
    for mine, book in zip(got.scores_T.split(list(lengths)), expected, strict=True):
        assert torch.isfinite(mine).all()
        size = len(mine) - 1
        assert reference.order(mine[:size])[:12] == reference.order(book[:size])[:12]
        torch.testing.assert_close(
            (mine / mine.max()).double(), book / book.max(), rtol=5e-3, atol=1e-5
        )


def saturated_reference(model: Any, hidden: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """The textbook gradient in float64 of log(loss), which has the direction of that of loss.

    The loss itself is written as log1p(sum of exp(margins)), exact where cross-entropy rounds to
    zero: margins of a row are its logits minus that of the label.
    """
    text, head = reference.text_parts(model, torch.float64)
    scores = []
    for own in hidden.double().split(list(lengths)):
        leaf = own.clone().requires_grad_()
        logits = reference.proxy_logits(text, head, LAYER, leaf, torch.arange(len(leaf)))
        chosen = logits[proxy_rows(len(leaf), "reference")]
        label = chosen.argmax(-1, keepdim=True)
        margins = (chosen - chosen.gather(1, label)).scatter(1, label, -torch.inf)
        log_loss = torch.logsumexp(margins.flatten(), 0)  # log1p(x) = x at this size
        (gradient,) = torch.autograd.grad(log_loss, leaf)
        scores.append(gradient.norm(dim=-1))
    return scores


def test_works_inside_inference_mode_and_leaves_no_gradients() -> None:
    lengths = (20, 9)
    model = tiny_llava(layers=4)
    expected = score(model, hidden_for(lengths), lengths).scores_T
    with torch.inference_mode():
        got = score(model, hidden_for(lengths), lengths).scores_T
    torch.testing.assert_close(got, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_last_token_has_no_say_in_the_reference_rows() -> None:
    got = score(tiny_llava(layers=4), hidden_for((25,)), (25,))
    assert got.scores_T[-1] == 0.0
    assert (got.scores_T[:-1] > 0).all()
