"""The reduction in the towers of the Qwen-VL families: attention that is read, and what is left.

The oracle for attention is an implementation of it that the towers run with and that keeps all
probabilities; that for their order is the function of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import AttentionInterface
from transformers.vision_utils import get_vision_window_index

from tests.engine.support import MANY_SIZES, picture
from tests.tiny.flop_counter import counter
from tests.tiny.qwen2_5_vl import tiny_qwen, tiny_qwen_processor
from tests.tiny.qwen3_vl import tiny_qwen3, tiny_qwen3_processor
from trio.benchmark.shapes.sizes import blueprint
from trio.encoders import received_attention as received
from trio.encoders.received_attention import attention_received
from trio.errors import UserError
from trio.families import qwen_vision as grids
from trio.families.adapter import Features
from trio.families.qwen_vision import GridAdapter
from trio.families.registry import adapt
from trio.pruning.options import Pruning

PICTURES = [picture(number, size) for number, size in enumerate(MANY_SIZES)]


@dataclass(frozen=True)
class Kind:
    """A family: its tiny model, its processor, and the blocks of the tower that are read."""

    model: Callable[..., Any]
    processor: Any
    scanned: tuple[int, int]

    @cached_property
    def adapter(self) -> GridAdapter:
        adapter = adapt(self.model(layers=2, spread=0.4))
        assert isinstance(adapter, GridAdapter)
        return adapter

    @cached_property
    def singles(self) -> list[dict[str, Tensor]]:
        return self.adapter.process_images(self.processor, PICTURES)  # type: ignore[return-value]

    @cached_property
    def counts(self) -> list[int]:
        return [self.adapter.visual_tokens(image)[0] for image in self.singles]


KINDS = {
    "qwen2_5_vl": Kind(tiny_qwen, tiny_qwen_processor(), (1, 3)),
    "qwen3_vl": Kind(tiny_qwen3, tiny_qwen3_processor(), (0, 4)),
}


@pytest.fixture(params=KINDS)
def kind(request: Any) -> Kind:
    return KINDS[request.param]


@contextmanager
def dense(tower: Any) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """All probabilities `[H, S, S]` of each attention module, piece by piece."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        shares = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
        seen.setdefault(module, []).append(shares[0])
        return (shares @ value).transpose(1, 2), shares

    before = tower.config._attn_implementation
    AttentionInterface.register("dense_for_tests", attend)
    tower.set_attn_implementation("dense_for_tests")
    try:
        yield seen
    finally:
        tower.set_attn_implementation(before)


