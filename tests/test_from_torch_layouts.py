"""Converted models, sharded in every layout, against the torch models in float64."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.converted import torch_optimizer, weights_of
from tests.spmd import spmd
from tests.torch_lookups import PADDING, Lookups, batch_of, samples_of

WEIGHTED = ("bags.weighted", "bags.at_times_weighted")
NUM_STEPS = 4
SIZES = {1: (7,), 2: (1, 6), 4: (1, 4, 2, 3)}
"""Samples of each rank; the first has no ids in its bag."""


def every_layout(env: Env) -> Iterator[Layout]:
    yield layouts.row_wise()
    yield layouts.data_parallel()
    yield layouts.table_wise(rank=env.world_size - 1)
    if env.world_size > 1:
        yield layouts.column_wise(ranks=[1, 0])
        yield layouts.table_row_wise(node=env.num_nodes - 1)
        yield layouts.grid_shard(nodes=reversed(range(env.num_nodes)))


def where_of(model: nn.Module, env: Env, layout: Layout) -> dict[str, Layout]:
    """A layout for every table, row-wise where sequences cannot have it."""
    pooled_only = isinstance(layout, (layouts.TableRowWise, layouts.GridShard))
    plan = se.plan_sharding(model, env)
    return {
        table.table: layouts.row_wise() if table.pooling is None and pooled_only else layout
        for table in plan.tables
    }


def parts(env: Env, step: int) -> list[dict[str, torch.Tensor]]:
    """The global batch in float64, and this rank's part of it in float32."""
    sizes = SIZES[env.world_size]
    samples = samples_of(step, sum(sizes))
    first = sum(sizes[: env.rank])
    mine = samples[first : first + sizes[env.rank]]
    return [batch_of(samples, torch.float64), batch_of(mine, torch.float32)]


def check(env: Env, optimizer: SparseOptimizer, layout: Layout) -> None:
    torch.manual_seed(env.rank)
    model = Lookups(width=16)
    plain = copy.deepcopy(model).double()
    for weight in plain.parameters():  # rank 0's count
        torch.distributed.broadcast(weight.data, src=0)
    before = copy.deepcopy(plain.state_dict())
    model = se.from_torch(model, optimizer, weighted=WEIGHTED)
    sharded = se.shard_modules(
        model, se.plan_sharding(model, env, where_of(model, env, layout)), env
    )
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    dense = torch_optimizer(plain, optimizer)
    steps = pipeline.run((parts(env, step)[1] for step in range(NUM_STEPS)), NUM_STEPS)
    for step, loss in steps:
        expected = plain(parts(env, step - 1)[0])
        dense.zero_grad()
        expected.backward()
        dense.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    after = weights_of(sharded, plain)
    for name, weight in plain.state_dict().items():
        text = f"{layout}, {name}"
        if "frozen" in name:
            assert torch.equal(after[name].double(), before[name]), text
            continue
        assert not torch.equal(weight, before[name]), text
        torch.testing.assert_close(after[name].double(), weight, rtol=1e-4, atol=2e-5, msg=text)
        assert torch.equal(after[name][40].double(), before[name][40]), text
        if name.removeprefix("bags.") in {"mean.weight", "rows.weight", "weighted.weight"}:
            assert torch.equal(after[name][PADDING].double(), before[name][PADDING]), text


def check_every_layout(env: Env) -> None:
    for layout in every_layout(env):
        for optimizer in (optim.SGD(lr=0.5), optim.Adagrad(lr=0.1)):
            check(env, optimizer, layout)


@spmd(world_size=1)
def test_every_lookup_trains_as_in_torch_on_one_rank(env: Env) -> None:
    check_every_layout(env)


@spmd(world_size=2)
def test_every_lookup_trains_as_in_torch_on_two_ranks(env: Env) -> None:
    check_every_layout(env)


@spmd(world_size=4, num_nodes=2)
def test_every_lookup_trains_as_in_torch_on_two_nodes(env: Env) -> None:
    check_every_layout(env)
