"""Sharded tables against unsharded plain torch in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.reference import Reference
from tests.spmd import spmd

OPTIMIZERS: list[SparseOptimizer] = [
    optim.SGD(lr=0.5),
    optim.Adagrad(lr=0.1),
    optim.RowWiseAdagrad(lr=0.1, eps=1e-6),
]
NUM_SAMPLES = 8


def make_tables(optimizer: SparseOptimizer) -> list[se.TableConfig]:
    uniform = init.Uniform(low=-1.0, high=1.0)
    return [
        se.TableConfig(
            name="user",
            num_embeddings=101,
            embedding_dim=8,
            feature_names=("user",),
            optimizer=optimizer,
            init=uniform,
        ),
        se.TableConfig(
            name="item",
            num_embeddings=37,
            embedding_dim=8,
            feature_names=("item", "clicked"),
            pooling="mean",
            optimizer=optimizer,
            init=uniform,
        ),
        se.TableConfig(
            name="wide",
            num_embeddings=64,
            embedding_dim=16,
            feature_names=("tag",),
            optimizer=optimizer,
            init=uniform,
        ),
    ]


LAYOUTS: dict[str, Layout] = {
    "user": layouts.row_wise(),
    "item": layouts.table_wise(rank=0),
    "wide": layouts.row_wise(),
}


def global_bags(step: int) -> dict[str, list[list[int]]]:
    """Bags of 0 to 4 ids, half of them from a few, so that ids repeat in a bag and between bags."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"user": 101, "item": 37, "clicked": 37, "tag": 64}
    bags: dict[str, list[list[int]]] = {}
    for feature, size in sizes.items():
        bags[feature] = []
        for _ in range(NUM_SAMPLES):
            length = int(torch.randint(0, 5, (1,), generator=generator))
            ids = torch.randint(0, size // 2, (length,), generator=generator)
            bags[feature].append([int(i) if k % 2 else int(i) % 3 for k, i in enumerate(ids)])
    return bags


class Sum(nn.Module):
    """A loss that weighs every output differently."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: KeyedJaggedTensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pooled = self.collection(batch).to_dict()
        return loss_of(pooled), pooled


def loss_of(pooled: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = torch.zeros((), dtype=next(iter(pooled.values())).dtype)
    for position, feature in enumerate(sorted(pooled)):
        out_BD = pooled[feature]
        ramp = torch.linspace(0.5, 2.0, out_BD.shape[1], dtype=out_BD.dtype) * (position + 1)
        loss = loss + (out_BD * ramp).sum(1).square().mean()
    return loss


def part(bags: dict[str, list[list[int]]], env: Env) -> dict[str, list[list[int]]]:
    size = NUM_SAMPLES // env.world_size
    return {feature: of[env.rank * size : (env.rank + 1) * size] for feature, of in bags.items()}


def whole(tensor: ShardedTensor, env: Env) -> torch.Tensor | None:
    """The whole of a sharded tensor, on rank 0."""
    out = torch.empty(tensor.size()) if env.is_main else None
    tensor.gather(dst=0, out=out)
    return out


def sharded_model(
    optimizer: SparseOptimizer, env: Env, where: dict[str, Layout] = LAYOUTS, seed: int = 3
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Sum(se.EmbeddingBagCollection(make_tables(optimizer), seed=seed))
    plan = se.plan_sharding(model, env, where)
    sharded = se.shard_modules(model, plan, env)
    return sharded, se.build_optimizer(sharded)


def check_against_reference(env: Env, optimizer: SparseOptimizer, where: dict[str, Layout]) -> None:
    tables = make_tables(optimizer)
    model, combined = sharded_model(optimizer, env, where)
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
            expected_state = reference.state[table.name]
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
    check_against_reference(env, optimizer, LAYOUTS)
    swapped: dict[str, Layout] = {
        "user": layouts.table_wise(rank=1),
        "item": layouts.row_wise(),
        "wide": layouts.table_wise(rank=0),
    }
    check_against_reference(env, optimizer, swapped)


@spmd(world_size=1)
def test_one_rank_equals_unsharded_float64(env: Env) -> None:
    for optimizer in OPTIMIZERS:
        check_against_reference(env, optimizer, LAYOUTS)


@spmd(world_size=4)
def test_four_ranks_equal_unsharded_float64(env: Env) -> None:
    check_against_reference(
        env, optim.RowWiseAdagrad(lr=0.1), LAYOUTS | {"item": layouts.table_wise(rank=3)}
    )


@spmd(world_size=2)
def test_first_rows_do_not_depend_on_layout_rank_or_seeded_generators(env: Env) -> None:
    torch.manual_seed(100 + env.rank)
    tables = make_tables(optim.SGD(lr=0.1))
    plain = se.EmbeddingBagCollection(tables, seed=3, device="cpu").embedding_bags
    other_seed = se.EmbeddingBagCollection(tables, seed=4, device="cpu").embedding_bags
    layout: Layout
    for layout in (layouts.row_wise(), layouts.table_wise(rank=1)):
        where = {table.name: layout for table in tables}
        model, _ = sharded_model(optim.SGD(lr=0.1), env, where)
        for table in tables:
            key = f"collection.embedding_bags.{table.name}.weight"
            weight = whole(model.state_dict()[key], env)
            if weight is not None:
                assert torch.equal(weight, plain[table.name].weight)
                assert not torch.equal(weight, other_seed[table.name].weight)


@spmd(world_size=2)
def test_weights_of_torchrec_s_own_collection_are_carried_over_from_rank_0(env: Env) -> None:
    torch.manual_seed(env.rank)
    configs = [
        EmbeddingBagConfig(name="a", num_embeddings=70, embedding_dim=8, feature_names=["a"]),
        EmbeddingBagConfig(name="b", num_embeddings=30, embedding_dim=4, feature_names=["b"]),
    ]
    collection = EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))
    of_main = {}
    for name, bag in collection.embedding_bags.items():
        of_main[name] = bag.weight.detach().clone()
        torch.distributed.broadcast(of_main[name], src=0)
        assert env.is_main == torch.equal(of_main[name], bag.weight)
        _apply_optimizer_in_backward(torch.optim.SGD, [bag.weight], {"lr": 0.1})
    model = Sum(collection)
    plan = se.plan_sharding(model, env, {"a": layouts.row_wise(), "b": layouts.table_wise(rank=1)})
    sharded = se.shard_modules(model, plan, env)
    for name, expected in of_main.items():
        weight = whole(sharded.state_dict()[f"collection.embedding_bags.{name}.weight"], env)
        assert weight is None or torch.equal(weight, expected)


@spmd(world_size=2)
def test_a_torchrec_collection_on_meta_gets_rows_that_differ_between_shards(env: Env) -> None:
    config = EmbeddingBagConfig(name="a", num_embeddings=64, embedding_dim=8, feature_names=["a"])
    collection = EmbeddingBagCollection(tables=[config], device=torch.device("meta"))
    _apply_optimizer_in_backward(
        torch.optim.SGD, [collection.embedding_bags["a"].weight], {"lr": 0.1}
    )
    model = Sum(collection)
    plan = se.plan_sharding(model, env, {"a": layouts.row_wise()})
    torch.manual_seed(0)  # the same on both ranks, under which TorchRec's own shards start equal
    sharded = se.shard_modules(model, plan, env)
    weight = whole(sharded.state_dict()["collection.embedding_bags.a.weight"], env)
    if weight is not None:
        assert not torch.equal(weight[:32], weight[32:])
        assert weight.abs().max() <= 1 / 8
        assert weight.std() > 0.05


@spmd(world_size=2)
def test_keys_in_another_order_give_the_same_features(env: Env) -> None:
    tables = make_tables(optim.SGD(lr=0.1))
    model, _ = sharded_model(optim.SGD(lr=0.1), env)
    bags = part(global_bags(0), env)
    _, first = model(se.keyed_jagged_tensor(bags, tables))
    turned = dict(reversed(bags.items()))
    _, second = model(se.keyed_jagged_tensor(turned, tables))
    extra = {"other": [[99]] * (NUM_SAMPLES // env.world_size)} | turned
    _, third = model(se.keyed_jagged_tensor(extra, tables))
    narrow = se.keyed_jagged_tensor(bags, tables)
    if env.rank == 1:  # ids and lengths of another dtype on one rank only
        narrow = KeyedJaggedTensor(
            keys=narrow.keys(), values=narrow.values().int(), lengths=narrow.lengths().int()
        )
    _, fourth = model(narrow)
    for feature, out_BD in first.items():
        assert torch.equal(out_BD, second[feature])
        assert torch.equal(out_BD, third[feature])
        assert torch.equal(out_BD, fourth[feature])
    assert not torch.equal(first["item"], first["clicked"])


@spmd(world_size=2)
def test_a_learning_rate_reaches_rows_and_dense_on_the_very_next_step(env: Env) -> None:
    table = se.TableConfig(
        name="t",
        num_embeddings=4,
        embedding_dim=4,
        feature_names=("t",),
        optimizer=optim.SGD(lr=0.5),
    )

    class WithDense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collection = se.EmbeddingBagCollection([table])
            self.bias = nn.Parameter(torch.zeros(()))

        def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
            pooled_BD: torch.Tensor = self.collection(batch).values()
            return pooled_BD.sum(1).mean() + self.bias

    model = WithDense()
    plan = se.plan_sharding(model, env, {"t": layouts.table_wise(rank=0)})
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.SGD(p, lr=0.25))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    weights, biases = [], []
    for _ in range(4):
        state = sharded.state_dict()
        weight = whole(state["collection.embedding_bags.t.weight"], env)
        weights.append(0.0 if weight is None else float(weight[2, 0]))
        biases.append(float(state["bias"]))
        optimizer.zero_grad()
        sharded(se.keyed_jagged_tensor({"t": [[2]]}, [table])).backward()
        optimizer.step()
        schedule.step()
    steps = [round(b - a, 5) for a, b in itertools.pairwise(biases)]
    assert steps == [-0.25, -0.125, -0.0625]
    if env.is_main:
        steps = [round(b - a, 5) for a, b in itertools.pairwise(weights)]
        assert steps == [-0.5, -0.25, -0.125]


@spmd(world_size=2)
def test_what_cannot_be_sharded_is_refused_on_every_rank(env: Env) -> None:
    model = Sum(se.EmbeddingBagCollection(make_tables(optim.SGD(lr=0.1))))
    with pytest.raises(ValueError, match="the plan is for 1 ranks, this run has 2; plan again"):
        se.shard_modules(model, se.plan_sharding(model, Env()), env)
    other = Sum(se.EmbeddingBagCollection(make_tables(optim.SGD(lr=0.1))[:2]))
    with pytest.raises(ValueError, match=r"differ in tables \['wide'\]"):
        se.shard_modules(model, se.plan_sharding(other, env), env)
    mine = se.plan_sharding(model, env, {"user": layouts.table_wise(rank=env.rank)})
    with pytest.raises(
        RuntimeError, match="rank 1 has another plan, other tables or another seed than"
    ):
        se.shard_modules(model, mine, env)
    with pytest.raises(ValueError, match="build_optimizer takes the model that shard_modules"):
        se.build_optimizer(model)
    seeded = Sum(se.EmbeddingBagCollection(make_tables(optim.SGD(lr=0.1)), seed=env.rank))
    with pytest.raises(
        RuntimeError, match="another plan, other tables or another seed than rank 0"
    ):
        se.shard_modules(seeded, se.plan_sharding(seeded, env), env)
    if env.rank == 1:
        mine = se.plan_sharding(model, Env())
    expected = ValueError if env.rank == 1 else RuntimeError
    with pytest.raises(expected, match="the plan is for 1 ranks"):
        se.shard_modules(model, mine, env)


@spmd(world_size=1)
def test_a_model_with_dense_parameters_needs_their_optimizer(env: Env) -> None:
    model = nn.ModuleList(
        [se.EmbeddingBagCollection(make_tables(optim.SGD(lr=1))), nn.Linear(2, 2)]
    )
    sharded = se.shard_modules(model, se.plan_sharding(model, env), env)
    with pytest.raises(ValueError, match=r"2 dense parameters, such as '1.weight'; give build_opt"):
        se.build_optimizer(sharded)


@spmd(world_size=1)
def test_an_init_fn_that_cannot_be_drawn_by_shards_is_refused(env: Env) -> None:
    config = EmbeddingBagConfig(
        name="a", num_embeddings=64, embedding_dim=8, feature_names=["a"], init_fn=nn.init.zeros_
    )
    collection = EmbeddingBagCollection(tables=[config], device=torch.device("meta"))
    _apply_optimizer_in_backward(
        torch.optim.SGD, [collection.embedding_bags["a"].weight], {"lr": 0.1}
    )
    with pytest.raises(ValueError, match="table 'a' is on meta and has an init_fn of its own"):
        se.shard_modules(collection, se.plan_sharding(collection, env), env)


@spmd(world_size=2)
def test_features_come_in_the_declared_order_under_every_layout(env: Env) -> None:
    tables = make_tables(optim.SGD(lr=0.1))
    plain = se.EmbeddingBagCollection(tables, seed=3, device="cpu")
    expected = plain(se.keyed_jagged_tensor(part(global_bags(0), env), tables))
    mixed: dict[str, Layout] = {"user": layouts.row_wise(), "item": layouts.table_wise(rank=0)}
    for where in (mixed, mixed | {"user": layouts.table_wise(rank=1), "item": layouts.row_wise()}):
        model, _ = sharded_model(optim.SGD(lr=0.1), env, where | {"wide": layouts.row_wise()})
        sharded: nn.Module = get_unwrapped_module(model).get_submodule("collection")
        pooled = sharded(se.keyed_jagged_tensor(part(global_bags(0), env), tables))
        assert pooled.keys() == expected.keys() == ["user", "item", "clicked", "tag"]
        assert pooled.length_per_key() == [8, 8, 8, 16]
        torch.testing.assert_close(pooled.values(), expected.values(), rtol=1e-5, atol=1e-5)