def by_token(kind: Kind, shares: list[Tensor], grid: Tensor) -> Tensor:
    """Attention received by the tokens of one image, row by row, from all its probabilities."""
    (share,) = shares
    rows, columns = grid.tolist()
    order = torch.arange(rows * columns // 4)
    if kind.model is tiny_qwen:
        whole = torch.tensor([[1, rows, columns]])
        order, _ = get_vision_window_index(
            whole, spatial_merge_size=2, window_size=32, patch_size=4
        )
    received_S = share.double().mean(dim=1).sum(dim=0)
    return received_S.view(-1, 4).mean(dim=1)[order.argsort()]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Of each image what the choice is made by."""
    found: list[tuple[Tensor, Tensor]] = []
    own = grids.scanned

    def scanned(shallow_1N: Tensor, deep_1N: Tensor, *args: Any) -> Tensor:
        found.append((shallow_1N[0], deep_1N[0]))
        return own(shallow_1N, deep_1N, *args)

    monkeypatch.setattr(grids, "scanned", scanned)
    return found


@pytest.mark.parametrize("chunk", [1 << 24, 1000])
def test_attention_is_that_of_the_tower_image_by_image_and_in_one_pass(
    kind: Kind, read: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(received, "_CHUNK", chunk)
    adapter = kind.adapter
    inputs = [image for image, count in zip(kind.singles, kind.counts, strict=True) if count > 1]
    adapter.encode_images(inputs, "scan", [1] * len(inputs))
    together = list(read)
    tower = adapter.model.model.visual
    for image, own in zip(inputs, together, strict=True):
        read.clear()
        with dense(tower) as seen:
            adapter.encode_images([image], "scan", [1])
        (alone,) = read
        for block, got, single in zip(kind.scanned, own, alone, strict=True):
            shares = seen[tower.blocks[block].attn]
            wanted = by_token(kind, shares, image["image_grid_thw"][0, 1:]).float()
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(single, wanted, atol=1e-5, rtol=1e-4)
    assert max(float(deep.std() / deep.mean()) for _, deep in together) > 0.1


def test_pieces_are_those_that_the_tower_attends_in() -> None:
    """A block of Qwen2.5-VL that attends within windows: queries of the same window count."""
    kind = KINDS["qwen2_5_vl"]
    tower = kind.adapter.model.model.visual
    with dense(tower) as seen, attention_received([tower.blocks[0].attn]) as found:
        kind.adapter.encode_images(kind.singles)
    shares = seen[tower.blocks[0].attn]
    assert len(shares) > len(kind.singles)
    wanted = torch.cat([share.mean(dim=1).sum(dim=0) for share in shares])
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_matrix_of_all_pairs_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "_CHUNK", 1 << 14)
    query, key = torch.randn(2, 1000, 2, 8)
    with Largest() as largest:
        got = received.received(query, key, 0.5)
    assert largest.numbers <= 1 << 14 < 2 * 1000**2
    scores = torch.einsum("qhe,khe->hqk", query.double(), key.double()) * 0.5
    torch.testing.assert_close(got, scores.softmax(dim=-1).mean(dim=1).sum(dim=0).float())


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_stays(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, keeps = kind.adapter, [1] * len(kind.singles)
    before = hooks_of(adapter.model)
    adapter.encode_images(kind.singles, "scan", keeps)
    assert hooks_of(adapter.model) == before

    def fails(*args: Any) -> Tensor:
        assert hooks_of(adapter.model) == before + 4
        raise RuntimeError("out of memory")

    monkeypatch.setattr(received, "received", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapter.encode_images(kind.singles, "scan", keeps)
    assert hooks_of(adapter.model) == before


def merged_in_a_loop(features: Tensor, kept: tuple[int | None, ...], layer: Tensor) -> Tensor:
    """Rows of `layer`, each row averaged into that of the kept token nearest to its own."""
    places = [token for token in kept if token is not None]
    groups: dict[int, list[int]] = {token: [] for token in places}
    for token, row in enumerate(features.double()):
        near = torch.cosine_similarity(row[None], features[places].double(), dim=1)
        groups[token if token in groups else places[int(near.argmax())]].append(token)
    return torch.stack([layer[own].double().mean(dim=0) for own in groups.values()]).float()


def assert_reduced(whole: Features, got: Features, keep: int) -> None:
    kept = got.sources
    assert len(got) == len(kept) == keep
    assert all(type(token) is int for token in kept)
    assert list(kept) == sorted({token for token in kept if token is not None})
    for mine, all_of_it in zip(
        (got.tokens, *got.injected), (whole.tokens, *whole.injected), strict=True
    ):
        wanted = merged_in_a_loop(whole.tokens, kept, all_of_it)
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_dropped_tokens_are_averaged_into_the_nearest_kept_one(kind: Kind, share: float) -> None:
    keeps = [max(1, int(share * count)) for count in kind.counts]
    whole = kind.adapter.encode_images(kind.singles)
    reduced = kind.adapter.encode_images(kind.singles, "scan", keeps)
    for image, got, keep in zip(whole, reduced, keeps, strict=True):
        assert_reduced(image, got, keep)


def test_all_that_is_kept_is_as_it_was(kind: Kind) -> None:
    whole = kind.adapter.encode_images(kind.singles)
    kept = kind.adapter.encode_images(kind.singles, "scan", kind.counts)
    for image, got, count in zip(whole, kept, kind.counts, strict=True):
        assert torch.equal(got.tokens, image.tokens)
        assert all(map(torch.equal, got.injected, image.injected))
        assert got.sources == tuple(range(count))


def test_half_precision_is_kept_and_merged_in_float32(kind: Kind) -> None:
    adapter = adapt(kind.model(layers=2, spread=0.4, dtype=torch.bfloat16))
    (whole,) = adapter.encode_images(kind.singles[:1])
    (got,) = adapter.encode_images(kind.singles[:1], "scan", [12])
    assert got.tokens.dtype == torch.bfloat16
    wanted = merged_in_a_loop(whole.tokens.float(), got.sources, whole.tokens.float())
    torch.testing.assert_close(got.tokens.float(), wanted, atol=2e-2, rtol=2e-2)


def test_layers_of_published_shapes() -> None:
    for name, scanned in (("qwen2.5-vl-7b", (7, 31)), ("qwen3-vl-8b", (5, 26))):
        adapter = adapt(blueprint(name))
        assert isinstance(adapter, GridAdapter) and adapter._scanned() == scanned


def test_without_a_class_token_there_is_only_the_scan(kind: Kind) -> None:
    with pytest.raises(UserError, match=r"encoder visionzip is not available .* none, scan"):
        kind.adapter.settle(Pruning(retention=0.2, encoder="visionzip"))


def test_what_never_drops_a_token_runs_without_the_reduction(kind: Kind) -> None:
    assert kind.adapter.settle(Pruning(retention=1, encoder="scan")).encoder == "none"
    assert kind.adapter.settle(Pruning(retention=0.3, encoder="scan")).encoder == "scan"


def test_the_scan_costs_what_its_operations_add_up_to(kind: Kind) -> None:
    adapter = kind.adapter
    shape = adapter._vision_shape()
    for image, count in zip(kind.singles[::2], kind.counts[::2], strict=True):
        rows, columns = image["image_grid_thw"][0, 1:].tolist()
        for keep in {1, (count + 1) // 2, count}:
            with torch.no_grad(), counter() as operations:
                adapter.encode_images([image], "scan", [keep])
            tower = adapter.vision_flops(image) - shape.attention_flops(rows, columns)
            counted = shape.scan_flops(rows, columns, keep)
            assert operations.get_total_flops() == 2 * (tower + counted)
