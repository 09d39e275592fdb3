"""What from_torch keeps, names and refuses; the trained results are in the two tests beside it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.modules.discovery import find_collections, tables_of
from shardemb.optim import SparseOptimizer
from tests.converted import torch_optimizer, weights_of
from tests.spmd import spmd
from tests.torch_lookups import Lookups, batch_of, samples_of

SGD = optim.SGD(lr=0.1)
WEIGHTED = ("bags.weighted", "bags.at_times_weighted")


class Two(nn.Module):
    """A pooled and a sequence table, and something dense."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(9, 4, **{"mode": "sum"} | options)
        self.item = nn.Embedding(7, 4)
        self.top = nn.Linear(4, 1)


def shard(model: nn.Module, env: Env) -> nn.Module:
    sharded: nn.Module = se.shard_modules(model, se.plan_sharding(model, env), env)
    return sharded


def test_an_unsharded_converted_model_computes_and_trains_as_before() -> None:
    torch.manual_seed(0)
    plain = Lookups(width=8)
    model = copy.deepcopy(plain)
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dense = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    assert se.from_torch(model, SGD, weighted=WEIGHTED) is model
    batch = batch_of(samples_of(0, 9), torch.float32)
    expected = plain.outputs(batch)
    for name, out in model.outputs(batch).items():
        torch.testing.assert_close(out, expected[name], rtol=1e-6, atol=1e-6)
        assert out.requires_grad == expected[name].requires_grad == ("frozen" not in name)
    for each, optimizer in ((model, given), (plain, dense)):
        each(batch).backward()
        optimizer.step()
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("include_last_offset", [True, False])
def test_calls_without_ids_or_bags_return_what_torch_returns(
    mode: str, dtype: torch.dtype, include_last_offset: bool
) -> None:
    bag = nn.EmbeddingBag(
        9, 4, mode=mode, include_last_offset=include_last_offset, padding_idx=-1, dtype=dtype
    )
    rows = nn.Embedding(9, 4, dtype=dtype)
    adapted = se.from_torch(copy.deepcopy(nn.ModuleList([bag, rows])), SGD)
    none = torch.zeros(0, dtype=torch.int64)
    no_bags = torch.zeros(int(include_last_offset), dtype=torch.int64)
    of_bags = [
        (none, no_bags),
        (none, torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(0, 3, dtype=torch.int64),),
        (torch.tensor([[8, 8], [1, 8]]),),
    ]
    for args in of_bags:
        assert torch.equal(adapted[0](*args), bag(*args))
    for table in tables_of(find_collections(adapted)).values():
        assert table.dtype == str(dtype)[6:]
        assert table.padding_idx == (8 if table.pooling else None)
    assert adapted[0](torch.zeros(3, 0, dtype=torch.int64)).tolist() == [[0.0] * 4] * 3
    for shape in ((), (0,), (2, 0, 3), (0, 3), (2, 1, 3)):
        ids = torch.ones(shape, dtype=torch.int64)
        assert torch.equal(adapted[1](ids), rows(ids))
        assert adapted[1](ids).dtype == dtype


def test_tables_are_named_by_path_and_trained_by_the_longest_path_given() -> None:
    towers = nn.ModuleList([first := Two(), second := Two()])
    model = nn.ModuleDict({"towers": towers, "bag": nn.EmbeddingBag(9, 8)})
    second.item.requires_grad_(False)
    optimizers: dict[str, SparseOptimizer] = {
        "": SGD,
        "towers.1": optim.Adagrad(lr=0.2),
        "towers.1.item": SGD,
    }
    se.from_torch(model, optimizers, skip=lambda _, module: module is first.item)
    plan = se.plan_sharding(model, Env(world_size=2), {"towers_1_user": layouts.row_wise()})
    assert {(t.table, t.module, *t.feature_names, t.optimizer) for t in plan.tables} == {
        ("towers_0_user", "towers.0.user.collection", "towers.0.user.input", "SGD"),
        ("towers_1_user", "towers.1.user.collection", "towers.1.user.input", "Adagrad"),
        ("towers_1_item", "towers.1.item.collection", "towers.1.item.input", "none"),
        ("bag", "bag.collection", "bag.input", "SGD"),
    }
    assert type(first.item) is nn.Embedding
    assert "bag.collection.embedding_bags.bag.weight" in model.state_dict()
    alone = se.from_torch(nn.EmbeddingBag(9, 4), SGD)
    assert se.plan_sharding(alone, Env()).tables[0].table == "model"
    with pytest.raises(ValueError, match=r"Two holds no nn\.EmbeddingBag or "):
        se.from_torch(se.from_torch(Two(), SGD), SGD)


