"""Summed gradients of rows, in torch and in the compiled code, against sums in float64."""

# N ids, D width, U distinct rows, R rows of a block

import pytest
import torch

from shardemb.kernel_choice import Kernel
from shardemb.native.kernels import Bags, Merged
from shardemb.updates.lookups import Features, Lookup, RowGradients, merge
from tests.native_cases import blocks_of
from tests.plans import KERNELS

WIDTH, ROWS = 4, 300


def merged(kernel: Kernel, ids_N: torch.Tensor, gradient_ND: torch.Tensor) -> RowGradients:
    """Of a lookup in two parts, of one id a bag."""
    half = len(ids_N) // 2
    parts = [(ids_N[part], gradient_ND[part]) for part in (slice(half), slice(half, None))]
    if kernel == "native":
        by_c = Merged(blocks_of([torch.zeros(ROWS, WIDTH)], [1]))
        by_c.sort(
            [
                (
                    Bags(
                        ids_N=ids,
                        offsets=torch.arange(len(ids) + 1),
                        weights_N=None,
                        num_features=1,
                        pooling="sum",
                    ),
                    gradient,
                )
                for ids, gradient in parts
            ]
        )
        return RowGradients(*by_c.rows(0))
    lookups = [
        Lookup(
            ids_N=ids,
            offsets=torch.arange(len(ids) + 1),
            weights_N=None,
            gradient=gradient,
            batches=(),
            num_features=1,
            pooling="sum",
        )
        for ids, gradient in parts
    ]
    return merge(lookups, Features(first=0, count=1, first_column=0, width=WIDTH))


@pytest.mark.parametrize("num_ids", [1, 2, 1000, 50_000])
def test_gradients_of_ids_of_any_size_are_summed_in_the_order_in_which_they_came(
    num_ids: int,
) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    ids_N = torch.randint(0, ROWS, (num_ids,), generator=generator)
    gradient_ND = torch.randn(num_ids, WIDTH, generator=generator)
    expected_U, inverse_N, expected_counts_U = ids_N.unique(return_inverse=True, return_counts=True)
    sums_UD = torch.zeros(len(expected_U), WIDTH, dtype=torch.float64)
    sums_UD.index_add_(0, inverse_N, gradient_ND.double())
    of_kernels = {kernel: merged(kernel, ids_N, gradient_ND) for kernel in KERNELS}
    for rows_U, grad_UD, counts_U in of_kernels.values():
        assert torch.equal(rows_U, expected_U)
        assert torch.equal(counts_U, expected_counts_U)
        torch.testing.assert_close(grad_UD.double(), sums_UD, rtol=1e-5, atol=1e-5)
    large = 2**62  # too large to be packed with a place into 64 bits
    of_large, of_small = merged("fbgemm", ids_N + large, gradient_ND), of_kernels["fbgemm"]
    assert torch.equal(of_large.rows_U, of_small.rows_U + large)
    assert torch.equal(of_large.grad_UD, of_small.grad_UD)  # bit for bit, so in the same order


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_ids_touch_no_rows(kernel: Kernel) -> None:
    ids_N, gradient_ND = torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH)
    rows_U, grad_UD, counts_U = merged(kernel, ids_N, gradient_ND)
    assert len(rows_U) == len(counts_U) == 0
    assert grad_UD.shape == (0, WIDTH)
