"""What from_torch keeps, names and refuses; the trained results are in the two tests beside it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from tests.spmd import spmd
from tests.torch_lookups import NUM_EMBEDDINGS, PADDING, Lookups, batch_of, samples_of

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
    return se.shard_modules(model, se.plan_sharding(model, env), env)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
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
    assert adapted[0](torch.zeros(3, 0, dtype=torch.int64)).tolist() == [[0.0] * 4] * 3
    for shape in ((), (0,), (2, 0, 3), (0, 3), (2, 1, 3)):
        ids = torch.ones(shape, dtype=torch.int64)
        assert torch.equal(adapted[1](ids), rows(ids))
        assert adapted[1](ids).dtype == dtype


def test_tables_are_named_by_path_and_trained_by_the_longest_path_given() -> None:
    model = nn.ModuleDict({"towers": nn.ModuleList([Two(), Two()]), "bag": nn.EmbeddingBag(9, 8)})
    model["towers"][1].item.weight.requires_grad_(False)
    optimizers = {"": SGD, "towers.1": optim.Adagrad(lr=0.2), "towers.1.item": SGD}
    se.from_torch(model, optimizers, skip=lambda path, module: path == "towers.0.item")
    plan = se.plan_sharding(model, Env(world_size=2), {"towers_1_user": layouts.row_wise()})
    assert {(t.table, t.module, *t.feature_names, t.optimizer) for t in plan.tables} == {
        ("towers_0_user", "towers.0.user.collection", "towers.0.user.input", "SGD"),
        ("towers_1_user", "towers.1.user.collection", "towers.1.user.input", "Adagrad"),
        ("towers_1_item", "towers.1.item.collection", "towers.1.item.input", "none"),
        ("bag", "bag.collection", "bag.input", "SGD"),
    }
    assert type(model["towers"][0].item) is nn.Embedding
    assert "bag.collection.embedding_bags.bag.weight" in model.state_dict()
    alone = se.from_torch(nn.EmbeddingBag(9, 4), SGD)
    assert se.plan_sharding(alone, Env()).tables[0].table == "model"
    with pytest.raises(ValueError, match="Two holds no nn.EmbeddingBag or nn.Embedding to convert"):
        se.from_torch(se.from_torch(Two(), SGD), SGD)
