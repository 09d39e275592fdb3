"""What the optimizer, and tables without it, refuse by name."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.errors import RunError
from tests.both import Both, Model, batch_of, make_tables, where
from tests.plans import KERNELS
from tests.spmd import spmd


@spmd(world_size=2)
def test_weights_of_ids_that_want_a_gradient_are_refused_by_the_kernel_of_fbgemm(env: Env) -> None:
    model = nn.Sequential(se.EmbeddingBagCollection(make_tables(), is_weighted=True))
    plan = se.plan_sharding(model, env, where(env), kernel="fbgemm")
    sharded = se.shard_modules(model, plan, env)
    batch = batch_of(0, env.rank)
    weighted = KeyedJaggedTensor(
        keys=batch.keys(),
        values=batch.values(),
        lengths=batch.lengths(),
        weights=torch.ones(len(batch.values()), requires_grad=True),
    )
    with pytest.raises(ValueError, match="gives weights none when it is sharded; detach them, or"):
        sharded(weighted)
    with torch.no_grad():
        sharded(weighted)


@spmd(world_size=2)
def test_a_backward_pass_after_a_step_needs_zero_grad_in_every_layout(env: Env) -> None:
    for kernel, (name, layout) in itertools.product(KERNELS, where(env).items()):
        tables = [table for table in make_tables() if table.name == name]
        model = nn.Sequential(se.EmbeddingBagCollection(tables))
        plan = se.plan_sharding(model, env, {name: layout}, kernel=kernel)
        sharded = se.shard_modules(model, plan, env)
        optimizer = se.build_optimizer(sharded)
        batch = KeyedJaggedTensor(
            keys=[name], values=torch.tensor([1, 39]), lengths=torch.tensor([1, 1])
        )
        sharded(batch).values().sum().backward()
        optimizer.step()
        stale = env.rank == env.world_size - 1 or name != "own"  # whose table the last rank holds
        if stale:
            with pytest.raises(RunError, match=f"table '{name}' has the gradients of a step that"):
                sharded(batch).values().sum().backward()
        else:
            sharded(batch).values().sum().backward()
        optimizer.zero_grad()
        sharded(batch).values().sum().backward()


@spmd(world_size=1)
def test_a_max_norm_must_be_positive(env: Env) -> None:
    with pytest.raises(ValueError, match="max_norm must be a positive number, got -1"):
        Both(env, max_norm=-1)


@spmd(world_size=2)
def test_rows_without_an_optimizer_are_not_trained_in_silence(env: Env) -> None:
    for kernel, name in itertools.product(KERNELS, ("own", "fused")):
        tables = [table for table in make_tables() if table.name == name]
        model = nn.Sequential(se.EmbeddingBagCollection(tables))
        plan = se.plan_sharding(model, env, {name: layouts.row_wise()}, kernel=kernel)
        sharded = se.shard_modules(model, plan, env)
        batch = KeyedJaggedTensor(
            keys=[name], values=torch.tensor([1, 39]), lengths=torch.tensor([1, 1])
        )
        with pytest.raises(RunError, match=f"table '{name}' has a gradient and no optimizer"):
            sharded(batch).values().sum().backward()


@spmd(world_size=2)
def test_settings_of_one_rank_alone_end_the_step_on_all(env: Env) -> None:
    both = Both(env)
    stateless = [
        replace(table, optimizer=optim.SGD(lr=0.1))
        for table in make_tables()
        if table.name == "own"
    ]
    model = nn.Sequential(se.EmbeddingBagCollection(stateless))
    plan = se.plan_sharding(model, env, {"own": layouts.row_wise()})
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    if env.is_main:
        optimizer.param_groups[0]["momentum"] = 0.9
    batch = KeyedJaggedTensor(keys=["own"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    sharded(batch).values().sum().backward()
    with pytest.raises(
        RunError, match=r"momentum of table 'own' is 0\.9, and its SGD was declared"
    ):
        optimizer.step()
    if env.is_main:
        both.optimizer.param_groups[1]["betas"] = [0.9, float("nan")]
    with pytest.raises(RunError, match=r"betas of table 'own' is \[0.9, nan\]"):
        both.step(0)


@spmd(world_size=2)
def test_what_torch_would_let_pass_and_rows_would_not_get_is_refused(env: Env) -> None:
    both = Both(env)
    with pytest.raises(ValueError, match="has an optimizer of build_optimizer already"):
        se.build_optimizer(both.model, dense=torch.optim.SGD)
    with pytest.raises(NotImplementedError, match="give that all groups"):
        both.optimizer.add_param_group({"params": []})
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(both.model(batch_of(0, env.rank))).backward()
    with pytest.raises(ValueError, match="GradScaler cannot unscale the gradients of rows"):
        scaler.step(both.optimizer)
    both.optimizer.zero_grad()
    tables = [weight for name, weight in both.model.named_parameters() if "fused" in name]
    penalty = sum(weight.sum() for weight in tables)
    (both.model(batch_of(0, env.rank)) + penalty).backward()
    with pytest.raises(RunError, match="the weight of table 'fused' has a gradient beside that of"):
        both.optimizer.step()
    both.optimizer.zero_grad()
    if not env.is_main:
        both.optimizer.param_groups[1]["lr"] = 0.3
    with pytest.raises(
        RunError, match=r"lr of table 'own' is 0\.1 on rank 0 and 0\.3 on rank 1; not"
    ):
        both.step(0)
    both.optimizer.param_groups[1]["lr"] = 0.1
    both.reference.weights["own"].grad = None
    for name in both.reference.touched:
        both.reference.touched[name].zero_()
    both.step(0)
    both.assert_equal()


class TwoCollections(nn.Module):
    """Two collections of one table each; each rank's loss uses one of them only."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first, self.second = (
            se.EmbeddingBagCollection([table]) for table in make_tables() if table.name in TWO
        )
        self.rank = rank

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        used = (self.first(batch), self.second(batch))[self.rank]
        loss: torch.Tensor = used.values().sum()
        return loss


