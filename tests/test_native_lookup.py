"""Compiled lookups equal plain torch in float64, on any number of threads and at any level."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

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
INTEGERS = [(ids, offsets) for ids in (torch.int32, torch.int64) for offsets in (ids, torch.int64)]


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def one_feature(weight_RD: Tensor, ids_N: Tensor, offsets: Tensor, pooling: str | None) -> Case:
    case = make_case(Shape())
    bags = replace(case.bags, ids_N=ids_N, offsets=offsets, num_features=1, pooling=pooling)
    width = weight_RD.shape[1]
    size = (len(ids_N), width) if pooling is None else (bags.num_bags, width)
    return Case(weights=[weight_RD], features=(1,), bags=bags, grad=torch.ones(size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_and_the_gradient_of_weights_are_exact(width: int, dtype: torch.dtype) -> None:
    for weighted in (False, True):
        case = make_case(Shape(widths=(width, width), dtype=dtype, weighted=weighted))
        expected, _, expected_N = case.reference()
        assert (case.bags.offsets.diff() == 0).any()
        with threads(2):
            assert torch.equal(case.blocks().look_up(case.bags).double(), expected)
            if weighted:
                grad_N = case.blocks().weigh(case.bags, case.grad)
                assert torch.equal(grad_N.double(), expected_N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_means_equal_those_in_float64(width: int, dtype: torch.dtype) -> None:
    case = make_case(Shape(widths=(width, width), dtype=dtype, pooling="mean"))
    expected, _, _ = case.reference()
    found = case.blocks().look_up(case.bags)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_sequence_has_the_row_of_each_id(width: int, dtype: torch.dtype) -> None:
    case = make_case(Shape(widths=(width, width), dtype=dtype, pooling=None))
    expected, _, _ = case.reference()
    found = case.blocks().look_up(case.bags)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize(("id_dtype", "offset_dtype"), INTEGERS, ids=str)
def test_any_integers_tell_ids_and_offsets(
    id_dtype: torch.dtype, offset_dtype: torch.dtype
) -> None:
    for pooling in ("sum", "mean", None):
        shape = Shape(widths=(19, 19), pooling=pooling, seed=1, weighted=pooling == "sum")
        case = make_case(replace(shape, id_dtype=id_dtype, offset_dtype=offset_dtype))
        usual = make_case(shape)
        assert torch.equal(case.blocks().look_up(case.bags), usual.blocks().look_up(usual.bags))
        if pooling == "sum":
            found = case.blocks().weigh(case.bags, case.grad)
            assert torch.equal(found, usual.blocks().weigh(usual.bags, usual.grad))


def test_blocks_may_differ_in_width() -> None:
    case = make_case(Shape(widths=(16, 5), weighted=True))
    expected, _, expected_N = case.reference()
    assert expected.shape[1] == 16 + 16 + 5
    assert torch.equal(case.blocks().look_up(case.bags).double(), expected)
    assert torch.equal(case.blocks().weigh(case.bags, case.grad).double(), expected_N)


@pytest.mark.parametrize("pooling", ["sum", "mean", None])
def test_without_ids_or_bags_there_is_nothing_to_read(pooling: str | None) -> None:
    for num_bags, longest in ((50, 0), (0, 5)):
        case = make_case(Shape(num_bags=num_bags, longest=longest, pooling=pooling))
        for number in THREADS:
            with threads(number):
                found = case.blocks().look_up(case.bags)
            assert found.shape == case.grad.shape
            assert not found.any()
            assert len(case.blocks().weigh(case.bags, case.grad)) == 0


def test_one_bag_may_have_all_ids() -> None:
    num_ids = 100_000
    weight_RD = torch.randint(-64, 64, (1000, 20)) / 64
    ids_N = torch.randint(0, 1000, (num_ids,))
    offsets = torch.tensor([0, 0, 0, num_ids, num_ids])
    case = one_feature(weight_RD, ids_N, offsets, "sum")
    expected, _, _ = case.reference()
    assert expected.abs().max() < 2**24 / 64  # so that float32 has all of its digits
    for number in (1, 3):
        with threads(number):
            assert torch.equal(case.blocks().look_up(case.bags).double(), expected)


@pytest.mark.parametrize("pooling", ["sum", None])
@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, -(2**31), 2**40])
def test_an_id_that_is_no_row_is_refused_by_name(bad: int, pooling: str | None) -> None:
    id_dtype = torch.int32 if abs(bad) < 2**32 else torch.int64
    case = make_case(Shape(pooling=pooling, id_dtype=id_dtype))
    for place in (0, len(case.bags.ids_N) // 2, len(case.bags.ids_N) - 1):
        ids_N = case.bags.ids_N.clone()
        ids_N[place] = bad
        for number in (1, 3):
            with threads(number), pytest.raises(IndexError, match=f"id {bad} is not one of the"):
                case.blocks().look_up(replace(case.bags, ids_N=ids_N))
    assert case.blocks().look_up(case.bags).isfinite().all()


def test_each_block_has_rows_of_its_own_number() -> None:
    case = make_case(Shape())
    small = case.weights[1][:30].clone()
    ids_N = case.bags.ids_N.clone()
    first_of_last = int(case.bags.offsets[2 * case.bags.num_bags])
    ids_N[:first_of_last], ids_N[first_of_last:] = 39, 29
    blocks = blocks_of([case.weights[0], small], case.features)
    blocks.look_up(replace(case.bags, ids_N=ids_N))
    ids_N[first_of_last] = 30
    with pytest.raises(IndexError, match="id 30 "):
        blocks.look_up(replace(case.bags, ids_N=ids_N))


@pytest.mark.parametrize("pooling", ["sum", "mean", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_outputs_equal_small_ones(pooling: str | None, dtype: torch.dtype) -> None:
    """Outputs beyond 16 MiB of whole lines are stored past the cache."""
    num_bags, width = 70_000, 64
    weight_RD = torch.randn(500, width).to(dtype)
    ids_N = torch.randint(0, 500, (2 * num_bags,))
    offsets = torch.arange(0, 2 * num_bags + 1, 2)
    large = one_feature(weight_RD, ids_N, offsets, pooling)
    found = large.blocks().look_up(large.bags)
    assert found.numel() * 4 > 16 * 2**20
    part = num_bags // 10
    for first in range(0, num_bags, part):
        of_part = one_feature(
            weight_RD, ids_N[2 * first : 2 * (first + part)], offsets[: part + 1], pooling
        )
        small = of_part.blocks().look_up(of_part.bags)
        begin = first * (2 if pooling is None else 1)
        assert torch.equal(bits(small), bits(found[begin : begin + len(small)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["sum", "mean", None])
def test_threads_and_levels_give_the_same_bits(pooling: str | None, dtype: torch.dtype) -> None:
    shape = Shape(widths=(100, 100), dtype=dtype, pooling=pooling, weighted=pooling == "sum")
    case = make_case(replace(shape, num_bags=333, longest=30))
    for weight in case.weights:  # sums of these depend on their order
        weight.normal_(generator=torch.Generator().manual_seed(3))
    outputs, weighed = [], []
    for level in levels():
        for number in THREADS:
            with threads(number):
                outputs.append(case.blocks(level).look_up(case.bags))
                if pooling == "sum":
                    weighed.append(case.blocks(level).weigh(case.bags, case.grad))
    expected, _, _ = case.reference()
    torch.testing.assert_close(outputs[0].double(), expected, rtol=1e-5, atol=1e-5)
    for found in [outputs, weighed]:
        assert all(torch.equal(bits(found[0]), bits(other)) for other in found)


def test_subnormal_and_infinite_rows_of_16_bits_are_read_exactly() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        weight_RD = values[~values.isnan()].view(-1, 1).expand(-1, 17).contiguous()
        ids_N = torch.arange(len(weight_RD))
        case = one_feature(weight_RD, ids_N, torch.arange(len(ids_N) + 1), None)
        for level in levels():
            found = case.blocks(level).look_up(case.bags)
            assert torch.equal(bits(found), bits(weight_RD.float()))
