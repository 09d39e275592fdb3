"""Stochastic rounding is unbiased, exact where it can be, and the same however a table is cut."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.data.id_hash import mix64
from shardemb.env import Env
from shardemb.kernel_choice import Kernel
from shardemb.layouts import Layout
from shardemb.updates.rounding import _drawn, round_stochastically
from tests.every_layout import whole_table
from tests.plans import KERNELS
from tests.spmd import spmd

DTYPES = [torch.float16, torch.bfloat16]
INT16 = torch.int16


def rounded(
    values_UD: Tensor,
    dtype: torch.dtype,
    *,
    rows_U: Tensor | None = None,
    key: int = 1,
    first_column: int = 0,
    num_updates: int = 1,
) -> Tensor:
    return round_stochastically(
        values_UD,
        dtype,
        key=key,
        rows_U=torch.arange(len(values_UD)) if rows_U is None else rows_U,
        first_column=first_column,
        num_updates=num_updates,
    )


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65,536 of them, float32 [256, 256]."""
    return torch.arange(-(2**15), 2**15).to(INT16).view(dtype).view(256, 256).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_holds_stays_as_it_is(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    for step in (1, 2):
        out = rounded(values, dtype, num_updates=step)
        is_number = ~values.isnan()
        assert torch.equal(out[is_number].view(INT16), values[is_number].to(dtype).view(INT16))
        assert out[~is_number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_other_value_goes_to_a_neighbour_by_its_distance(dtype: torch.dtype) -> None:
    """Subnormals and the steps at powers of two too; the expected neighbours are torch's."""
    grid = every_value(dtype)
    positive = grid[grid.isfinite() & (grid >= 0)].unique()
    low, high = positive[:-1], positive[1:]
    for part in (1 / 8, 1 / 2, 7 / 8):
        between = (low.double() + (high.double() - low.double()) * part).float()
        assert ((between > low) & (between < high)).all()
        for sign in (1, -1):
            out = rounded(sign * between[:, None], dtype)[:, 0].float() * sign
            assert ((out == low) | (out == high)).all()
            share = (out == high).double().mean().item()
            deviation = math.sqrt(part * (1 - part) / len(out))
            assert abs(share - part) < 4 * deviation


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_of_many_roundings_is_the_value(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values_D = torch.tensor([1.0001, -3.14159, 0.1, tiny * 0.30103, -tiny / 700, 1e4 / 3])
    step_D = torch.nextafter(values_D.to(dtype).abs(), torch.tensor(math.inf, dtype=dtype))
    step_D = (step_D.float() - values_D.to(dtype).abs().float()).double()
    num_rows, num_steps = 4096, 16
    total_D = torch.zeros(len(values_D), dtype=torch.float64)
    for step in range(num_steps):
        out = rounded(values_D.expand(num_rows, -1), dtype, num_updates=step)
        assert not (out == out[0]).all(0).any()
        total_D += out.double().sum(0)
    error_D = (total_D / (num_rows * num_steps) - values_D.double()).abs()
    assert (error_D < 4 * 0.5 * step_D / math.sqrt(num_rows * num_steps)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_value_it_is_torchs_cast(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    below = torch.nextafter(torch.tensor(largest), torch.tensor(0.0)).item()
    beyond = [largest * (1 + 2**-13), 3.4e38, math.inf]
    values = torch.tensor([[below, *beyond, -math.inf, math.nan]]).expand(50, -1)
    out = rounded(values, dtype)
    assert torch.equal(out[:, 1:5], values[:, 1:5].to(dtype))
    assert out[:, 3:5].isinf().all()
    assert out[:, 5].isnan().all()
    assert out[:, 0].isfinite().all()


def test_bits_are_those_of_splitmix64() -> None:
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    expected = mix64(seeds.numpy().view(np.uint64)).view(np.int64)
    assert np.array_equal(_drawn(seeds, torch.zeros(5, dtype=torch.int64)).numpy(), expected)
    # of seed 0, from https://prng.di.unimi.it/splitmix64.c
    stream = _drawn(0, torch.arange(3)).numpy().view(np.uint64)
    assert [hex(value) for value in stream] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_rows_or_columns_is_rounded_as_in_the_whole(dtype: torch.dtype) -> None:
    values = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, dtype)
    rows_U = torch.tensor([3, 5, 31])
    part = rounded(values[rows_U, 4:9], dtype, rows_U=rows_U, first_column=4)
    assert torch.equal(part, whole[rows_U, 4:9])


def test_rows_columns_steps_and_tables_draw_bits_of_their_own() -> None:
    values = torch.full((64, 64), 1 + 2**-11)
    is_up = {
        what: (rounded(values, torch.float16, **changed) > 1).double()  # type: ignore[arg-type]
        for what, changed in {
            "as it is": {},
            "next step": {"num_updates": 2},
            "next table": {"key": 2},
            "next rows": {"rows_U": torch.arange(1, 65)},
            "next columns": {"first_column": 1},
            "large key": {"key": 2**64 - 1},
        }.items()
    }
    assert torch.equal(is_up["next rows"][:-1], is_up["as it is"][1:])
    assert torch.equal(is_up["next columns"][:, :-1], is_up["as it is"][:, 1:])
    draws = torch.stack([draw.flatten() for draw in is_up.values()])
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.abs().max() < 4 / 64
    of_rows = torch.corrcoef(is_up["as it is"]).fill_diagonal_(0)
    assert of_rows.abs().max() < 5 / 8
    assert torch.equal(is_up["large key"], (rounded(values, torch.float16, key=-1) > 1).double())


def test_updates_that_the_nearest_would_lose_count_on_average() -> None:
    """Without it 1.0 never moves in float16, after any number of steps of 1e-5."""
    stochastic = nearest = torch.ones(64, 8, dtype=torch.float16)
    for step in range(1, 2001):
        nearest = (nearest.float() + 1e-5).half()
        stochastic = rounded(stochastic.float() + 1e-5, torch.float16, num_updates=step)
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert abs(stochastic.double().mean().item() - 1.02) < 0.0005
    assert ((stochastic - 1.02).abs() < 0.03).all()


def rows_of(
    env: Env, layout: Layout, rounding: str, num_steps: int, *, kernel: Kernel
) -> torch.Tensor:
    """Rows of float16 that start at 1 and get a gradient of 1 in each step."""
    table = se.TableConfig(
        name="small",
        num_embeddings=10,
        embedding_dim=8,
        feature_names=("small",),
        dtype="float16",
        rounding=rounding,  # type: ignore[arg-type]
        init=se.init.Constant(value=1.0),
        optimizer=optim.SGD(lr=1e-5),
    )
    model = nn.Sequential(se.EmbeddingBagCollection([table]))
    plan = se.plan_sharding(model, env, {"small": layout}, kernel=kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    batch = KeyedJaggedTensor(keys=["small"], values=torch.arange(10), lengths=torch.tensor([10]))
    for _ in range(num_steps):
        optimizer.zero_grad()
        sharded(batch).values().sum().backward()
        optimizer.step()
    weight = sharded.state_dict()["0.embedding_bags.small.weight"]
    return whole_table(weight, torch.empty(10, 8, dtype=torch.float16))


@spmd(world_size=2)
def test_stochastic_rounding_keeps_small_updates_and_is_the_same_by_every_layout_and_kernel(
    env: Env,
) -> None:
    kinds: list[Layout] = [
        layouts.table_wise(rank=1),
        layouts.row_wise(),
        layouts.column_wise(ranks=[1, 0]),
    ]
    first, *others = [
        rows_of(env, layout, "stochastic", 60, kernel=kernel)
        for kernel in KERNELS
        for layout in kinds
    ]
    for other in others:
        assert torch.equal(first, other)
    expected = 1 - 60 * 2 * 1e-5 / env.world_size  # the gradient of each rank's batch counts half
    assert abs(float(first.double().mean()) - expected) < 3e-4 / 80**0.5 * 60**0.5
    assert len(first.unique()) > 1
    for kernel in KERNELS:
        nearest = rows_of(env, layouts.row_wise(), "nearest", 60, kernel=kernel)
        assert torch.equal(nearest, torch.ones_like(nearest))
