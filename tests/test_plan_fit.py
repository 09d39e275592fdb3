"""`load_plan`: a plan that fits comes back, one that does not is refused with all that changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardemb as se
from shardemb import layouts, optim
from shardemb.errors import OtherRankError
from shardemb.layouts import Layout
from shardemb.modules.discovery import find_collections
from shardemb.plans.fit import check_fits
from tests.plans import ENV, LAYOUTS, every_layout, model, table, tables
from tests.spmd import spmd


@pytest.fixture
def path(tmp_path: Path) -> Path:
    every_layout().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def refused(path: Path, made: Any, where: se.Env | se.Cluster = ENV) -> list[str]:
    """The reasons for which a plan is refused."""
    with pytest.raises(ValueError, match="does not fit") as error:
        se.load_plan(path, made, where)
    first, *reasons, last = str(error.value).splitlines()
    assert first == f"the plan in {path} does not fit:"
    assert last == "plan again, or change back what changed"
    return [reason.strip() for reason in reasons]


def test_a_plan_that_fits_comes_back_equal(path: Path) -> None:
    plan = every_layout()
    assert se.load_plan(path, model(), ENV) == plan
    assert se.load_plan(str(path), model(), plan.cluster) == plan

    fbgemm = every_layout(kernel="fbgemm")
    fbgemm.save(path)
    cuda = replace(plan.cluster, name="other", device="cuda")
    assert se.load_plan(path, model(), cuda) == fbgemm


def test_shards_of_no_layout_are_refused_with_the_way_out() -> None:
    plan = every_layout()
    check_fits(plan, find_collections(model()), ENV, "the plan")
    (at,) = (number for number, table in enumerate(plan.tables) if table.table == "user")
    placed = plan.tables[at]
    backwards = replace(placed, shards=placed.shards[::-1])
    tables = (*plan.tables[:at], backwards, *plan.tables[at + 1 :])
    with pytest.raises(
        ValueError, match="'user': its shards are those of no layout; make the plan with plan_shar"
    ):
        check_fits(replace(plan, tables=tables), find_collections(model()), ENV, "the plan")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_embeddings": 2000}, "num_embeddings is 2000, the plan was made for 1000"),
        ({"embedding_dim": 32}, "embedding_dim is 32, the plan was made for 16"),
        ({"dtype": "float16"}, "dtype is 'float16', the plan was made for 'float32'"),
        ({"pooling": "mean"}, "pooling is 'mean', the plan was made for 'sum'"),
        (
            {"feature_names": ("shop_id", "seller")},
            "feature_names is ('shop_id', 'seller'), the plan was made for ('shop_id',)",
        ),
        ({"optimizer": optim.SGD(lr=1)}, "optimizer is 'SGD', the plan was made for 'Adagrad'"),
    ],
)
def test_a_table_that_changed_is_named(path: Path, fields: dict[str, Any], reason: str) -> None:
    assert refused(path, model(shop=fields)) == [f"table 'shop': {reason}"]


def test_a_table_that_is_trained_no_more_or_weighted_is_named(path: Path) -> None:
    assert refused(path, model(shop={"trainable": False})) == [
        "table 'shop': trainable is False, the plan was made for True",
        "table 'shop': optimizer is 'none', the plan was made for 'Adagrad'",
    ]
    sums = tables(tag={"pooling": "sum"})
    weighted = se.EmbeddingBagCollection(sums, is_weighted=True)
    where = {t.name: LAYOUTS[t.name] for t in sums}
    se.plan_sharding(se.EmbeddingBagCollection(sums), ENV, where).save(path)
    reasons = refused(path, weighted)
    assert reasons[0] == "table 'user': is_weighted is True, the plan was made for False"
    assert len(reasons) == 7


def test_tables_that_came_went_or_were_renamed_are_named(path: Path) -> None:
    others = [t for t in tables() if t.name not in {"city", "day"}]
    renamed = table("today", feature_names=("day_id",))
    assert refused(path, se.EmbeddingBagCollection([*others, renamed, table("new")])) == [
        "table 'city' is no longer in the model",
        "table 'day' is called 'today' now",
        "table 'new' is in the model, and not in the plan",
    ]


def test_another_place_in_the_model_is_named(path: Path) -> None:
    inside = torch.nn.ModuleDict({"sparse": model()})
    assert refused(path, inside)[0] == "table 'user': module is 'sparse', the plan was made for ''"


def test_of_many_changes_ten_are_listed(path: Path) -> None:
    names = [f"{name}{i}" for i in range(2) for name in LAYOUTS]
    reasons = refused(path, se.EmbeddingBagCollection([table(name) for name in names]))
    assert len(reasons) == 11
    assert reasons[-1] == "and 11 more"


def test_other_ranks_and_too_little_memory_are_named(path: Path) -> None:
    plan = every_layout()
    for env, ranks in (
        (se.Env(world_size=8, num_nodes=2), "8 ranks on 2 nodes"),
        (se.Env(world_size=4), "4 ranks on 1 node"),
    ):
        assert refused(path, model(), env) == [
            f"it is for 4 ranks on 2 nodes, this run has {ranks}"
        ]
    most = max(plan.bytes_per_rank)
    assert refused(path, model(), replace(plan.cluster, memory_bytes=round(most / 0.86))) == [
        "rank 2 would hold 402 KiB of tables and optimizer state, and has 398 KiB for them of "
        "468 KiB; it was planned for ranks of 128 GiB"
    ]
    assert se.load_plan(path, model(), replace(plan.cluster, memory_bytes=round(most / 0.84)))


def test_a_plan_may_be_as_full_as_it_was_planned(path: Path) -> None:
    plan = every_layout()
    full = replace(plan.cluster, memory_bytes=round(max(plan.bytes_per_rank) / 0.95))
    filled = replace(plan, cluster=full)
    filled.save(path)
    assert se.load_plan(path, model(), full) == filled
    assert refused(path, model(), replace(full, memory_bytes=full.memory_bytes - 1))


def edited(path: Path, name: str, **fields: Any) -> None:
    values = json.loads(path.read_text())
    for line in values["tables"]:
        if line["table"] == name:
            for key in {"rank", "ranks", "node", "nodes"} & line.keys():
                del line[key]
            line |= fields
    path.write_text(json.dumps(values))


def test_layout_rules_hold_for_a_file_that_was_edited(path: Path) -> None:
    edited(path, "user", layout="table_wise", rank=2)
    moved = se.load_plan(path, model(), ENV)
    assert [shard.rank for shard in moved.tables[0].shards] == [2]
    assert moved.tables[1:] == every_layout().tables[1:]
    edited(path, "user", layout="data_parallel")
    (reason,) = refused(path, model())
    assert reason.startswith("table 'user': data_parallel is not supported for float16")


def test_a_rank_without_rows_is_refused_after_an_edit(tmp_path: Path) -> None:
    made = se.EmbeddingBagCollection([table("tiny", num_embeddings=5)])
    path = tmp_path / "plan.json"
    se.plan_sharding(made, se.Env(world_size=4), {"tiny": layouts.table_wise(rank=0)}).save(path)
    edited(path, "tiny", layout="row_wise")
    (reason,) = refused(path, made, se.Env(world_size=4))
    assert reason.startswith("table 'tiny': row_wise over 4 ranks leaves a rank without rows")


def test_slices_of_two_widths_in_one_sequence_collection_are_refused(tmp_path: Path) -> None:
    made = se.EmbeddingCollection([table("a"), table("b")])
    where: dict[str, Layout] = {name: layouts.column_wise(ranks=[0, 1]) for name in "ab"}
    path = tmp_path / "plan.json"
    se.plan_sharding(made, ENV, where).save(path)
    edited(path, "b", layout="column_wise", ranks=[0, 1, 2, 3])
    (reason,) = refused(path, made)
    assert "of one EmbeddingCollection have slices of 8 and 4 columns" in reason


@spmd(world_size=2)
def test_ranks_train_by_a_file_or_are_refused_together(env: se.Env, tmp_path: Path) -> None:
    configs = [table("a"), table("b", feature_names=("b_id", "clicked"))]
    where: dict[str, Layout] = {"a": layouts.row_wise(), "b": layouts.column_wise(ranks=[1, 0])}
    path = tmp_path / "plan.json"
    made = se.plan_sharding(se.EmbeddingBagCollection(configs), env, where)
    if env.is_main:
        made.save(path)
    dist.barrier()
    batch = {name: torch.tensor([3, 999, 4]) for name in ("a_id", "b_id", "clicked")}
    outputs = []
    for plan in (made, se.load_plan(path, se.EmbeddingBagCollection(configs), env)):
        assert plan == made
        sharded = se.shard_modules(se.EmbeddingBagCollection(configs), plan, env)
        optimizer = se.build_optimizer(sharded)
        features = se.keyed_jagged_tensor(batch, configs)
        for _ in range(2):
            optimizer.zero_grad()
            values = sharded(features).wait().values()
            values.sum().backward()
            optimizer.step()
        outputs.append(values.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)

    mine = path if env.is_main else tmp_path / "none.json"
    with pytest.raises((OtherRankError, FileNotFoundError)) as error:
        se.load_plan(mine, se.EmbeddingBagCollection(configs), env)
    assert isinstance(error.value, OtherRankError) is env.is_main
    fewer = se.EmbeddingBagCollection(configs[:1])
    with pytest.raises(ValueError, match="table 'b' is no longer in the model"):
        se.load_plan(path, fewer, env)
