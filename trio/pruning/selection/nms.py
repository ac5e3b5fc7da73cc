"""Non-maximum suppression in feature space, and fill-up.

TRIO (arXiv 2602.04657): walk down the saliency order, keep a token unless its cosine with a kept
one reaches the threshold, stop at K. What is then missing is filled up, see `farthest`. Both go
over one product of an image's features with each other: on a GPU in one launch for all images, on a
CPU with all images of a chunk side by side.

Shapes: N images, V visual tokens of the widest image, K tokens kept at most, T packed tokens, D
hidden size.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from trio.decoder.gpu import on_gpu
from trio.pruning.selection.farthest import SALIENT
from trio.pruning.selection.nms_host import Rows, SimilarityMatrix, SimilarityRows, greedy

# Of features [N, V, D] and similarities [N, V, V] held at a time. An image that alone takes more
# has its rows worked out as they are needed.
_BYTES, _BYTES_ON_DEVICE = 16 << 20, 3 << 29
# Tokens that one program of the kernel holds in its registers, a power of two.
_MOST_ON_DEVICE = 16_384
_log = logging.getLogger(__name__)


def suppress_and_fill_up(
    features_TD: Tensor,
    coordinates_T2: Tensor,
    index_NV: Tensor,
    count_N: Tensor,
    keep_N: Tensor,
    order_NV: Tensor,
    most_kept: int,
    threshold: float,
    rule: str,
) -> Tensor:
    """As many tokens of each image as it is to keep.

    Cosines are in float32 or better. All tensors lie on one device, and of a GPU nothing is read
    back, unless Triton is missing or an image has more than 16,384 tokens, or 1.5 GiB of float32
    features and cosines; a log line says so.

    Args:
        features_TD: packed features.
        coordinates_T2: where in its picture each token lies, in edges of a square as large as the
            picture; all alike where that is unknown.
        index_NV: packed index of each image's tokens; past its count that of its last.
        count_N: visual tokens of each image.
        keep_N: tokens to keep of each, at most its count.
        order_NV: for each image its local indices, most salient first; past its count the others of
            `0 … V-1`.
        most_kept: the largest of `keep_N`, on the host.
        threshold: cosine from which a token is suppressed.
        rule: as `fill_up` in `trio.Pruning`.

    Returns:
        `[N, K]`, for each image the kept local indices, rising; past its own number others.
    """
    most = order_NV.shape[1]
    index_NV = index_NV.gather(1, order_NV)
    fitting = _fitting(features_TD, most)
    choose = _launch if fitting and _has_kernel(features_TD) else _on_host
    parts = [x_N.split(max(1, fitting)) for x_N in (index_NV, order_NV, count_N, keep_N)]
    stays = [
        choose(features_TD, coordinates_T2, index, order, count, keep, threshold, rule)
        for index, order, count, keep in zip(*parts, strict=True)
    ]
    stays_NV = stays[0] if len(stays) == 1 else torch.cat(stays)
    return stays_NV.sort(dim=1, descending=True, stable=True).indices[:, :most_kept]


def _fitting(features_TD: Tensor, most: int) -> int:
    """Images of so many tokens that are worked on at a time; 0 where one is too large."""
    size = 4 * most * (most + features_TD.shape[1])
    if not on_gpu(features_TD):
        return _BYTES // size
    fitting = _BYTES_ON_DEVICE // size if most <= _MOST_ON_DEVICE else 0
    if not fitting:
        _say_too_large()
    return fitting


@functools.cache
def _say_too_large() -> None:
    """Once in a process."""
    _log.warning("an image has too many tokens for the GPU's kernel: the host chooses among them")


def _has_kernel(features_TD: Tensor) -> bool:
    return on_gpu(features_TD) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _log.warning("Triton is missing: the host chooses tokens from cosines that the GPU gives")
    return found


def _launch(
    features_TD: Tensor,
    coordinates_T2: Tensor,
    index_NV: Tensor,
    order_NV: Tensor,
    count_N: Tensor,
    keep_N: Tensor,
    threshold: float,
    rule: str,
) -> Tensor:
    """Which tokens stay, uint8 `[N, V]` by local index, by the kernel."""
    from trio.pruning.selection import nms_kernel

    own_NVD = features_TD[index_NV]
    return nms_kernel.launch(
        _products(own_NVD),
        torch.linalg.vector_norm(own_NVD, dim=2, dtype=torch.float32),
        coordinates_T2[index_NV],
        order_NV,
        count_N,
        keep_N,
        threshold,
        SALIENT[rule],
    )


def _products(own_NVD: Tensor) -> Tensor:
    """Float32 `[N, V, V]`, from half precision on tensor cores: its products are exact there."""
    if own_NVD.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(own_NVD, own_NVD.mT, out_dtype=torch.float32)
    return torch.bmm(own_NVD, own_NVD.mT).float()


def _on_host(
    features_TD: Tensor,
    coordinates_T2: Tensor,
    index_NV: Tensor,
    order_NV: Tensor,
    count_N: Tensor,
    keep_N: Tensor,
    threshold: float,
    rule: str,
) -> Tensor:
    """The same, chosen on the host."""
    counts, keeps = count_N.cpu().numpy(), keep_N.cpu().numpy()
    index_NV = index_NV[:, : int(counts.max())]
    similar: Rows
    if _fitting(features_TD, index_NV.shape[1]):
        similar = SimilarityMatrix.of(features_TD, coordinates_T2, index_NV)
    else:
        similar = SimilarityRows(features_TD, coordinates_T2, index_NV)
    taken = torch.from_numpy(greedy(similar, counts, keeps, threshold, SALIENT[rule]))
    taken = taken.byte().to(order_NV.device)
    stays_NV = torch.zeros_like(order_NV, dtype=torch.uint8)
    return stays_NV.scatter_(1, order_NV[:, : taken.shape[1]], taken)