class Ratings(nn.Module):
    """Calls its modules through a list that torch does not know of, each `times` times."""

    def __init__(self, *, times: int = 1, frozen: bool = False) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(9, 4, mode="sum")
        self.item = nn.Embedding(7, 4).requires_grad_(not frozen)
        self.calls = [self.user, *[self.item] * times]

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        user, *items = self.calls
        loss_B = user(batch["users"]).square().sum(1)
        for item in items:
            loss_B = loss_B + item(batch["items"]).square().sum((1, 2))
        loss: torch.Tensor = loss_B.mean()
        return loss


def ratings(user: int = 3) -> dict[str, torch.Tensor]:
    return {"users": torch.tensor([[1, 2], [2, user]]), "items": torch.tensor([[1, 2], [6, 0]])}


@spmd(world_size=2)
def test_sharded_modules_are_known_to_all_that_refers_to_them(env: Env) -> None:
    torch.manual_seed(0)
    model = Ratings()
    plain = copy.deepcopy(model)
    shapes = []
    model.user.register_forward_hook(lambda module, args, out: shapes.append(out.shape))  # noqa: ARG005
    sharded = shard(se.from_torch(model, SGD), env)
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    expected = plain(ratings())
    ((_, loss),) = pipeline.run([ratings()], 1)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=1e-6)
    assert shapes == [(2, 4)]
    assert (model.user.mode, model.item.num_embeddings) == ("sum", 7)
    assert "AdaptedEmbeddingBag" in repr(model)
    with pytest.raises(AttributeError, match="module 'item' is sharded and has no whole weight"):
        assert model.item.weight
    with pytest.raises(
        ValueError, match=r"module 'user': id 9 of sample 1 is outside 0\.\.8; .* has 9 rows"
    ):
        model.user(torch.tensor([1, 9]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"module 'item': id -1 of sample 1 is outside 0\.\.6"):
        model.item(torch.tensor([[1, 2], [-1, 0]]))
    with pytest.raises(ValueError, match="in a DistributedDataParallel already; convert it before"):
        se.from_torch(nn.parallel.DistributedDataParallel(plain), SGD)


@spmd(world_size=2)
def test_lookups_of_one_module_in_a_step_are_updated_once_as_in_torch(env: Env) -> None:
    for layout in (layouts.row_wise(), layouts.table_wise(rank=0), layouts.data_parallel()):
        for frozen in (False, True):
            torch.manual_seed(0)
            model = Ratings(times=3, frozen=frozen)
            plain = copy.deepcopy(model)
            dense = torch_optimizer(plain, SGD)
            se.from_torch(model, SGD)
            plan = se.plan_sharding(model, env, {"user": layout, "item": layout})
            sharded = se.shard_modules(model, plan, env)
            pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
            for _, loss in pipeline.run([ratings()] * 2, 2):
                expected = plain(ratings())
                dense.zero_grad()
                expected.backward()
                dense.step()
                torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=1e-6)
            after = weights_of(sharded, plain)
            for name, weight in plain.state_dict().items():
                torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-6)


@spmd(world_size=2)
def test_float16_modules_return_float16_and_are_updated_once(env: Env) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList(
        [nn.EmbeddingBag(9, 8, mode="sum"), nn.EmbeddingBag(9, 8), nn.Embedding(9, 8)]
    ).half()
    ids, weights = torch.tensor([[1, 2], [2, 3]]), torch.rand(2, 2).half()
    model = se.from_torch(copy.deepcopy(plain), SGD, weighted=["0"])
    where: dict[str, Layout] = {
        "0": layouts.row_wise(),
        "1": layouts.row_wise(),
        "2": layouts.column_wise([0, 1]),
    }
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where), env)
    optimizer = se.build_optimizer(sharded)
    outputs = []
    for bag, mean, rows in (plain, model):
        out = [bag(ids, per_sample_weights=weights), mean(ids), rows(ids)]
        assert {each.dtype for each in out} == {torch.float16}
        torch.stack([each.float().square().sum() for each in out]).sum().backward()
        outputs.append(out)
    optimizer.step()
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    after = weights_of(sharded, plain)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(after[name], weight.float(), rtol=2e-3, atol=2e-3)
