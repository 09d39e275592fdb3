"""Sharded tables against unsharded plain torch in float64."""

import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.plans import KERNELS
from tests.reference import Reference
from tests.sharded_sum import (
    LAYOUTS,
    NUM_SAMPLES,
    global_bags,
    loss_of,
    make_tables,
    part,
    sharded_model,
    whole,
)
from tests.spmd import spmd

OPTIMIZERS: list[SparseOptimizer] = [
    optim.SGD(lr=0.5),
    optim.Adagrad(lr=0.1),
    optim.RowWiseAdagrad(lr=0.1, eps=1e-6),
]


def check_against_reference(
    env: Env,
    optimizer: SparseOptimizer,
    where: dict[str, Layout],
    kernel: KernelChoice = "auto",
) -> None:
    tables = make_tables(optimizer)
    model, combined = sharded_model(optimizer, env, where, kernel=kernel)
    plain = se.EmbeddingBagCollection(tables, seed=3, device="cpu")
    before = {name: bag.weight.detach().clone() for name, bag in plain.embedding_bags.items()}
    reference = Reference(tables, before)
    for step in range(3):
        bags = global_bags(step)
        mine = se.keyed_jagged_tensor(part(bags, env), tables)
        combined.zero_grad()
        loss, pooled = model(mine)
        expected = reference.forward(se.keyed_jagged_tensor(bags, tables))
        size = NUM_SAMPLES // env.world_size
        rows = slice(env.rank * size, (env.rank + 1) * size)
        for feature, out_BD in pooled.items():
            assert expected[feature].abs().max() > 0
            torch.testing.assert_close(
                out_BD.double(),
                expected[feature][rows],
                rtol=1e-5,
                atol=1e-5,
            )
        loss.backward()
        combined.step()
        loss_of(expected).backward()
        reference.step()
    touched = {table.name: touched_rows(table) for table in tables}
    state = model.state_dict()
    fused = combined.state_dict()["state"]
    for table in tables:
        key = f"collection.embedding_bags.{table.name}.weight"
        weight = whole(state[key], env)
        momentum = whole_momentum(fused, f"fused.{key}", table.name, env)
        if weight is None:
            continue
        assert not torch.equal(weight, before[table.name])
        expected_weight = reference.weights[table.name].detach()
        torch.testing.assert_close(weight.double(), expected_weight, rtol=1e-4, atol=1e-5)
        untouched = torch.ones(table.num_embeddings, dtype=torch.bool)
        untouched[touched[table.name]] = False
        assert 0 < untouched.sum() < table.num_embeddings
        assert torch.equal(weight[untouched], before[table.name][untouched])
        if not isinstance(optimizer, optim.SGD):
            assert momentum is not None
            expected_state = reference.state[table.name]["momentum1"]
            expected_state = expected_state[:, 0] if momentum.dim() == 1 else expected_state
            torch.testing.assert_close(momentum.double(), expected_state, rtol=1e-4, atol=1e-6)
            assert torch.equal(momentum[untouched], torch.zeros_like(momentum[untouched]))


def whole_momentum(
    fused: dict[str, dict[str, ShardedTensor]], key: str, table: str, env: Env
) -> torch.Tensor | None:
    """The optimizer rows of a table on rank 0; ranks that hold none of them have no entry."""
    if env.world_size == 1:
        entry = fused[key].get(f"{table}.momentum1")
        return None if entry is None else whole(entry, env)
    shards = [
        (tuple(shard.metadata.shard_offsets), shard.tensor.clone())
        for tensor in fused.get(key, {}).values()
        for shard in tensor.local_shards()
    ]
    gathered: list[list[tuple[tuple[int, ...], torch.Tensor]]] = [[] for _ in range(env.world_size)]
    torch.distributed.all_gather_object(gathered, shards)
    pieces = sorted((piece for of_rank in gathered for piece in of_rank), key=lambda p: p[0])
    return torch.cat([tensor for _, tensor in pieces]) if pieces else None


def touched_rows(table: se.TableConfig) -> list[int]:
    return sorted(
        {
            i
            for step in range(3)
            for f in table.feature_names
            for bag in global_bags(step)[f]
            for i in bag
        }
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@spmd(world_size=2)
def test_row_wise_and_table_wise_equal_unsharded_float64(
    env: Env, optimizer: SparseOptimizer
) -> None:
    for kernel in KERNELS:
        check_against_reference(env, optimizer, LAYOUTS, kernel)
    swapped: dict[str, Layout] = {
        "user": layouts.table_wise(rank=1),
        "item": layouts.row_wise(),
        "wide": layouts.table_wise(rank=0),
    }
    check_against_reference(env, optimizer, swapped)


@spmd(world_size=1)
def test_one_rank_equals_unsharded_float64(env: Env) -> None:
    for optimizer in OPTIMIZERS:
        for kernel in KERNELS:
            check_against_reference(env, optimizer, LAYOUTS, kernel)


@spmd(world_size=4)
def test_four_ranks_equal_unsharded_float64(env: Env) -> None:
    where = LAYOUTS | {"item": layouts.table_wise(rank=3)}
    for kernel in KERNELS:
        check_against_reference(env, optim.RowWiseAdagrad(lr=0.1), where, kernel)
