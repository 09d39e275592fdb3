"""A checkpoint of one layout or kernel opens in every other, optimizer rows included."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from shardemb.updates.fbgemm_kernel import FbgemmKernel
from shardemb.updates.native_kernel import NativeKernel
from shardemb.updates.sharded import row_kernels
from tests.every_layout import Case, Loss, batch_of, loss_of, optimizer_rows, whole_table
from tests.plans import KERNELS, NEEDS_NATIVE
from tests.spmd import spmd
from tests.test_every_layout import NAMES, every_layout, make_tables


def trained(
    env: Env, case: Case, num_steps: int
) -> tuple[nn.Module, CombinedOptimizer, dict[str, torch.Tensor]]:
    """A sharded model after some steps, its optimizer, and all rows that it then has."""
    model = Loss(case, case.collection("meta"))
    plan = se.plan_sharding(model, env, case.where, kernel=case.kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    for step in range(num_steps):
        optimizer.zero_grad()
        sharded(batch_of(case, step, env.rank))[0].backward()
        optimizer.step()
    return sharded, optimizer, all_rows(case, sharded, optimizer)


def all_rows(
    case: Case, sharded: nn.Module, optimizer: CombinedOptimizer
) -> dict[str, torch.Tensor]:
    state: Mapping[str, Any] = sharded.state_dict()
    optimizer_state = optimizer.state_dict()["state"]
    rows = {}
    for table in case.tables:
        key = f"collection.embedding_bags.{table.name}.weight"
        like = torch.zeros(table.num_embeddings, table.embedding_dim)
        rows[table.name] = whole_table(state[key], like)
        for name in table.optimizer.state:
            rows[f"{name} of {table.name}"] = optimizer_rows(optimizer_state, key, table, name)
    return rows


def check_all_pairs(env: Env, optimizer: SparseOptimizer, kinds: list[Layout], path: Path) -> None:
    saved: dict[str, dict[str, torch.Tensor]] = {}
    tables = make_tables(optimizer)
    for layout in kinds:
        case = Case(tables=tables, where=dict.fromkeys(NAMES, layout), num_samples=[4] * 4)
        model, combined, saved[str(layout)] = trained(env, case, 3)
        se.save_checkpoint(path / str(layout), model, combined, step=3, env=env)
    for layout in kinds:
        case = Case(tables=tables, where=dict.fromkeys(NAMES, layout), num_samples=[4] * 4)
        model, combined, before = trained(env, case, 1)
        for other, expected in saved.items():
            assert se.load_checkpoint(path / other, model, combined, env=env) == 3
            for name, rows in all_rows(case, model, combined).items():
                assert not torch.equal(before[name], expected[name])
                assert torch.equal(rows, expected[name]), f"{name}, {other} to {layout}"


@pytest.mark.slow
@spmd(world_size=4, num_nodes=2)
def test_every_layout_opens_in_every_other_bit_for_bit(env: Env, tmp_path: Path) -> None:
    for optimizer in (
        optim.Adagrad(lr=0.1),
        optim.RowWiseAdagrad(lr=0.1),
        optim.PartialRowWiseAdam(lr=0.1),
    ):
        kind = type(optimizer).__name__
        check_all_pairs(env, optimizer, every_layout(env), tmp_path / kind)


@spmd(world_size=1)
def test_one_optimizer_opens_where_replicated_tables_and_others_are_one_group(
    env: Env, tmp_path: Path
) -> None:
    tables = make_tables(optim.Adagrad(lr=0.05))  # which float32 does not hold
    whole: dict[str, Layout] = dict.fromkeys(NAMES, layouts.table_wise())
    mixed = Case(tables=tables, where=whole | {"user": layouts.data_parallel()}, num_samples=[4])
    model, combined, rows = trained(env, mixed, 2)
    path = se.save_checkpoint(tmp_path / "mixed", model, combined, step=2, env=env)
    model, combined, before = trained(env, Case(tables=tables, where=whole, num_samples=[4]), 1)
    assert se.load_checkpoint(path, model, combined, env=env) == 2
    after = all_rows(mixed, model, combined)
    for name, expected in rows.items():
        assert not torch.equal(before[name], expected)
        assert torch.equal(after[name], expected)


@NEEDS_NATIVE
@spmd(world_size=2)
def test_a_checkpoint_of_one_kernel_opens_under_the_other_bit_for_bit(
    env: Env, tmp_path: Path
) -> None:
    kinds: list[Layout] = [
        layouts.row_wise(),
        layouts.table_wise(rank=1),
        layouts.column_wise(ranks=[1, 0]),
        layouts.data_parallel(),
    ]
    turned = [dict(zip(NAMES, kinds[first:] + kinds[:first], strict=False)) for first in (0, 2)]
    for optimizer in (
        optim.Adagrad(lr=0.1),
        optim.RowWiseAdagrad(lr=0.1),
        optim.PartialRowWiseAdam(lr=0.1),
    ):
        for number, kernel in enumerate(KERNELS):
            case = Case(
                tables=make_tables(optimizer), where=turned[0], num_samples=[4, 4], kernel=kernel
            )
            model, combined, saved = trained(env, case, 3)
            path = tmp_path / f"{type(optimizer).__name__} {kernel}"
            se.save_checkpoint(path, model, combined, step=3, env=env)
            other = replace(case, kernel=KERNELS[1 - number], where=turned[1])
            model, combined, before = trained(env, other, 1)
            assert se.load_checkpoint(path, model, combined, env=env) == 3
            found = all_rows(other, model, combined)
            assert list(found) == list(saved)
            for name, rows in found.items():
                assert not torch.equal(before[name], saved[name])
                assert torch.equal(rows, saved[name]), f"{name}, {kernel} to {other.kernel}"


@NEEDS_NATIVE
@spmd(world_size=2)
def test_a_plan_file_brings_its_kernel_whichever_is_the_default(env: Env, tmp_path: Path) -> None:
    where: dict[str, Layout] = dict.fromkeys(NAMES, layouts.row_wise())
    case = Case(tables=make_tables(optim.Adagrad(lr=0.1)), where=where, num_samples=[4, 4])
    kinds = {"native": NativeKernel, "fbgemm": FbgemmKernel}
    found = []
    for kernel in KERNELS:
        path = tmp_path / f"{kernel} of rank {env.rank}"
        se.plan_sharding(case.collection("meta"), env, where, kernel=kernel).save(path)
        collection = case.collection("meta")
        plan = se.load_plan(path, collection, env)
        sharded = se.shard_modules(collection, plan, env)
        assert {type(one) for one in row_kernels(sharded)} == {kinds[kernel]}
        optimizer = se.build_optimizer(sharded)
        before = [rows.weight_RD.clone() for rows in optimizer.rows.blocks]
        batch = batch_of(case, 0, env.rank)
        loss_of(sharded(batch).to_dict(), batch.stride(), linear=False).backward()
        optimizer.step()
        after = [rows.weight_RD for rows in optimizer.rows.blocks]
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
        found.append(after)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
