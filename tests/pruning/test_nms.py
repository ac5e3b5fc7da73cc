"""Suppression and fill-up against the sequential walk over a full cosine matrix."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pruning.nms_cases import draw
from trio.decoder import gpu
from trio.pruning import reference
from trio.pruning.method import packed_index
from trio.pruning.options import FILL_UPS
from trio.pruning.selection import nms
from trio.pruning.selection.nms_host import SimilarityRows


def suppress(
    features: Tensor,
    starts: list[int],
    counts: list[int],
    orders: list[list[int]],
    keeps: list[int],
    threshold: float,
    fill_up: str = "reference",
    coordinates: Tensor | None = None,
) -> list[list[int]]:
    width = max(counts)
    order_NV = torch.tensor([[*order, *range(len(order), width)] for order in orders])
    device = features.device
    coordinates = (
        torch.zeros(len(features), 2, device=device) if coordinates is None else coordinates
    )
    start_N, count_N, keep_N = torch.tensor([starts, counts, keeps], device=device)
    kept_NK = nms.suppress_and_fill_up(
        features,
        coordinates,
        packed_index(start_N, count_N, width)[0],
        count_N,
        keep_N,
        order_NV.to(device),
        max(keeps),
        threshold,
        fill_up,
    )
    return [own[:n] for own, n in zip(kept_NK.tolist(), keeps, strict=True)]


def clustered(count: int, clusters: int, noise: float, seed: int) -> Tensor:
    """Tokens around a few directions, so that many pairs are near duplicates."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 16, generator=generator)
    which = torch.randint(clusters, (count,), generator=generator)
    return centres[which] + noise * torch.randn(count, 16, generator=generator)


@pytest.fixture(params=["matrix", "rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How cosines are worked out: at once, or as of a large image some rows at a time."""
    if request.param == "rows":
        monkeypatch.setattr(nms, "_BYTES", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fill_up", FILL_UPS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 200), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(2, 40),
)
def test_equals_the_sequential_walk(
    fill_up: str, seed: int, counts: list[int], share: float, clusters: int
) -> None:
    """Several images at once; 200 tokens are more than three rounds, and with few clusters large
    budgets need the fill-up."""
    generator = torch.Generator().manual_seed(seed)
    keeps = [max(1, round(share * count)) for count in counts]
    starts = [3 + sum(counts[:index]) + index for index in range(len(counts))]
    features = torch.randn(starts[-1] + counts[-1], 16, generator=generator)
    coordinates = torch.rand(len(features), 2, generator=generator)
    orders = [torch.randperm(count, generator=generator).tolist() for count in counts]
    for start, count in zip(starts, counts, strict=True):
        features[start : start + count] = clustered(count, clusters, 0.35, seed)
    got = suppress(features, starts, counts, orders, keeps, 0.8, fill_up, coordinates)
    for start, count, order, keep, own in zip(starts, counts, orders, keeps, got, strict=True):
        features_VD, places = (all_T[start : start + count] for all_T in (features, coordinates))
        assert own == reference.walk(features_VD, order, keep, 0.8, fill_up, places)
        assert len(own) == keep


def test_fill_up_takes_the_same_order_again() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 0.02]])
    order = [3, 1, 0, 2]
    assert suppress(features, [0], [4], [order], [2], 0.8) == [[2, 3]]  # 1 and 0 are like 3
    assert suppress(features, [0], [4], [order], [3], 0.8) == [[1, 2, 3]]  # 1 comes before 0


def test_fill_up_takes_what_is_least_like_the_kept() -> None:
    degrees = torch.tensor([0.0, 4.0, 8.0, 20.0, 90.0, 4.0]).deg2rad()
    features = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    order = [0, 1, 2, 3, 4, 5]
    picks = [suppress(features, [0], [6], [order], [n], 0.8, "mixed")[0] for n in (3, 4, 5, 6)]
    # 0 and 4 are unlike each other, and 3 is the farthest from them, 20 degrees from 0; then 2 is 8
    # degrees from 0. Of four missing one is taken by saliency.
    assert picks == [[0, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_fill_up_takes_what_lies_far_from_the_kept() -> None:
    features = torch.ones(5, 4)
    coordinates = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.2, 0.2], [0.9, 0.1], [0.5, 0.9]])
    order = [0, 1, 2, 3, 4]
    picks = [
        suppress(features, [0], [5], [order], [n], 0.8, "mixed", coordinates)[0] for n in (1, 2, 3)
    ]
    assert picks == [[0], [0, 4], [0, 3, 4]]


