"""Plans: made without processes, exact where named, refused where impossible."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchrec
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType, PoolingType

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import Layout


def table(name: str, num_embeddings: int = 100, **changed: Any) -> se.TableConfig:
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": num_embeddings,
        "embedding_dim": 8,
        "feature_names": (name,),
        "optimizer": optim.RowWiseAdagrad(lr=0.1),
    }
    return se.TableConfig(**fields | changed)


def collection(*names: str) -> torchrec.EmbeddingBagCollection:
    return se.EmbeddingBagCollection([table(name) for name in names])


def test_named_layouts_are_honoured_exactly() -> None:
    where: dict[str, Layout] = {"a": layouts.row_wise(), "b": layouts.table_wise(rank=2)}
    plan = se.plan_sharding(collection("a", "b", "c"), Env(world_size=4, num_nodes=2), where)
    a, b, c = plan.tables
    assert [(s.rank, s.first_row, s.num_rows) for s in a.shards] == [
        (0, 0, 25),
        (1, 25, 25),
        (2, 50, 25),
        (3, 75, 25),
    ]
    assert [(s.rank, s.num_rows) for s in b.shards] == [(2, 100)]
    assert (a.chosen_by, b.chosen_by) == ("named", "named")
    assert c.chosen_by.startswith("planner: ")
    assert b.shards[0].weight_bytes == 100 * 8 * 4
    assert b.shards[0].optimizer_bytes == 100 * 4


def test_uneven_rows_leave_the_last_rank_the_rest() -> None:
    model = se.EmbeddingBagCollection([table("a", 10)])
    plan = se.plan_sharding(model, Env(world_size=4), {"a": layouts.row_wise()})
    assert [s.num_rows for s in plan.tables[0].shards] == [3, 3, 3, 1]


def test_the_planner_balances_what_is_not_named() -> None:
    names = [f"t{i}" for i in range(8)]
    plan = se.plan_sharding(collection(*names), Env(world_size=4))
    assert max(plan.bytes_per_rank) == min(plan.bytes_per_rank)
    again = se.plan_sharding(collection(*names), Env(world_size=4, rank=3))
    assert again.to_json() == plan.to_json()


def test_a_thousand_ranks_need_no_processes() -> None:
    model = se.EmbeddingBagCollection([table("a", 10_000_000)])
    env = Env(world_size=1024, num_nodes=128, device=torch.device("cuda"))
    plan = se.plan_sharding(model, env, {"a": layouts.row_wise()})
    assert sum(s.num_rows for s in plan.tables[0].shards) == 10_000_000
    assert "0-1023" in str(plan)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (
            {"usr": layouts.row_wise()},
            "name table 'usr', the model has 'user', 'tiny'; did you mean 'us",
        ),
        ({"user": "row_wise"}, "table 'user': the layout must come from shardemb.layouts"),
        (
            {"user": layouts.table_wise(rank=4)},
            r"table 'user': table_wise\(rank=4\) is planned for 4 ranks; use ranks in 0..3",
        ),
        ({"tiny": layouts.row_wise()}, "table 'tiny': row_wise over 4 ranks leaves a rank without"),
    ],
)
def test_an_impossible_layout_is_refused(where: dict[str, Any], text: str) -> None:
    model = se.EmbeddingBagCollection([table("user"), table("tiny", 5)])
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(model, Env(world_size=4), where)


def test_ids_of_a_feature_that_no_table_looks_up_are_refused() -> None:
    model = se.EmbeddingBagCollection([table("a"), table("b", feature_names=("bought", "seen"))])
    workload = se.Workload(ids_per_sample={"bougt": 50})
    text = (
        r"names feature 'bougt', the tables look up 'a', 'bought', 'seen'; did you mean 'bought'\?"
    )
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(model, Env(), workload=workload)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer, got 2.5"),
        ({"batch_size": "8"}, "batch_size must be a positive integer, got '8'"),
        ({"batch_size": True}, "batch_size must be a positive integer, got True"),
        ({"ids_per_sample": ["a"]}, r"ids_per_sample must be numbers by feature, .* got \['a'\]"),
        ({"ids_per_sample": {"a": "2"}}, "of feature 'a' must be a number from 0, got '2'"),
        ({"ids_per_sample": {"a": True}}, "of feature 'a' must be a number from 0, got True"),
        ({"ids_per_sample": {"a": -1}}, "of feature 'a' must be a number from 0, got -1"),
        ({"profile": "clicks"}, r"got 'clicks'; use shardemb\.load_profile\('clicks'\)$"),
    ],
)
def test_an_impossible_workload_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"workload: .*{text}"):
        se.Workload(**fields)


@pytest.mark.parametrize("where", [4, None, "h100"])
def test_what_names_no_ranks_is_refused(where: Any, tmp_path: Path) -> None:
    text = f"the ranks must be the Env of init_distributed, or a Cluster .*, got {where!r}"
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(collection("a"), where)
    with pytest.raises(ValueError, match=text):
        se.load_plan(tmp_path / "plan.json", collection("a"), where)


def test_layouts_that_are_no_mapping_are_refused() -> None:
    named: Any = [layouts.row_wise()]
    with pytest.raises(ValueError, match=r"layouts must be given by table name, such as .*RowWise"):
        se.plan_sharding(collection("a"), Env(), named)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be a number from 0, got -1"):
        layouts.table_wise(rank=-1)
    ranks: Any = [0, None]
    with pytest.raises(ValueError, match="column_wise: ranks must be a number from 0, got None"):
        layouts.column_wise(ranks)


def test_a_model_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no unsharded EmbeddingBagCollection"):
        se.plan_sharding(nn.Linear(1, 1), Env())


def test_one_name_in_two_collections_is_refused() -> None:
    model = nn.ModuleList([collection("a"), collection("a")])
    with pytest.raises(
        ValueError, match="table 'a' is in two collections, '0' and '1'; rename one"
    ):
        se.plan_sharding(model, Env())


def torchrec_collection(**options: Any) -> torchrec.EmbeddingBagCollection:
    fields = {name: options.pop(name) for name in ("data_type", "pooling") if name in options}
    config = EmbeddingBagConfig(
        name="a", num_embeddings=10, embedding_dim=8, feature_names=["a"], **fields
    )
    return torchrec.EmbeddingBagCollection([config], device=torch.device("meta"), **options)


def attach(model: nn.Module, optimizer: type[torch.optim.Optimizer], **options: float) -> nn.Module:
    _apply_optimizer_in_backward(optimizer, model.parameters(), options)
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (torchrec_collection, "table 'a' has no optimizer, and needs one"),
        (
            lambda: attach(torchrec_collection(), torch.optim.SGD, lr=0.1, maximize=True),
            "table 'a': optimizer SGD was given maximize, which is not honoured; give only",
        ),
        (
            lambda: attach(torchrec_collection(), torch.optim.RMSprop, lr=0.1),
            "table 'a': optimizer RMSprop is not supported; use one of shardemb.optim: SGD",
        ),
        (
            lambda: attach(
                attach(torchrec_collection(), torch.optim.SGD, lr=0.1), torch.optim.SGD, lr=0.1
            ),
            "table 'a' has 2 optimizers, and needs one",
        ),
        (
            lambda: attach(torchrec_collection(), torch.optim.SGD),
            "table 'a': optimizer SGD was not given lr, and FBGEMM's default is not torch's",
        ),
        (
            lambda: attach(torchrec_collection(), torch.optim.Adagrad, lr=0.1),
            "table 'a': optimizer Adagrad was not given eps, and FBGEMM's default is not torch's",
        ),
        (
            lambda: torchrec_collection(data_type=DataType.INT8),
            "table 'a': data_type INT8 is not supported; use FP32, FP16 or BF16",
        ),
        (
            lambda: attach(
                torchrec_collection(is_weighted=True, pooling=PoolingType.MEAN),
                torch.optim.SGD,
                lr=0.1,
            ),
            "table 'a': a weighted bag has no mean in torch; use pooling='sum'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(make(), Env())


def test_a_collection_held_twice_is_refused() -> None:
    model = nn.Module()
    model.a = model.b = collection("x")
    with pytest.raises(ValueError, match="one collection is in the model twice, as 'a' and 'b'"):
        se.plan_sharding(model, Env())


def test_what_does_not_fit_is_refused() -> None:
    tables = [table(f"t{i}", 2**31 - 1, embedding_dim=128) for i in range(4)]
    model = se.EmbeddingBagCollection(tables)
    there = r"and 109 GiB are left there: 128 GiB of memory, less 0.15 of it as headroom"
    text = f"table 't0' as row_wise needs 516 GiB on rank 0, {there}"
    with pytest.raises(RunError, match=text):
        se.plan_sharding(model, Env(world_size=2))
    where: dict[str, Layout] = {t.name: layouts.row_wise() for t in tables}
    with pytest.raises(RunError, match=text):
        se.plan_sharding(model, Env(world_size=2), where)
    text = f"table 't1' as table_wise needs 1.01 TiB on rank 1, {there}"
    with pytest.raises(RunError, match=text):
        se.plan_sharding(model, Env(world_size=2), {"t1": layouts.table_wise(rank=1)})


def test_the_planner_places_the_others_around_named_ranks() -> None:
    tables = [table(name, 1_000_000) for name in ("big", "other")] + [table("small", 100)]
    for rank in (0, 1):
        where: dict[str, Layout] = {name: layouts.table_wise() for name in ("other", "small")}
        where["big"] = layouts.table_wise(rank=rank)
        plan = se.plan_sharding(se.EmbeddingBagCollection(tables), Env(world_size=2), where)
        assert {t.table: t.shards[0].rank for t in plan.tables}["big"] == rank
        assert {t.table: t.shards[0].rank for t in plan.tables}["other"] == 1 - rank


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"world_size": 3, "num_nodes": 2}, "world_size must be a positive multiple of num_nodes"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0..1, got 2"),
    ],
)
def test_an_impossible_env_is_refused(fields: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Env(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [se.EmbeddingBagCollection, se.EmbeddingCollection])
def test_two_outputs_of_one_name_are_refused(make: Any) -> None:
    tables = [
        table("t", feature_names=("f",)),
        table("u", feature_names=("f",)),
        table("v", feature_names=("f@t",)),
    ]
    with pytest.raises(ValueError, match="collection '' has two outputs 'f@t': of a feature of"):
        se.plan_sharding(make(tables), Env())
