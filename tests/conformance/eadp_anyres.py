"""Replay of EADP over tiles: importance, the budget of each tile, the choice, and what of it enters
the decoder in which order.

Shapes: B tiles of all images, I images, N patches of a tile, C size of visual features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import unpad_image

from tests.conformance.checks import Checks
from tests.conformance.eadp import (
    MATCHES,
    check_importance,
    check_matches,
    grids_of,
    kept_texts,
    settings_of,
)
from tests.conformance.files import Case, Tensors
from trio.errors import UserError
from trio.pruning.relevance import (
    Grid,
    Trace,
    importance,
    select,
    select_by_tile,
    share_down,
    tile_shares,
)

_NEWLINE = -1


def replay(case: Case, recorded: Tensors) -> Checks:
    """Score and choose from the recorded inputs, and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    checks = Checks()
    features_BNC, tiles = recorded["image_features"], recorded["tiles_per_image"].tolist()
    _check_facts(case, recorded, checks, tiles)
    alike = len(set(tiles)) == 1 and tiles[0] > 1
    settings = settings_of(case, scaled_over="image" if alike else "tile")
    grid = _tile_grid(case, features_BNC.shape[1])
    texts = recorded["text_embeds_seq"], recorded["text_embeds"]
    traces, final = [], []
    for own_KND in recorded["image_embeds"].split(tiles):
        trace = Trace()
        grids = [grid] * len(own_KND)
        final.append(importance(own_KND.flatten(0, 1), *texts, grids, settings, trace=trace))
        traces.append(trace)
    names = [name for name in MATCHES if name != "filtered_local_sim"]
    check_matches([own for trace in traces for own in trace.matches], recorded, checks, names)
    checks.equal("text_tokens_kept", kept_texts(traces[0]), case.fact("text_tokens_kept"))
    check_importance(traces, final, recorded, checks)
    _check_choice(case, recorded, checks, final, tiles, alike=alike)
    return checks


def _tile_grid(case: Case, tokens: int) -> Grid:
    """Of a tile; one row, which is not smoothed, where it is no square."""
    grids = grids_of(tokens) or [(1, tokens)]
    if len(grids) > 1:
        raise UserError(f"case {case.name}: a tile of {tokens} tokens is several grids")
    return grids[0]


def _check_facts(case: Case, recorded: Tensors, checks: Checks, tiles: list[int]) -> None:
    checks.equal("tiles", tiles, case.fact("tiles"))
    checks.equal("images", len(tiles), case.fact("images"))
    checks.equal("local_grid", recorded["local_grid"], case.fact("local_grid_columns_rows"))
    for name, facts in {
        "image_features": ("tokens_per_tile", "C"),
        "image_embeds": ("tokens_per_tile", "D"),
        "text_embeds": ("M", "D"),
        "text_embeds_seq": ("M", "L", "D"),
    }.items():
        sizes = [case.fact(fact) for fact in facts]
        checks.equal(name, list(recorded[name].shape)[-len(sizes) :], sizes)


def _check_choice(
    case: Case,
    recorded: Tensors,
    checks: Checks,
    final: Sequence[Tensor],
    tiles: list[int],
    *,
    alike: bool,
) -> None:
    features_BNC, each = recorded["image_features"], case.fact("visual_token_num")
    final_BN = torch.cat(list(final)).view(features_BNC.shape[:2])
    tokens = final_BN.shape[1]
    checks.close(
        "tile_importance", final_BN.sum(dim=1) / tokens, recorded["tile_importance"] / tokens
    )
    if alike:
        _check_shares(recorded, checks, final, tokens, each)
    orders = [
        order
        for own_N, own_KNC in zip(final, features_BNC.split(tiles), strict=True)
        for order in _orders(own_N, own_KNC, each, alike=alike)
    ]
    quotas = [len(order) for order in orders]
    checks.equal("token_quotas", quotas, recorded["token_quotas"])
    checks.equal("quotas", quotas, case.fact("quotas"))
    checks.equal("kept_by_selection", sum(quotas), case.fact("kept_by_selection"))
    mask_BN = torch.zeros_like(recorded["index_mask"])
    for tile, order in enumerate(orders):
        checks.equal(f"select_idx_{tile}", order, recorded[f"select_idx_{tile}"])
        mask_BN[tile, order] = 1
    checks.equal("index_mask", mask_BN, recorded["index_mask"])
    sequences = []
    for image, kept_KN in enumerate(mask_BN.bool().split(tiles)):
        sequences.append(_sequence(_Layout.of(case, recorded, image), kept_KN))
        _check_sequence(recorded, checks, image, sequences[-1], features_BNC.split(tiles)[image])
    checks.equal("visual_tokens_out", [len(s) for s in sequences], case.fact("visual_tokens_out"))
    newlines = [int((s == _NEWLINE).sum()) for s in sequences]
    checks.equal("newline_tokens", newlines, case.fact("newline_tokens"))


