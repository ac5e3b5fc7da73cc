"""Random images whose cosines and distances tie exactly, and how the kernel chooses from them.

A program of its own, `python -m tests.pruning.nms_cases SEED,IMAGES,TOKENS ...`: Triton reads once,
when it is imported, whether its kernels run in its interpreter.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from trio.pruning import reference
from trio.pruning.method import packed_index
from trio.pruning.options import FILL_UPS
from trio.pruning.selection import nms, nms_kernel


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed batch, with the arguments of `suppress_and_fill_up`."""

    features_TD: Tensor
    coordinates_T2: Tensor
    start_N: Tensor
    count_N: Tensor
    keep_N: Tensor
    order_NV: Tensor
    threshold: float
    rule: str

    def choice(self) -> list[list[int]]:
        """Kept local indices of each image."""
        most_kept = int(self.keep_N.max())
        kept_NK = nms.suppress_and_fill_up(
            self.features_TD,
            self.coordinates_T2,
            packed_index(self.start_N, self.count_N, self.order_NV.shape[1])[0],
            self.count_N,
            self.keep_N,
            self.order_NV,
            most_kept,
            self.threshold,
            self.rule,
        )
        return [own[:n] for own, n in zip(kept_NK.tolist(), self.keep_N.tolist(), strict=True)]

    def by_the_book(self, image: int) -> list[int]:
        start, count, keep = (int(x[image]) for x in (self.start_N, self.count_N, self.keep_N))
        own_VD = self.features_TD[start : start + count].double()
        place_V2 = self.coordinates_T2[start : start + count].double()
        unit_VD = torch.nn.functional.normalize(own_VD, dim=1)
        cosine = unit_VD @ unit_VD.T
        apart = (place_V2[:, None] - place_V2).square().sum(dim=-1)
        near = (cosine + 0.3 * (-4.5 * apart).exp()).tolist()
        order = [token for token in self.order_NV[image].tolist() if token < count]
        kept = reference.suppress(cosine.tolist(), order, keep, self.threshold)
        return sorted(reference.fill_up(near, order, kept, keep, self.rule))


def draw(seed: int, most: int, *, exactly: bool = False) -> Case:
    """Up to three images of up to `most` tokens.

    Of a token's 16 features four are 1 or -1 times a power of two, and places lie on a grid of
    quarters: cosines are quarters as well, and sums are exact in bfloat16, whoever adds them up.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    counts = [most if exactly else pick(1, most) for _ in range(1 if exactly else pick(1, 2))]
    keeps = [pick(1, max(1, count // pick(1, 9))) for count in counts]
    starts = [2 + sum(counts[:i]) + i for i in range(len(counts))]
    tokens = starts[-1] + counts[-1] + 1
    kinds = pick(1, 40)
    kind_KD = torch.zeros(kinds, 16)
    for own_D in kind_KD:
        own_D[torch.randperm(16, generator=generator)[:4]] = 1.0
    kind_KD *= torch.randint(0, 2, kind_KD.shape, generator=generator) * 2 - 1
    scale_T1 = 2.0 ** torch.randint(-2, 3, (tokens, 1), generator=generator)
    features_TD = kind_KD[torch.randint(kinds, (tokens,), generator=generator)] * scale_T1
    if pick(0, 3) == 0:
        features_TD[torch.rand(tokens, generator=generator) < 0.1] = 0
    coordinates_T2 = torch.randint(0, 5, (tokens, 2), generator=generator) / 4
    if pick(0, 3) == 0:
        coordinates_T2.zero_()
    width = max(counts)
    orders = [[*torch.randperm(n, generator=generator).tolist(), *range(n, width)] for n in counts]
    return Case(
        features_TD=features_TD.to([torch.float32, torch.bfloat16][pick(0, 1)]),
        coordinates_T2=coordinates_T2,
        start_N=torch.tensor(starts),
        count_N=torch.tensor(counts),
        keep_N=torch.tensor(keeps),
        order_NV=torch.tensor(orders),
        threshold=[0.25, 0.5, 0.8, 1.0][pick(0, 3)],
        rule=FILL_UPS[pick(0, len(FILL_UPS) - 1)],
    )


def _products(own_NVD: Tensor) -> Tensor:
    return own_NVD.float() @ own_NVD.float().mT


def main() -> None:
    """The kernel against the host's way."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    mock.patch.object(nms, "_products", _products).start()  # no such operation here
    for asked in sys.argv[1:]:
        first, images, tokens = map(int, asked.split(","))
        for seed in range(first, first + images):
            case = draw(seed, tokens, exactly=tokens > 128)
            expected = case.choice()
            with (
                mock.patch.object(nms, "_has_kernel", return_value=True),
                mock.patch.object(nms, "_BYTES", nms._BYTES_ON_DEVICE),
                mock.patch.object(nms_kernel, "launch", wraps=nms_kernel.launch) as launched,
            ):
                assert case.choice() == expected, f"seed {seed}"
            assert launched.called, f"seed {seed}"
        print(f"{images} equal")


if __name__ == "__main__":
    main()
