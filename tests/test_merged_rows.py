"""Summed gradients of rows, against sums in float64."""

# N ids, D width, U distinct rows

import pytest
import torch

from shardemb.updates.lookups import Features, Lookup, RowGradients, merge

WIDTH = 4


def merged(ids_N: torch.Tensor, gradient_ND: torch.Tensor) -> RowGradients:
    """Of a lookup in two parts, of one id a bag."""
    half = len(ids_N) // 2
    lookups = [
        Lookup(
            ids_N=ids_N[part],
            offsets=torch.arange(len(ids_N[part]) + 1),
            weights_N=None,
            gradient=gradient_ND[part],
            batches=(),
            num_features=1,
            pooling="sum",
        )
        for part in (slice(half), slice(half, None))
    ]
    features = Features(first=0, count=1, first_column=0, width=WIDTH)
    return merge(lookups, features)


@pytest.mark.parametrize("num_ids", [1, 2, 1000, 50_000])
def test_gradients_of_ids_of_any_size_are_summed_in_the_order_in_which_they_came(
    num_ids: int,
) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    ids_N = torch.randint(0, 300, (num_ids,), generator=generator)
    gradient_ND = torch.randn(num_ids, WIDTH, generator=generator)
    rows_U, grad_UD, counts_U = merged(ids_N, gradient_ND)
    expected_U, inverse_N, expected_counts_U = ids_N.unique(return_inverse=True, return_counts=True)
    sums_UD = torch.zeros(len(expected_U), WIDTH, dtype=torch.float64)
    sums_UD.index_add_(0, inverse_N, gradient_ND.double())
    assert torch.equal(rows_U, expected_U)
    assert torch.equal(counts_U, expected_counts_U)
    torch.testing.assert_close(grad_UD.double(), sums_UD, rtol=1e-5, atol=1e-5)
    large = 2**62  # too large to be packed with a place into 64 bits
    of_large = merged(ids_N + large, gradient_ND)
    assert torch.equal(of_large.rows_U, rows_U + large)
    assert torch.equal(of_large.grad_UD, grad_UD)  # bit for bit, so in the same order


def test_no_ids_touch_no_rows() -> None:
    rows_U, grad_UD, counts_U = merged(torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH))
    assert len(rows_U) == len(counts_U) == 0
    assert grad_UD.shape == (0, WIDTH)
