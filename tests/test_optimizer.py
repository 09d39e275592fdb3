"""The one optimizer: schedules, clipping, several backward passes, its state and its refusals."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.every_layout import Case, check, whole_table
from tests.reference import Reference
from tests.spmd import spmd

WIDTH = 8
OPTIMIZERS: dict[str, SparseOptimizer] = {
    "fused": optim.Adagrad(lr=0.1),
    "own": optim.Adam(lr=0.1, eps=1e-4),
    "replicated": optim.RowWiseAdagrad(lr=0.1, eps=1e-4),
    "sliced": optim.RowWiseAdagrad(lr=0.1, eps=1e-4),
}
DENSE_LR = 0.1


def make_tables(**changed: Any) -> list[se.TableConfig]:
    return [
        se.TableConfig(
            name=name,
            num_embeddings=40,
            embedding_dim=WIDTH,
            feature_names=(name,),
            optimizer=optimizer,
            **changed,
        )
        for name, optimizer in OPTIMIZERS.items()
    ]


def where(env: Env) -> dict[str, Layout]:
    found: dict[str, Layout] = {
        "fused": layouts.row_wise(),
        "own": layouts.table_wise(rank=env.world_size - 1),
        "replicated": layouts.data_parallel(),
        "sliced": layouts.column_wise(ranks=range(env.world_size)),
    }
    return found


class Model(nn.Module):
    """Pooled rows through one linear layer; the loss is a mean over samples."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection
        self.linear = nn.Linear(WIDTH * len(OPTIMIZERS), 1).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, WIDTH * len(OPTIMIZERS)))
            self.linear.bias.zero_()

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.collection(batch)
        return loss_of(self.linear, torch.cat([pooled[name] for name in OPTIMIZERS], 1))


def loss_of(linear: nn.Module, pooled_BD: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (linear(pooled_BD.double()) - 1.0).square().mean()
    return loss


def batch_of(step: int, rank: int, num_samples: int = 4) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths = torch.randint(0, 4, (len(OPTIMIZERS) * num_samples,), generator=generator)
    ids_N = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys=list(OPTIMIZERS), values=ids_N, lengths=lengths)


class Both:
    """A sharded model and its float64 reference, which take the same steps.

    Args:
        env: This process.
        max_norm: Of both.
    """

    def __init__(self, env: Env, max_norm: float | None = None) -> None:
        tables = make_tables()
        plain = se.EmbeddingBagCollection(tables, device="cpu")
        self.before = {
            name.split(".")[1]: weight.detach().clone() for name, weight in plain.named_parameters()
        }
        self.env, self.max_norm = env, max_norm
        self.reference = Reference(tables, self.before)
        self.linear = Model(nn.Identity()).linear
        self.dense = torch.optim.SGD(self.linear.parameters(), lr=DENSE_LR)
        model = Model(se.EmbeddingBagCollection(tables))
        plan = se.plan_sharding(model, env, where(env))
        self.model = se.shard_modules(model, plan, env)
        self.optimizer = se.build_optimizer(
            self.model, dense=lambda p: torch.optim.SGD(p, lr=DENSE_LR), max_norm=max_norm
        )

    def step(self, step: int, num_micro_batches: int = 1) -> None:
        self.optimizer.zero_grad()
        numbers = range(step * num_micro_batches, (step + 1) * num_micro_batches)
        for number in numbers:
            (self.model(batch_of(number, self.env.rank)) / num_micro_batches).backward()
        self.optimizer.step()
        losses = []
        for number in numbers:
            for rank in range(self.env.world_size):
                pooled = self.reference.forward(batch_of(number, rank))
                losses.append(loss_of(self.linear, torch.cat([*pooled.values()], 1)))
        self.dense.zero_grad()
        torch.stack(losses).mean().backward()
        self.reference.step(max_norm=self.max_norm, dense=self.linear.parameters())
        self.dense.step()

    def assert_equal(self) -> None:
        state: dict[str, Any] = self.model.state_dict()
        for name, expected in self.reference.weights.items():
            rows = whole_table(state[f"collection.embedding_bags.{name}.weight"], self.before[name])
            torch.testing.assert_close(rows.double(), expected.detach(), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(rows, self.before[name], atol=1e-2)
        weight = state["linear.weight"]
        torch.testing.assert_close(weight, self.linear.weight.detach(), rtol=1e-5, atol=1e-6)


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
    for make, factor in SCHEDULES:
        both = Both(env)
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
    both = Both(env)
    groups = {group.get("table"): group for group in both.optimizer.param_groups}
    assert list(groups) == [*OPTIMIZERS, None]
    changed: dict[str, SparseOptimizer] = {
        "fused": optim.Adagrad(lr=0.03, eps=1e-2),
        "own": optim.Adam(lr=0.1, betas=(0.5, 0.8)),
    }
    for step in range(4):
        if step == 2:
            for name, optimizer in changed.items():
                both.reference.optimizers[name] = optimizer
                groups[name].update(vars(optimizer))
        both.step(step)
    both.assert_equal()


@spmd(world_size=2)
def test_several_backward_passes_are_one_step_on_all_their_samples(env: Env) -> None:
    both = Both(env)
    for step in range(4):
        both.step(step, num_micro_batches=3)
    both.assert_equal()


@spmd(world_size=2)
def test_gradients_of_rows_and_dense_parameters_are_clipped_by_their_norm_together(
    env: Env,
) -> None:
    both = Both(env, max_norm=0.05)
    for step in range(4):
        both.step(step)
        assert both.optimizer.grad_norm is not None
        assert both.optimizer.grad_norm > 0.05
    both.assert_equal()
    both = Both(env, max_norm=0.05)
    for step in range(3):
        both.step(step, num_micro_batches=2)
    both.assert_equal()


@spmd(world_size=2)
def test_weights_of_ids_that_want_a_gradient_are_refused(env: Env) -> None:
    model = nn.Sequential(se.EmbeddingBagCollection(make_tables(), is_weighted=True))
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where(env)), env)
    batch = batch_of(0, env.rank)
    weighted = KeyedJaggedTensor(
        keys=batch.keys(),
        values=batch.values(),
        lengths=batch.lengths(),
        weights=torch.ones(len(batch.values()), requires_grad=True),
    )
    with pytest.raises(ValueError, match="weights of ids get no gradient in a sharded lookup"):
        sharded(weighted)
    with torch.no_grad():
        sharded(weighted)


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
def test_state_is_complete_and_loads_into_an_optimizer_of_the_same_tables(env: Env) -> None:
    first = Both(env)
    for step in range(2):
        first.step(step)
    first.optimizer.param_groups[0]["lr"] = 0.07
    second = Both(env)
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
def test_a_backward_pass_after_a_step_needs_zero_grad_in_every_layout(env: Env) -> None:
    for name, layout in where(env).items():
        tables = [table for table in make_tables() if table.name == name]
        model = nn.Sequential(se.EmbeddingBagCollection(tables))
        sharded = se.shard_modules(model, se.plan_sharding(model, env, {name: layout}), env)
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
    for name in ("own", "fused"):
        tables = [table for table in make_tables() if table.name == name]
        model = nn.Sequential(se.EmbeddingBagCollection(tables))
        plan = se.plan_sharding(model, env, {name: layouts.row_wise()})
        sharded = se.shard_modules(model, plan, env)
        batch = KeyedJaggedTensor(
            keys=[name], values=torch.tensor([1, 39]), lengths=torch.tensor([1, 1])
        )
        with pytest.raises(RunError, match=f"table '{name}' has a gradient and no optimizer"):
            sharded(batch).values().sum().backward()


