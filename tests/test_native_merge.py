"""Rows of a step, merged by the compiled kernels: each once, in order, with exact sums."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardemb.native.kernels import Bags, Merged, largest
from tests.native_cases import (
    DTYPES,
    THREADS,
    WIDTHS,
    Case,
    Shape,
    blocks_of,
    levels,
    make_case,
    needs_kernels,
    threads,
)

pytestmark = needs_kernels
PARTITIONED = 65_536  # more ids than these go to partitions first
POOLINGS = (
    Shape(),
    Shape(weighted=True),
    Shape(pooling="mean"),
    Shape(pooling=None),
    Shape(pooling=None, weighted=True),  # weights of ids that are not pooled count nowhere
)

ROUNDING = {"sum": 0.0, None: 0.0, "mean": 1e-5}


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def counts_of(case: Case, block: int) -> Tensor:
    """How many ids looked each row up [R]."""
    ends = case.bags.offsets[:: case.bags.num_bags]
    first = sum(case.features[:block])
    ids_N = case.bags.ids_N[ends[first] : ends[first + case.features[block]]]
    return torch.bincount(ids_N, minlength=len(case.weights[block]))


def check(cases: Sequence[Case], merged: Merged, *, rounding: float = 0.0) -> None:
    """Compares with the sums of the gradients that autograd finds for some lookups."""
    gradients = [case.reference()[1] for case in cases]
    for block in range(len(cases[0].weights)):
        rows_U, grad_UD, counts_U = merged.rows(block)
        counts_R = sum(counts_of(case, block) for case in cases)
        assert isinstance(counts_R, Tensor)
        assert torch.equal(rows_U, counts_R.nonzero().flatten())
        assert torch.equal(counts_U, counts_R[rows_U])
        expected_RD = sum(of_blocks[block] for of_blocks in gradients)
        assert isinstance(expected_RD, Tensor)
        expected_UD = expected_RD[rows_U]
        torch.testing.assert_close(grad_UD.double(), expected_UD, rtol=rounding / 10, atol=rounding)
        square = merged.squares()[block]
        assert square == pytest.approx(grad_UD.double().square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("shape", POOLINGS, ids=lambda s: f"{s.pooling} {s.weighted}")
@pytest.mark.parametrize("width", WIDTHS)
def test_each_row_comes_once_with_the_sum_of_its_gradients(width: int, shape: Shape) -> None:
    case = make_case(replace(shape, widths=(width, width)))
    check([case], case.merged(), rounding=ROUNDING[shape.pooling])


@pytest.mark.parametrize("shape", POOLINGS, ids=lambda s: f"{s.pooling} {s.weighted}")
def test_lookups_of_several_micro_batches_are_merged_in_one(shape: Shape) -> None:
    of_32_bits = replace(shape, id_dtype=torch.int32, offset_dtype=torch.int32, num_bags=7)
    cases = [make_case(replace(shape, seed=1)), make_case(replace(of_32_bits, seed=2))]
    cases.append(make_case(replace(shape, seed=3, longest=0)))
    merged = Merged(cases[0].blocks())
    merged.sort([(case.bags, case.grad) for case in cases])
    check(cases, merged, rounding=ROUNDING[shape.pooling])


def test_sorting_again_forgets_what_was_sorted() -> None:
    large = make_case(Shape(weighted=True, num_bags=500))
    merged = large.merged()
    for shape in (Shape(num_bags=3), Shape(weighted=True), Shape(longest=0)):
        case = make_case(shape)
        merged.sort([(case.bags, case.grad)])
        check([case], merged)
    merged.sort([])
    assert [len(of_rows) for of_rows in merged.rows(0)] == [0, 0, 0]
    assert merged.squares() == [0.0, 0.0]


def test_more_ids_than_numbers_are_refused_and_the_next_are_sorted() -> None:
    case = make_case(Shape())
    merged = case.merged()
    first_bag_has_all = torch.full_like(case.bags.offsets, 2**32).index_fill(0, torch.tensor(0), 0)
    with pytest.raises(MemoryError, match="are more than 2\\*\\*32"):
        merged.sort([(replace(case.bags, offsets=first_bag_has_all), case.grad)])
    assert len(merged.rows(0)[0]) == 0
    merged.sort([(case.bags, case.grad)])
    check([case], merged)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 2**11, 2**20 + 1])
@pytest.mark.parametrize("hot", [0.0, 0.9, 1.0])
def test_large_blocks_are_merged_as_small_ones(num_rows: int, hot: float) -> None:
    """Of 200,000 ids; nine of ten, or all of them, of one row."""
    for shape in POOLINGS:
        large = replace(shape, widths=(2, 2), num_rows=num_rows, num_bags=30_000, hot=hot)
        case = make_case(large)
        assert len(case.bags.ids_N) > 2 * PARTITIONED
        for number in (1, 3):
            with threads(number):
                rounding = 1000 * ROUNDING[shape.pooling]  # of the sum of 200,000 numbers
                check([case], case.merged(), rounding=rounding)


def test_the_last_row_of_a_huge_block_is_found() -> None:
    """Rows are told by 32 bits; pages of a tensor that nobody reads cost no memory."""
    num_rows = 2**31 + 5
    weight_RD = torch.empty(num_rows, 1, dtype=torch.float16)
    ids_N = torch.tensor([num_rows - 1, 0, 2**31, num_rows - 1])
    weight_RD[ids_N] = 0.5
    bags = Bags(
        ids_N=ids_N,
        offsets=torch.arange(5),
        weights_N=None,
        num_features=1,
        pooling="sum",
    )
    blocks = blocks_of([weight_RD], [1])
    assert torch.equal(blocks.look_up(bags), torch.full((4, 1), 0.5))
    merged = Merged(blocks)
    merged.sort([(bags, torch.tensor([[1.0], [2.0], [4.0], [8.0]]))])
    rows_U, grad_UD, counts_U = merged.rows(0)
    assert rows_U.tolist() == [0, 2**31, num_rows - 1]
    assert grad_UD.flatten().tolist() == [2, 4, 9]
    assert counts_U.tolist() == [1, 1, 2]


@pytest.mark.parametrize("num_bags", [60, 40_000])
@pytest.mark.parametrize("shape", POOLINGS, ids=lambda s: f"{s.pooling} {s.weighted}")
def test_threads_and_levels_merge_to_the_same_bits(shape: Shape, num_bags: int) -> None:
    case = make_case(replace(shape, widths=(20, 20), num_rows=1000, num_bags=num_bags))
    case.grad.normal_(generator=torch.Generator().manual_seed(5))  # sums depend on their order
    found: list[list[Tensor]] = []
    squares: list[list[float]] = []
    for level in levels():
        for number in THREADS:
            with threads(number):
                merged = case.merged(level)
                found.append([bits(part) for block in (0, 1) for part in merged.rows(block)])
                squares.append(merged.squares())
    for other in found:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
    assert all(other == squares[0] for other in squares)


@pytest.mark.parametrize("count", [0, 1, 3, 17, 100_003])
def test_the_largest_magnitude_is_found_wherever_it_is(count: int) -> None:
    values = torch.rand(count) * 2 - 1
    for number in THREADS:
        with threads(number):
            assert largest(values) == (values.abs().max().item() if count else 0.0)
            for place in {0, count // 2, count - 1} if count else ():
                for extreme in (-3.5, 3.4028234663852886e38, -torch.inf, torch.nan):
                    changed = values.clone()
                    changed[place] = extreme
                    expected = abs(extreme) if extreme == extreme else torch.inf
                    assert largest(changed) == expected


def test_the_dtype_of_rows_does_not_change_their_gradients() -> None:
    found = [make_case(Shape(dtype=dtype)).merged().rows(0) for dtype in DTYPES]
    assert all(torch.equal(bits(found[0][1]), bits(other[1])) for other in found)