TWO = ("fused", "own")


@spmd(world_size=2)
def test_losses_that_use_other_collections_on_each_rank_are_refused(env: Env) -> None:
    model = TwoCollections(env.rank)
    plan = se.plan_sharding(model, env, dict.fromkeys(TWO, layouts.row_wise()))
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    batch = KeyedJaggedTensor(
        keys=list(TWO), values=torch.tensor([1, 2]), lengths=torch.tensor([1, 1])
    )
    sharded(batch).backward()
    with pytest.raises(RunError, match=r"have gradients of collections \['first'\] and \['second"):
        optimizer.step()


@spmd(world_size=1)
def test_groups_that_hold_nonsense_are_refused_by_table(env: Env) -> None:
    both = Both(env)
    group = both.optimizer.param_groups[1]
    for name, value, text in (
        ("lr", "abc", "the parameter group of table 'own': Adam: lr must be"),
        ("betas", (0.9, 1.5), "the parameter group of table 'own': Adam: betas must"),
        ("max_gradient", -1.0, "the parameter group of table 'own': Adam: max_gradient must"),
    ):
        before = group[name]
        group[name] = value
        with pytest.raises(ValueError, match=text):
            both.optimizer.step()
        group[name] = before
    del group["lr"]
    with pytest.raises(ValueError, match="table 'own': Adam: lr is missing"):
        both.optimizer.step()
    group["lr"] = 0.0
    both.optimizer.step()


@spmd(world_size=2)
def test_a_refused_step_can_be_mended_and_taken_exactly_once(env: Env) -> None:
    for kernel in KERNELS:
        both = Both(env, max_norm=0.05, kernel=kernel)
        if env.is_main:
            both.optimizer.param_groups[0]["lr"] = float("nan")
        both.optimizer.zero_grad()
        both.model(batch_of(0, env.rank)).backward()
        with pytest.raises(RunError, match="lr of table 'fused' is nan"):
            both.optimizer.step()
        both.optimizer.param_groups[0]["lr"] = 0.1
        both.optimizer.step()
        again = both.model.state_dict()
        straight = Both(env, max_norm=0.05, kernel=kernel)
        straight.step(0)
        for name, expected in straight.model.state_dict().items():
            for one, other in zip(local(again[name]), local(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def local(value: Any) -> list[torch.Tensor]:
    """What a rank has of an entry of a model's state."""
    if isinstance(value, torch.Tensor) and not hasattr(value, "local_shards"):
        return [value]
    return [shard.tensor for shard in value.local_shards()]


@spmd(world_size=1)
def test_a_dense_optimizer_of_tables_is_refused(env: Env) -> None:
    model = Model(se.EmbeddingBagCollection(make_tables()))
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where(env)), env)
    with pytest.raises(ValueError, match="parameters, not only of the 2 dense ones it was given"):
        se.build_optimizer(sharded, dense=lambda _: torch.optim.SGD(sharded.parameters(), lr=0.1))
