"""Every layout, pooled and as sequences, against unsharded plain torch in float64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.every_layout import Case, check, on_both_kernels, whole_table
from tests.spmd import spmd

OPTIMIZERS: tuple[SparseOptimizer, ...] = (
    optim.SGD(lr=0.005),
    optim.Adagrad(lr=0.1),
    optim.RowWiseAdagrad(lr=0.1, eps=1e-6),
)
NAMES = ("user", "item", "wide")


def make_tables(optimizer: SparseOptimizer, **changed: Any) -> list[se.TableConfig]:
    """Two features on one table, one feature ("item") in two tables, two widths, sum and mean."""

    def table(name: str, **fields: Any) -> se.TableConfig:
        small = init.Uniform(low=-0.3, high=0.3)
        return se.TableConfig(name=name, optimizer=optimizer, init=small, **fields | changed)

    return [
        table("user", num_embeddings=101, embedding_dim=16, feature_names=("user",)),
        table(
            "item",
            num_embeddings=37,
            embedding_dim=16,
            feature_names=("item", "clicked"),
            pooling="mean",
        ),
        table("wide", num_embeddings=64, embedding_dim=32, feature_names=("tag", "item")),
    ]


def as_sequences(tables: list[se.TableConfig]) -> list[se.TableConfig]:
    """The same tables in one width and without pooling."""
    return [replace(table, embedding_dim=16, pooling="sum") for table in tables]


def every_layout(env: Env) -> list[Layout]:
    """Each layout; ranks and nodes not in their order."""
    node = range(env.world_size - env.local_world_size, env.world_size)
    return [
        layouts.row_wise(),
        layouts.table_wise(rank=env.world_size - 1),
        layouts.column_wise(ranks=reversed(range(min(2, env.world_size)))),
        layouts.table_row_wise(node=env.num_nodes - 1),
        layouts.table_column_wise(ranks=reversed(node)),
        layouts.grid_shard(nodes=reversed(range(env.num_nodes))),
        layouts.data_parallel(),
    ]


def cases(env: Env, layout: Layout, *, sequence: bool) -> Iterator[Case]:
    """All that one layout must compute rightly."""

    def case(tables: list[se.TableConfig], **fields: Any) -> Case:
        tables = as_sequences(tables) if sequence else tables
        where = {table.name: layout for table in tables}
        fields = {"num_samples": [4] * env.world_size} | fields
        return Case(tables=tables, where=where, sequence=sequence, **fields)

    for optimizer in OPTIMIZERS:
        yield case(make_tables(optimizer))
    adagrad = optim.Adagrad(lr=0.1)
    yield case(make_tables(adagrad), num_samples=[1 + 3 * r for r in range(env.world_size)])
    frozen = make_tables(adagrad, trainable=False)[0]
    yield case([frozen, *make_tables(adagrad)[1:]])
    if not sequence:
        summed = [table for table in make_tables(adagrad) if table.pooling == "sum"]
        yield case(summed, weighted=True)
    if layout != layouts.data_parallel():
        halves = make_tables(optim.SGD(lr=0.005), dtype="float16", rounding="nearest")
        yield case(halves, tolerance=1e-3, linear=True)  # an ulp of float16
        yield case(
            make_tables(adagrad, dtype="float16", rounding="nearest"), tolerance=1e-3, linear=True
        )


@spmd(world_size=2)
def test_every_pooled_layout_equals_unsharded_float64_on_two_ranks(env: Env) -> None:
    for position, layout in enumerate(every_layout(env), env.num_nodes):
        for case in on_both_kernels(cases(env, layout, sequence=False), first=position):
            check(env, case)


@spmd(world_size=4, num_nodes=2)
def test_every_pooled_layout_equals_unsharded_float64_on_two_nodes(env: Env) -> None:
    for position, layout in enumerate(every_layout(env), env.num_nodes):
        for case in on_both_kernels(cases(env, layout, sequence=False), first=position):
            check(env, case)


def sequence_layouts(env: Env) -> list[Layout]:
    unsupported = (layouts.TableRowWise, layouts.GridShard)
    return [layout for layout in every_layout(env) if not isinstance(layout, unsupported)]


@spmd(world_size=2)
def test_every_sequence_layout_equals_unsharded_float64_on_two_ranks(env: Env) -> None:
    for position, layout in enumerate(sequence_layouts(env), env.num_nodes):
        for case in on_both_kernels(cases(env, layout, sequence=True), first=position):
            check(env, case)


@spmd(world_size=4, num_nodes=2)
def test_every_sequence_layout_equals_unsharded_float64_on_two_nodes(env: Env) -> None:
    for position, layout in enumerate(sequence_layouts(env), env.num_nodes):
        for case in on_both_kernels(cases(env, layout, sequence=True), first=position):
            check(env, case)


@spmd(world_size=4, num_nodes=2)
def test_all_layouts_in_one_collection_equal_unsharded_float64(env: Env) -> None:
    where = {layout.torchrec_name: layout for layout in every_layout(env)}
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=30 + 7 * position,
            embedding_dim=16 * (1 + position % 2),
            feature_names=(name, "shared"),
            pooling="mean" if position % 3 else "sum",
            optimizer=OPTIMIZERS[position % 3],
            init=init.Uniform(low=-0.2, high=0.2),
        )
        for position, name in enumerate(where)
    ]
    for case in on_both_kernels([Case(tables=tables, where=where, num_samples=[3, 1, 4, 2])]):
        check(env, case)
    four = [where[name] for name in ("row_wise", "table_wise", "column_wise", "data_parallel")]
    sequences = as_sequences(make_tables(optim.Adagrad(lr=0.1)))
    for first in range(4):
        turned = four[first:] + four[:first]
        mixed = dict(zip(NAMES, turned, strict=False))
        one = Case(tables=sequences, where=mixed, sequence=True, num_samples=[3, 1, 4, 2])
        for case in on_both_kernels([one], first=first):
            check(env, case)


class TwoCollections(nn.Module):
    """Pooled and sequence tables of two widths, and dense parameters."""

    def __init__(self, pooled: nn.Module, sequences: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pooled, self.sequences = pooled, sequences
        self.top = nn.Linear(16, 1)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        pooled_BD = self.pooled(batch)["user"]
        rows = self.sequences(batch)["item"]
        items_BD = rows.to_padded_dense(5).sum(1)
        logits_B = self.top(pooled_BD + torch.cat([items_BD, items_BD], 1)).squeeze(1)
        loss: torch.Tensor = logits_B.square().mean()
        return loss


def two_tables() -> tuple[se.TableConfig, se.TableConfig]:
    uniform = init.Uniform(low=-0.5, high=0.5)
    sgd = optim.SGD(lr=0.05)
    user = se.TableConfig(
        name="user",
        num_embeddings=50,
        embedding_dim=16,
        feature_names=("user",),
        optimizer=sgd,
        init=uniform,
    )
    return user, replace(user, name="item", embedding_dim=8, feature_names=("item",))


@spmd(world_size=2)
def test_pooled_and_sequence_collections_train_in_one_model(env: Env) -> None:
    user, item = two_tables()
    model = TwoCollections(se.EmbeddingBagCollection([user]), se.EmbeddingCollection([item]))
    plan = se.plan_sharding(
        model, env, {"user": layouts.data_parallel(), "item": layouts.row_wise()}
    )
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.SGD(p, lr=0.01))
    plain = TwoCollections(
        se.EmbeddingBagCollection([user], device="cpu"),
        se.EmbeddingCollection([item], device="cpu"),
    )
    torch_sgd = torch.optim.SGD(
        [
            {"params": plain.top.parameters(), "lr": 0.01},
            {"params": [*plain.pooled.parameters(), *plain.sequences.parameters()], "lr": 0.05},
        ]
    )
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "user": torch.randint(0, 50, (6, 3), generator=generator),
            "item": torch.randint(0, 50, (6, 5), generator=generator),
        }
        for _ in range(5)
    ]
    part = slice(0, 2) if env.is_main else slice(2, 6)
    mine = [
        se.keyed_jagged_tensor({name: ids[part] for name, ids in batch.items()}, [user, item])
        for batch in batches
    ]
    pipeline = se.TrainPipeline(sharded, optimizer, env)
    losses = [float(loss) for _, loss in pipeline.run(mine, 9)]
    expected = []
    for batch in batches:
        torch_sgd.zero_grad()
        loss = plain(se.keyed_jagged_tensor(batch, [user, item]))
        loss.backward()
        torch_sgd.step()
        expected.append(float(loss.detach()))
    assert len({round(loss, 3) for loss in expected}) == 5
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    state = sharded.state_dict()
    for key, weight in plain.state_dict().items():
        torch.testing.assert_close(whole_table(state[key], weight), weight, rtol=1e-4, atol=1e-5)


@spmd(world_size=2)
def test_a_frozen_collection_stays_bit_for_bit_under_every_layout(env: Env) -> None:
    tables = make_tables(optim.Adagrad(lr=0.1), trainable=False)
    for position, layout in enumerate(every_layout(env)):
        one = Case(tables=tables, where=dict.fromkeys(NAMES, layout), num_samples=[4, 4])
        for case in on_both_kernels([one], first=position):
            check(env, case)


def test_what_a_layout_cannot_compute_is_refused_with_what_can() -> None:
    pooled = se.EmbeddingBagCollection(make_tables(optim.RowWiseAdagrad(lr=0.1)))
    sequences = se.EmbeddingCollection(as_sequences(make_tables(optim.Adagrad(lr=0.1))))
    halves = se.EmbeddingBagCollection(
        make_tables(optim.SGD(lr=0.1), dtype="float16", rounding="nearest")
    )
    env = Env(world_size=4, num_nodes=2)
    refused: list[tuple[nn.Module, str, Layout, str]] = [
        (pooled, "user", layouts.table_column_wise(ranks=[1, 2]), "names ranks of nodes"),
        (pooled, "user", layouts.column_wise(ranks=[4]), "use ranks in 0..3"),
        (pooled, "user", layouts.table_row_wise(node=2), "planned for 2 nodes; use nodes in 0..1"),
        (pooled, "user", layouts.column_wise(ranks=[0, 1, 2]), "or embedding_dim=24"),
        (sequences, "user", layouts.table_row_wise(), "not supported for sequences, TorchRec"),
        (sequences, "user", layouts.grid_shard(), "use row_wise, column_wise or table_wise"),
        (halves, "user", layouts.data_parallel(), "not supported for float16"),
    ]
    for model, table, layout, text in refused:
        with pytest.raises(ValueError, match=f"^table '{table}': .*{text}"):
            se.plan_sharding(model, env, {table: layout}, kernel="fbgemm")
    where = {name: layouts.column_wise(ranks=[0, 1]) for name in ("user", "item")}
    with pytest.raises(ValueError, match="have slices of 8 and 4 columns, and TorchRec needs one"):
        se.plan_sharding(sequences, env, where | {"wide": layouts.column_wise(ranks=[0, 1, 2, 3])})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@spmd(world_size=1, device="cuda")
def test_every_layout_equals_unsharded_float64_on_cuda(env: Env) -> None:
    for layout in every_layout(env):
        for case in cases(env, layout, sequence=False):
            check(env, case)
        if not isinstance(layout, (layouts.TableRowWise, layouts.GridShard)):
            for case in cases(env, layout, sequence=True):
                check(env, case)