@spmd(world_size=2)
def test_a_second_step_changes_no_table_again(env: Env) -> None:
    both = Both(env)
    both.step(0)
    (linear, bias) = both.optimizer.dense_parameters.values()
    linear.grad = bias.grad = None
    both.optimizer.step()
    both.assert_equal()


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
    both = Both(env, max_norm=0.05)
    if env.is_main:
        both.optimizer.param_groups[0]["lr"] = float("nan")
    both.optimizer.zero_grad()
    both.model(batch_of(0, env.rank)).backward()
    with pytest.raises(RunError, match="lr of table 'fused' is nan"):
        both.optimizer.step()
    both.optimizer.param_groups[0]["lr"] = 0.1
    both.optimizer.step()
    again = both.model.state_dict()
    straight = Both(env, max_norm=0.05)
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
    check(env, Case(tables=tables, where=where, num_samples=[4] * 3))


@spmd(world_size=1)
def test_bfloat16_rows_are_refused_by_name_on_cpu(env: Env) -> None:
    model = nn.Sequential(se.EmbeddingBagCollection(make_tables(dtype="bfloat16")))
    plan = se.plan_sharding(model, env, dict.fromkeys(OPTIMIZERS, layouts.table_wise(rank=0)))
    with pytest.raises(ValueError, match="table 'fused': bfloat16 rows cannot be looked up on cpu"):
        se.shard_modules(model, plan, env)


def rows_of(env: Env, layout: Layout, rounding: str, num_steps: int) -> torch.Tensor:
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
    sharded = se.shard_modules(model, se.plan_sharding(model, env, {"small": layout}), env)
    optimizer = se.build_optimizer(sharded)
    batch = KeyedJaggedTensor(keys=["small"], values=torch.arange(10), lengths=torch.tensor([10]))
    for _ in range(num_steps):
        optimizer.zero_grad()
        sharded(batch).values().sum().backward()
        optimizer.step()
    weight = sharded.state_dict()["0.embedding_bags.small.weight"]
    return whole_table(weight, torch.empty(10, 8, dtype=torch.float16))


@spmd(world_size=2)
def test_stochastic_rounding_keeps_small_updates_and_is_the_same_in_every_layout(env: Env) -> None:
    kinds: list[Layout] = [
        layouts.table_wise(rank=1),
        layouts.row_wise(),
        layouts.column_wise(ranks=[1, 0]),
    ]
    first, *others = [rows_of(env, layout, "stochastic", 60) for layout in kinds]
    for other in others:
        assert torch.equal(first, other)
    expected = 1 - 60 * 2 * 1e-5 / env.world_size  # the gradient of each rank's batch counts half
    assert abs(float(first.double().mean()) - expected) < 3e-4 / 80**0.5 * 60**0.5
    assert len(first.unique()) > 1
    nearest = rows_of(env, layouts.row_wise(), "nearest", 60)
    assert torch.equal(nearest, torch.ones_like(nearest))
