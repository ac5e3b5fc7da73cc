"""Products by oneDNN and in a wider precision, against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trio.decoder.matmul import linear, through_linear, times


@pytest.mark.parametrize("rows", [1, 60, 300])
@pytest.mark.parametrize("shape", [(64, 1601), (1600, 64), (256, 260)])
def test_few_and_many_rows(rows: int, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(rows, shape[0]), torch.randn(shape)
    if rows != 60:
        weight = weight.T.contiguous().T
    exact = x.double() @ weight.double()
    torch.testing.assert_close(times(x, weight).double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "lead", "shape"),
    [
        (torch.bfloat16, (), (64, 20000)),
        (torch.float16, (3,), (20000, 64)),
        (torch.bfloat16, (3,), (700, 900)),
    ],
)
def test_narrow_weights_are_multiplied_in_float32(
    dtype: torch.dtype, lead: tuple[int, ...], shape: tuple[int, int]
) -> None:
    x = torch.randn(*lead, 5, shape[0])
    weight = torch.randn(*lead, *shape).to(dtype)
    out = times(x, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x @ weight.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_gpu_keeps_sixteen_bits_of_the_activations(
    dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    x = torch.randn(*lead, 5, 704, device="cuda")
    weight = torch.randn(*lead, 896, 704, device="cuda").to(dtype)
    exact = x.double() @ weight.double().transpose(-1, -2)
    error = (linear(x, weight).double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-15


def test_wide_inputs_pass_through_a_narrow_layer_and_so_do_gradients() -> None:
    layer = nn.Linear(12, 7).bfloat16()
    x = torch.randn(2, 3, 12, requires_grad=True)
    with through_linear():
        out = layer(x)
    expected = F.linear(x, layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, upstream)
    (plain,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(got, plain)
    with pytest.raises(RuntimeError):
        layer(x)