def test_fill_up_goes_on_among_equal_tokens_and_zeros() -> None:
    features = torch.cat([torch.ones(5, 4), torch.zeros(5, 4)])
    order = list(range(10))
    for keep in range(1, 11):
        (got,) = suppress(features, [0], [10], [order], [keep], 0.8, "mixed")
        assert len(set(got)) == keep


def test_the_threshold_itself_suppresses() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert suppress(features, [0], [3], [[0, 1, 2]], [2], 1.0) == [[0, 2]]
    assert suppress(features, [0], [3], [[0, 2, 1]], [2], 0.5) == [[0, 2]]


@pytest.mark.parametrize("fill_up", FILL_UPS)
def test_half_precision_features_are_compared_in_float32(fill_up: str) -> None:
    features = clustered(300, 10, 0.3, 5).bfloat16()
    order = list(range(300))
    (got,) = suppress(features, [0], [300], [order], [60], 0.8, fill_up)
    assert got == reference.walk(features.float(), order, 60, 0.8, fill_up)


def test_ties_go_to_the_more_salient() -> None:
    """By loops, for all that ties exactly: copies, zeros, one token, one place."""
    for seed in range(12):
        case = draw(seed, 60)
        for image, kept in enumerate(case.choice()):
            assert kept == case.by_the_book(image), seed


def test_chunks_choose_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(5, 128)
    expected = case.choice()
    assert len(expected) > 1
    most = case.order_NV.shape[1]
    monkeypatch.setattr(nms, "_BYTES", 4 * most * (most + 16))
    assert case.choice() == expected


def test_equal_tokens_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a large image are worked out ahead of the choice, also among ties."""
    calls, rows = [], SimilarityRows.most

    def counted(self: SimilarityRows, image: int, slots: np.ndarray) -> np.ndarray:
        calls.append(len(slots))
        return rows(self, image, slots)

    case = replace(draw(3000, 1000, exactly=True), keep_N=torch.tensor([400]), rule="mixed")
    monkeypatch.setattr(nms, "_BYTES", 0)
    monkeypatch.setattr(SimilarityRows, "most", counted)
    (kept,) = case.choice()
    assert len(kept) == 400
    assert len(calls) <= 30, len(calls)


def test_an_image_too_large_for_the_kernel_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = draw(5, 128)
    expected = case.choice()
    monkeypatch.setattr(gpu, "_pretended", True)
    monkeypatch.setattr(nms, "_MOST_ON_DEVICE", 16)
    nms._say_too_large.cache_clear()
    with caplog.at_level(logging.WARNING, "trio"):
        assert case.choice() == case.choice() == expected
    (record,) = caplog.records
    assert "too many tokens for the GPU's kernel" in record.message


@pytest.mark.parametrize("fill_up", FILL_UPS)
def test_what_is_not_finite_still_keeps_so_many(fill_up: str) -> None:
    features = clustered(90, 5, 0.3, 1)
    features[7], features[8, 2], features[9] = torch.nan, torch.inf, 0
    (kept,) = suppress(features, [0], [90], [list(range(90))], [50], 0.8, fill_up)
    assert len(set(kept)) == 50


def interpreted(*cases: str) -> None:
    """The kernel in Triton's interpreter against the host's way, on `nms_cases`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.pruning.nms_cases", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")
def test_the_kernel_chooses_as_the_host_does() -> None:
    interpreted("0,300,128", "1000,20,576", "2000,2,4096")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")
def test_the_kernel_chooses_as_the_host_does_in_thousands_of_cases() -> None:
    interpreted("10000,3000,128")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")
def test_the_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    from tests.pruning import nms_compiled

    nms_compiled.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fill_up", FILL_UPS)
def test_a_gpu_chooses_as_the_sequential_walk(fill_up: str) -> None:
    features = clustered(900, 60, 0.35, 1)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(2))
    coordinates = torch.rand(900, 2, generator=torch.Generator().manual_seed(3))
    (kept,) = suppress(
        features.cuda(), [0], [900], [order.tolist()], [200], 0.8, fill_up, coordinates.cuda()
    )
    assert kept == reference.walk(features, order.tolist(), 200, 0.8, fill_up, coordinates)
