"""What a report of training health says, against counts in plain Python and norms in float64."""

# B batch of a rank, N ids

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice
from shardemb.optim import SparseOptimizer
from tests.plans import KERNELS
from tests.reference import Reference
from tests.spmd import spmd
from tests.test_every_layout import every_layout, sequence_layouts

WIDTH, ROWS = 16, 40
OPTIMIZERS: Sequence[SparseOptimizer] = (
    optim.Adagrad(lr=0.1),
    optim.RowWiseAdagrad(lr=0.1),
    optim.LAMB(lr=0.01),
)


def tables_of(names: Sequence[str]) -> list[se.TableConfig]:
    """Tables of two features each; of some the first rows are frozen, or one is padding."""
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=ROWS,
            embedding_dim=WIDTH,
            feature_names=(f"{name}_id", f"{name}_ids"),
            optimizer=OPTIMIZERS[number % len(OPTIMIZERS)],
        )
        for number, name in enumerate(names)
    ]
    tables[0] = replace(tables[0], frozen_rows=7)
    tables[1] = replace(tables[1], padding_idx=0)
    tables[-1] = replace(tables[-1], frozen_rows=3, padding_idx=9)
    return tables


class Model(nn.Module):
    """Pooled rows and rows of sequences, through linear layers; a mean over samples."""

    def __init__(self, pooled: nn.Module, sequences: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.pooled, self.sequences, self.names = pooled, sequences, names
        self.linear = nn.Linear(WIDTH * len(names), 1).double()
        self.of_ids = nn.Linear(WIDTH, 1).double()
        with torch.no_grad():
            for layer in (self.linear, self.of_ids):
                layer.weight.copy_(torch.linspace(-1, 1, layer.in_features))
                layer.bias.fill_(0.1)

    def forward(self, bags: KeyedJaggedTensor, lists: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.pooled(bags)
        rows = self.sequences(lists)
        return self.loss(pooled, {name: out.values() for name, out in rows.items()}, bags.stride())

    def loss(self, pooled: Any, rows: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
        pooled_BD = torch.cat([pooled[name] for name in self.names], 1)
        rows_ND = torch.cat(list(rows.values()))
        of_bags: torch.Tensor = self.linear(pooled_BD.double()).square().mean()
        of_lists: torch.Tensor = self.of_ids(rows_ND.double()).square().sum()
        return of_bags + of_lists / size


def ids_of(tables: Sequence[se.TableConfig], step: int, rank: int) -> dict[str, list[list[int]]]:
    """Bags of each feature, whose samples differ in number from rank to rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)

    def bag() -> list[int]:
        length = int(torch.randint(0, 6, (), generator=generator))
        ids: list[int] = (torch.rand(length, generator=generator).square() * ROWS).int().tolist()
        return ids

    size = 3 + rank
    return {name: [bag() for _ in range(size)] for t in tables for name in t.feature_names}


def batch_of(bags: Mapping[str, list[list[int]]]) -> KeyedJaggedTensor:
    every = [bag for of_feature in bags.values() for bag in of_feature]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([i for bag in every for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in every]),
    )


class Count:
    """Counts the ids of a table in plain Python."""

    def __init__(self, table: se.TableConfig) -> None:
        self.table = table
        self.never = set(range(table.frozen_rows, table.num_embeddings)) - {table.padding_idx}
        self.ids: list[int] = []

    def step(self, batches: Sequence[Mapping[str, list[list[int]]]]) -> None:
        self.ids = [
            i
            for batch in batches
            for feature in self.table.feature_names
            for bag in batch[feature]
            for i in bag
            if i >= self.table.frozen_rows and i != self.table.padding_idx
        ]
        self.never -= set(self.ids)


def norm_of(parameters: Sequence[torch.Tensor]) -> float:
    grads = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    return float(torch.cat(grads).norm())


def check(
    env: Env,
    *,
    num_micro_batches: int,
    max_norm: float | None,
    kernel: KernelChoice = "auto",
) -> None:
    layouts_of_bags, layouts_of_lists = every_layout(env), sequence_layouts(env)
    bags = tables_of([f"bags{i}" for i in range(len(layouts_of_bags))])
    lists = tables_of([f"lists{i}" for i in range(len(layouts_of_lists))])
    names = [name for table in bags for name in table.feature_names]
    where = dict(
        zip([t.name for t in (*bags, *lists)], layouts_of_bags + layouts_of_lists, strict=True)
    )
    plain = [
        se.EmbeddingBagCollection(bags, device="cpu"),
        se.EmbeddingCollection(lists, device="cpu"),
    ]
    references = [
        Reference(
            tables,
            {name.split(".")[1]: w.detach().clone() for name, w in collection.named_parameters()},
        )
        for tables, collection in zip((bags, lists), plain, strict=True)
    ]
    alone = Model(nn.Identity(), nn.Identity(), names)
    model = Model(se.EmbeddingBagCollection(bags), se.EmbeddingCollection(lists), names)
    plan = se.plan_sharding(model, env, where, kernel=kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(
        sharded, dense=lambda p: torch.optim.SGD(p, lr=0.1), max_norm=max_norm
    )
    dense = torch.optim.SGD([*alone.linear.parameters(), *alone.of_ids.parameters()], lr=0.1)
    health = se.TrainingHealth(optimizer)
    counts = {table.name: Count(table) for table in (*bags, *lists)}
    assert health.report().step == 0
    for step in range(3):
        optimizer.zero_grad()
        dense.zero_grad()
        batches, losses = [], []
        for number in range(step * num_micro_batches, (step + 1) * num_micro_batches):
            of_ranks = [
                (ids_of(bags, number, rank), ids_of(lists, number + 50, rank))
                for rank in range(env.world_size)
            ]
            mine = [batch_of(ids) for ids in of_ranks[env.rank]]
            (sharded(*mine) / num_micro_batches).backward()
            batches += [first | second for first, second in of_ranks]
            for first, second in of_ranks:
                pooled = references[0].forward(batch_of(first))
                rows = references[1].forward_sequences(batch_of(second))
                losses.append(alone.loss(pooled, rows, len(first[names[0]])))
        torch.stack(losses).mean().backward()
        optimizer.step()
        report = health.report()
        weights = references[0].weights | references[1].weights
        for table in (*bags, *lists):
            counts[table.name].step(batches)
            grad = weights[table.name].grad
            assert grad is not None
            grad[: table.frozen_rows] = 0
        assert (report.step, report.since_step) == (step + 1, 0)
        assert [table.name for table in report.tables] == list(counts)
        for found in report.tables:
            count = counts[found.name]
            assert found == se.TableHealth(
                name=count.table.name,
                num_ids=len(count.ids),
                num_rows=len(set(count.ids)),
                num_never_touched=len(count.never),
                num_embeddings=ROWS,
                grad_norm=found.grad_norm,
            )
            assert 0 < len(set(count.ids)) < len(count.ids)
            assert found.grad_norm == pytest.approx(norm_of([weights[found.name]]), rel=1e-3)
        of_dense = [p for group in dense.param_groups for p in group["params"]]
        assert report.dense_grad_norm == pytest.approx(norm_of(of_dense), rel=1e-3)
        expected = norm_of([*weights.values(), *of_dense])
        assert report.grad_norm == pytest.approx(expected, rel=1e-3)
        assert optimizer.grad_norm is not None
        assert float(optimizer.grad_norm) == pytest.approx(report.grad_norm, rel=1e-9)
        of_ranks_ = [None] * env.world_size
        dist.all_gather_object(of_ranks_, report)
        assert of_ranks_ == [report] * env.world_size
        for one in references:
            one.step()  # with clipping these are other rows, so that only one step compares
        dense.step()
        if max_norm is not None:
            assert expected > 10 * max_norm
            break
    assert len({len(count.never) for count in counts.values()}) > 1


@spmd(world_size=2)
def test_a_report_counts_what_the_batches_of_all_ranks_hold_on_two_ranks(env: Env) -> None:
    check(env, num_micro_batches=1, max_norm=None)
    check(env, num_micro_batches=2, max_norm=None)
    check(env, num_micro_batches=1, max_norm=1e-3)
    check(env, num_micro_batches=2, max_norm=1e-3, kernel="fbgemm")


@spmd(world_size=4, num_nodes=2)
def test_a_report_counts_what_the_batches_of_all_ranks_hold_on_two_nodes(env: Env) -> None:
    for kernel in KERNELS:
        check(env, num_micro_batches=1, max_norm=None, kernel=kernel)


@spmd(world_size=1)
def test_counting_begins_where_it_is_begun_and_takes_the_update_from_fbgemm(env: Env) -> None:
    table = replace(tables_of(["a", "b"])[0], frozen_rows=0)
    model = nn.Sequential(se.EmbeddingBagCollection([table]))
    where = {"a": layouts.table_wise(rank=0)}
    plan = se.plan_sharding(model, env, where, kernel="fbgemm")
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    left = optimizer.rows.left_to_kernels
    of_fbgemm: list[int] = []
    write = optimizer.rows.write

    def counted(*args: Any, **options: Any) -> None:
        of_fbgemm.append(len(left()))
        write(*args, **options)

    optimizer.rows.write = counted  # type: ignore[method-assign]

    def step(ids: list[int]) -> None:
        optimizer.zero_grad()
        sharded(batch_of({"a_id": [ids], "a_ids": [[]]})).values().sum().backward()
        optimizer.step()

    step([0, 1, 2])
    assert of_fbgemm == [1]
    assert optimizer.grad_norm is None
    health = se.TrainingHealth(optimizer)
    report = health.report()
    assert (report.step, report.since_step, report.grad_norm) == (1, 1, 0.0)
    step([2, 3, 3])
    assert of_fbgemm == [1, 0]
    report = health.report()
    (of_table,) = report.tables
    assert (of_table.num_ids, of_table.num_rows, of_table.num_never_touched) == (3, 2, ROWS - 2)
    assert report.grad_norm == pytest.approx(WIDTH**0.5 * 5**0.5)
    assert str(report) == (
        "step 2: gradient norm 8.94, of dense parameters 0; rows never touched since step 1\n"
        "table  ids  rows  never touched  of  share  gradient norm\n"
        "a        3     2             38  40  95.0%           8.94"
    )
