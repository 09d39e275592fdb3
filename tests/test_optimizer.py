"""The one optimizer: schedules, clipping, several backward passes, and its state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.both import DENSE_LR, OPTIMIZERS, Both, Model, batch_of, make_tables, where
from tests.every_layout import Case, check
from tests.plans import KERNELS
from tests.spmd import spmd

Schedule = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
SCHEDULES: list[tuple[Schedule, Callable[[int], float]]] = [
    (lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5), lambda step: 0.5 ** (step // 2)),
    (
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3),
        lambda step: min(1.0, 0.25 + 0.25 * step),
    ),
    (
        lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step)] * len(o.param_groups)),
        lambda step: 1 / (1 + step),
    ),
]


@spmd(world_size=2)
def test_what_a_schedule_sets_reaches_every_kind_of_table_on_the_very_next_step(env: Env) -> None:
    for number, (make, factor) in enumerate(SCHEDULES):
        both = Both(env, kernel=KERNELS[number % len(KERNELS)])
        scheduler = make(both.optimizer)
        for step in range(5):
            for name, optimizer in OPTIMIZERS.items():
                rate = optimizer.lr * factor(step)
                changed: Any = replace(optimizer, lr=rate)
                both.reference.optimizers[name] = changed
            both.dense.param_groups[0]["lr"] = DENSE_LR * factor(step)
            both.step(step)
            scheduler.step()
        both.assert_equal()


@spmd(world_size=2)
def test_any_setting_of_one_table_can_be_changed_by_hand(env: Env) -> None:
    changed: dict[str, SparseOptimizer] = {
        "fused": optim.Adagrad(lr=0.03, eps=1e-2),
        "own": optim.Adam(lr=0.1, betas=(0.5, 0.8)),
    }
    for kernel in KERNELS:
        both = Both(env, kernel=kernel)
        groups = {group.get("table"): group for group in both.optimizer.param_groups}
        assert list(groups) == [*OPTIMIZERS, None]
        for step in range(4):
            if step == 2:
                for name, optimizer in changed.items():
                    both.reference.optimizers[name] = optimizer
                    groups[name].update(vars(optimizer))
            both.step(step)
        both.assert_equal()


@spmd(world_size=2)
def test_several_backward_passes_are_one_step_on_all_their_samples(env: Env) -> None:
    for kernel in KERNELS:
        both = Both(env, kernel=kernel)
        for step in range(4):
            both.step(step, num_micro_batches=3)
        both.assert_equal()


@spmd(world_size=2)
def test_gradients_of_rows_and_dense_parameters_are_clipped_by_their_norm_together(
    env: Env,
) -> None:
    for kernel in KERNELS:
        both = Both(env, max_norm=0.05, kernel=kernel)
        for step in range(4):
            both.step(step)
            assert both.optimizer.grad_norm is not None
            assert both.optimizer.grad_norm > 0.05
        both.assert_equal()
        both = Both(env, max_norm=0.05, kernel=kernel)
        for step in range(3):
            both.step(step, num_micro_batches=2)
        both.assert_equal()


@spmd(world_size=2)
def test_a_forward_without_backward_leaves_no_trace(env: Env) -> None:
    both = Both(env)
    both.step(0)
    both.model(batch_of(100, env.rank))
    with torch.no_grad():
        both.model(batch_of(101, env.rank))
    both.step(1)
    both.assert_equal()


@spmd(world_size=2)
def test_state_is_complete_and_loads_into_an_optimizer_of_the_same_tables_on_another_kernel(
    env: Env,
) -> None:
    first = Both(env, kernel=KERNELS[0])
    for step in range(2):
        first.step(step)
    first.optimizer.param_groups[0]["lr"] = 0.07
    second = Both(env, kernel=KERNELS[-1])
    second.step(5)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert [group["step"] for group in second.optimizer.param_groups[:-1]] == [2] * 4
    assert second.optimizer.param_groups[0]["lr"] == 0.07
    second.reference, second.linear, second.dense = first.reference, first.linear, first.dense
    second.reference.optimizers["fused"] = optim.Adagrad(lr=0.07)
    for step in range(2, 4):
        second.step(step)
    second.assert_equal()
    other = first.optimizer.state_dict()
    other["param_groups"][1]["optimizer"] = "AdamW"
    with pytest.raises(ValueError, match="load it into the optimizer it was saved from"):
        second.optimizer.load_state_dict(other)


@spmd(world_size=2)
def test_a_second_step_changes_no_table_again(env: Env) -> None:
    both = Both(env)
    both.step(0)
    (linear, bias) = both.optimizer.dense_parameters.values()
    linear.grad = bias.grad = None
    both.optimizer.step()
    both.assert_equal()


@spmd(world_size=1)
def test_a_closure_and_schedules_that_cycle_betas_work_as_in_torch(env: Env) -> None:
    tables = [replace(table, optimizer=optim.Adam(lr=0.1)) for table in make_tables()]
    model = Model(se.EmbeddingBagCollection(tables))
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where(env)), env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.Adam(p, lr=0.1))
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = sharded(batch_of(0, 0))
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert min(losses[1:]) < losses[0]
    assert {group["betas"] for group in optimizer.param_groups} == {
        optimizer.param_groups[0]["betas"]
    }
    assert optimizer.param_groups[0]["betas"] != (0.9, 0.999)


@spmd(world_size=2)
def test_state_loads_into_a_fresh_optimizer_dense_state_included(env: Env) -> None:
    def build() -> tuple[Any, Any]:
        model = Model(se.EmbeddingBagCollection(make_tables()))
        sharded = se.shard_modules(model, se.plan_sharding(model, env, where(env)), env)
        return sharded, se.build_optimizer(sharded, dense=lambda p: torch.optim.Adam(p, lr=0.1))

    def train(model: Any, optimizer: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = model(batch_of(step, env.rank))
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses

    model, optimizer = build()
    train(model, optimizer, range(2))
    fresh, its_optimizer = build()
    fresh.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(optimizer.state_dict())
    assert train(fresh, its_optimizer, range(2, 5)) == train(model, optimizer, range(2, 5))


@spmd(world_size=2)
def test_state_from_before_the_first_step_leaves_no_dense_state_behind(env: Env) -> None:
    model = Model(se.EmbeddingBagCollection(make_tables()))
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where(env)), env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.Adam(p, lr=0.1))
    fresh = optimizer.state_dict()
    fresh["state"] = {  # of which the tables' tensors are those of the optimizer
        name: {} if name.startswith("dense.") else entry for name, entry in fresh["state"].items()
    }
    sharded(batch_of(0, env.rank)).backward()
    optimizer.step()
    weight = optimizer.dense_parameters["linear.weight"]
    assert optimizer.dense is not None
    assert optimizer.dense.state[weight]["exp_avg"].abs().max() > 0
    optimizer.load_state_dict(fresh)
    assert not optimizer.dense.state.get(weight)


@spmd(world_size=3)
def test_slices_of_tables_whose_kernels_come_in_another_order_on_each_rank_are_kept_apart(
    env: Env,
) -> None:
    ranks = {"a": (0, 2), "b": (0, 1), "c": (0, 1)}
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=20,
            embedding_dim=8,
            feature_names=(name,),
            pooling="sum" if name == "b" else "mean",
            optimizer=optim.RowWiseAdagrad(lr=0.1),
            init=se.init.Uniform(low=-0.3, high=0.3),
        )
        for name in ranks
    ]
    where: dict[str, Layout] = {name: layouts.column_wise(of) for name, of in ranks.items()}
    for kernel in KERNELS:
        check(env, Case(tables=tables, where=where, num_samples=[4] * 3, kernel=kernel))