def _check_shares(
    recorded: Tensors, checks: Checks, final: Sequence[Tensor], tokens: int, each: int
) -> None:
    parts = []
    for own_N in final:
        sizes = [tokens] * (len(own_N) // tokens)
        parts.append(tile_shares(own_N, sizes, each * len(sizes)))
    budget = each * len(parts[0])
    checks.close("tile_share", torch.cat(parts) / budget, recorded["tile_share"] / budget)


def _orders(own_N: Tensor, features_KNC: Tensor, each: int, *, alike: bool) -> Sequence[Tensor]:
    """Of an image's tiles."""
    tiles, tokens, _ = features_KNC.shape
    if not alike:
        return list(select(own_N.view(tiles, tokens), features_KNC, min(each, tokens)))
    sizes, budget = [tokens] * tiles, each * tiles
    order = select_by_tile(own_N, features_KNC.flatten(0, 1), sizes, budget, share_down)
    return [own % tokens for own in order.split(share_down(own_N, sizes, budget))]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """How the tiles of an image make one sequence."""

    edge: int
    """Patches along the edge of a tile."""
    columns: int
    """Local tiles beside each other."""
    size: tuple[int, int]
    """Height and width of the image, in pixels."""
    newlines: bool
    """Whether padding is cut off and each row ends in a newline."""

    @classmethod
    def of(cls, case: Case, recorded: Tensors, image: int) -> _Layout:
        width, height = recorded["image_sizes"][image].tolist()
        return cls(
            edge=case.fact("tile_side"),
            columns=int(recorded["local_grid"][image, 0]),
            size=(height, width),
            newlines=case.fact("newline_and_unpad"),
        )


def _sequence(layout: _Layout, kept_KN: Tensor) -> Tensor:
    """What of an image enters the decoder: index among its tiles' patches, or newline."""
    tiles, tokens = kept_KN.shape
    index_KN = torch.arange(tiles * tokens).view(tiles, tokens).where(kept_KN, -2)
    newline = torch.full((1,), _NEWLINE)
    whole, local = index_KN[0], index_KN[1:]
    if tiles == 1:
        parts = [whole, *([newline] if layout.newlines else [])]
    else:
        parts = [whole, *_rows(layout, local, newline)]
    found = torch.cat(parts)
    return found[found != -2]


def _rows(layout: _Layout, local_KN: Tensor, newline: Tensor) -> list[Tensor]:
    """Rows of the picture that the local tiles make; chosen patches of its padding are lost."""
    edge, columns = layout.edge, layout.columns
    picture = local_KN.view(-1, columns, edge, edge).transpose(1, 2).reshape(-1, columns * edge)
    if not layout.newlines:
        return [picture.flatten()]
    unpadded = unpad_image(picture[None], torch.tensor(layout.size))[0]
    return [part for row in unpadded for part in (row, newline)]


def _check_sequence(
    recorded: Tensors, checks: Checks, image: int, sequence: Tensor, features_KNC: Tensor
) -> None:
    checks.equal(f"visual_source_{image}", sequence, recorded[f"visual_source_{image}"])
    newline = recorded.get("image_newline")
    rows = features_KNC.flatten(0, 1)
    rows = torch.cat((rows, torch.zeros(1, rows.shape[1]) if newline is None else newline[None]))
    head = recorded[f"visual_tokens_head_{image}"]
    checks.close(f"visual_tokens_head_{image}", rows[sequence[: len(head)]], head)
