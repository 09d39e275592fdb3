"""What sharding keeps, sets, puts in order and refuses."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from tests.sharded_sum import (
    NUM_SAMPLES,
    Sum,
    global_bags,
    make_tables,
    part,
    sharded_model,
    whole,
)
from tests.spmd import spmd


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
    size = NUM_SAMPLES // env.world_size
    other = KeyedJaggedTensor(
        keys=["other"], values=torch.full((size,), 99), lengths=torch.ones(size, dtype=torch.int64)
    )
    _, third = model(KeyedJaggedTensor.concat([other, se.keyed_jagged_tensor(turned, tables)]))
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
    with pytest.raises(ValueError, match="is for 1 rank on 1 node, this run has 2 ranks on 1 node"):
        se.shard_modules(model, se.plan_sharding(model, Env()), env)
    other = Sum(se.EmbeddingBagCollection(make_tables(optim.SGD(lr=0.1))[:2]))
    with pytest.raises(ValueError, match="table 'wide' is in the model, and not in the plan"):
        se.shard_modules(model, se.plan_sharding(other, env), env)
    hand_made = Env(rank=env.rank, world_size=2)
    mine = se.plan_sharding(model, hand_made, {"user": layouts.table_wise(rank=env.rank)})
    with pytest.raises(
        RuntimeError, match="rank 1 has another plan, other tables, weights or seed than"
    ):
        se.shard_modules(model, mine, env)
    with pytest.raises(ValueError, match="build_optimizer takes the model that shard_modules"):
        se.build_optimizer(model)
    seeded = Sum(se.EmbeddingBagCollection(make_tables(optim.SGD(lr=0.1)), seed=env.rank))
    with pytest.raises(
        RuntimeError, match="another plan, other tables, weights or seed than rank 0"
    ):
        se.shard_modules(seeded, se.plan_sharding(seeded, env), env)
    if env.rank == 1:
        mine = se.plan_sharding(model, Env())
    expected = ValueError if env.rank == 1 else RuntimeError
    with pytest.raises(expected, match="it is for 1 rank on 1 node"):
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


@spmd(world_size=1)
def test_only_a_keyed_jagged_tensor_with_a_bag_for_every_sample_is_looked_up(env: Env) -> None:
    tables = make_tables(optim.SGD(lr=0.1))
    model, _ = sharded_model(optim.SGD(lr=0.1), env)
    collection: nn.Module = get_unwrapped_module(model).get_submodule("collection")
    batch = se.keyed_jagged_tensor(global_bags(0), tables)
    by_name = collection(features=batch)
    torch.testing.assert_close(by_name.values(), collection(batch).values(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"looks up a KeyedJaggedTensor, got dict; shardemb\.key"):
        collection({"user": [1]})
    variable = KeyedJaggedTensor(
        keys=batch.keys(),
        values=torch.zeros(5, dtype=torch.int64),
        lengths=torch.ones(5, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [1], [1], [1]],
    )
    with pytest.raises(ValueError, match="features differ in their number of samples"):
        collection(variable)
