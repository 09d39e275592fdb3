"""What tables and slices each kernel takes; the plan says it, and the check that a plan fits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrec
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagConfig

import shardemb as se
from shardemb import layouts, optim
from shardemb.layouts import Layout
from shardemb.placement import ShardingPlan
from tests.plans import ENV, NEEDS_NATIVE, TWO_NODES, sgd_table, table

CUDA = replace(TWO_NODES, device="cuda")
LAYOUTS: list[Layout] = [
    layouts.table_wise(rank=1),
    layouts.row_wise(),
    layouts.table_row_wise(node=1),
    layouts.data_parallel(),
]
"""Those that do not split the columns."""


def of_torchrec(width: int) -> nn.Module:
    config = EmbeddingBagConfig(
        name="a", num_embeddings=100, embedding_dim=width, feature_names=["a"]
    )
    made: nn.Module = torchrec.EmbeddingBagCollection([config], device=torch.device("meta"))
    _apply_optimizer_in_backward(torch.optim.SGD, made.parameters(), {"lr": 0.1})
    return made


def of_torch(width: int) -> nn.Module:
    model = nn.ModuleDict({"a": nn.EmbeddingBag(100, width, mode="sum")})
    converted: nn.Module = se.from_torch(model, optim.SGD(lr=0.1))
    return converted


def pooled(width: int, **fields: Any) -> torchrec.EmbeddingBagCollection:
    return se.EmbeddingBagCollection([sgd_table("a", embedding_dim=width, **fields)])


def sequences(width: int) -> torchrec.EmbeddingCollection:
    return se.EmbeddingCollection([sgd_table("a", embedding_dim=width)])


MODELS: list[Callable[[int], nn.Module]] = [pooled, sequences, of_torchrec, of_torch]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("where", [ENV, TWO_NODES, CUDA])
def test_fbgemm_refuses_widths_that_are_not_multiples_of_4(
    make: Callable[[int], nn.Module], where: Any
) -> None:
    for width, next_width in ((1, 4), (6, 8), (30, 32)):
        text = (
            "table 'a': embedding_dim must be a positive multiple of 4 for FBGEMM's kernels, got "
            f"{width}; use {next_width}, or on the CPU kernel='native', which takes any"
        )
        with pytest.raises(ValueError, match=text):
            se.plan_sharding(make(width), where, kernel="fbgemm")
    for width in (4, 32):
        assert se.plan_sharding(make(width), where, kernel="fbgemm").kernel == "fbgemm"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fbgemm_refuses_them_under_every_layout(layout: Layout) -> None:
    with pytest.raises(ValueError, match="table 'a': embedding_dim must be a positive multiple of"):
        se.plan_sharding(pooled(6), ENV, {"a": layout}, kernel="fbgemm")


@NEEDS_NATIVE
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("width", [1, 3, 6, 30])
def test_native_takes_tables_of_any_width(make: Callable[[int], nn.Module], width: int) -> None:
    for where in (ENV, TWO_NODES):
        assert se.plan_sharding(make(width), where).kernel == "native"
        plan = se.plan_sharding(make(width), where, {"a": layouts.row_wise()}, kernel="native")
        (placed,) = plan.tables
        held = sum(shard.weight_bytes for shard in placed.shards)
        assert held == placed.num_embeddings * width * 4


@NEEDS_NATIVE
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_native_takes_them_under_every_layout(layout: Layout) -> None:
    (placed,) = se.plan_sharding(pooled(3), ENV, {"a": layout}, kernel="native").tables
    assert {shard.num_columns for shard in placed.shards} == {3}


def columns(plan: ShardingPlan) -> list[tuple[int, int]]:
    """The first column of each slice, and how many it has."""
    shards = plan.tables[0].shards
    return sorted({(shard.first_column, shard.num_columns) for shard in shards})


SPLITS: list[Layout] = [
    layouts.column_wise(ranks=[1, 0]),
    layouts.table_column_wise(ranks=[3, 2]),
    layouts.grid_shard(nodes=[1, 0]),
]


@NEEDS_NATIVE
@pytest.mark.parametrize("layout", SPLITS, ids=str)
def test_slices_of_native_are_equal_and_of_any_width(layout: Layout) -> None:
    for width, each in ((2, 1), (6, 3), (12, 6), (64, 32)):
        plan = se.plan_sharding(pooled(width), ENV, {"a": layout}, kernel="native")
        assert columns(plan) == [(0, each), (each, each)]
    text = "splits 7 columns into 2 slices, and all must be equally wide; use fewer slices, or em"
    with pytest.raises(ValueError, match=rf"table 'a': .* {text}bedding_dim=8$"):
        se.plan_sharding(pooled(7), ENV, {"a": layout}, kernel="native")


@pytest.mark.parametrize("layout", SPLITS, ids=str)
def test_slices_of_fbgemm_are_multiples_of_4(layout: Layout) -> None:
    for width, wider in ((12, 16), (4, 8)):
        text = (
            f"splits {width} columns into 2 slices, and each must have a multiple of 4; use fewer "
            f"slices, or embedding_dim={wider}, or on the CPU kernel='native'$"
        )
        with pytest.raises(ValueError, match=rf"table 'a': .* {text}"):
            se.plan_sharding(pooled(width), ENV, {"a": layout}, kernel="fbgemm")
    plan = se.plan_sharding(pooled(16), ENV, {"a": layout}, kernel="fbgemm")
    assert columns(plan) == [(0, 8), (8, 8)]


def test_slices_that_neither_kernel_takes_have_one_way_out() -> None:
    three = {"a": layouts.column_wise(ranks=[0, 1, 2])}
    with pytest.raises(ValueError, match=r"a multiple of 4; use fewer slices, or .*_dim=24$"):
        se.plan_sharding(pooled(16), ENV, three, kernel="fbgemm")


@NEEDS_NATIVE
@pytest.mark.parametrize("make", [pooled, sequences])
def test_the_planner_makes_slices_that_the_kernel_takes(make: Callable[[int], nn.Module]) -> None:
    split: dict[str, Layout] = {"a": layouts.column_wise()}
    for width, native, fbgemm in (
        (128, {32, 64}, {32, 64}),
        (16, {8}, {8}),
        (12, {4}, {4}),
        (4, {2}, {4}),
        (6, {3}, None),
        (9, {3}, None),
        (7, {7}, None),
        (1, {1}, None),
    ):
        plan = se.plan_sharding(make(width), ENV, split, kernel="native")
        assert {each for _, each in columns(plan)} <= native
        if fbgemm is not None:
            plan = se.plan_sharding(make(width), ENV, split, kernel="fbgemm")
            assert {each for _, each in columns(plan)} <= fbgemm


@NEEDS_NATIVE
def test_tables_that_lie_together_split_alike_where_the_kernel_takes_it() -> None:
    tables = [sgd_table("a", embedding_dim=16), sgd_table("b", embedding_dim=6)]
    together = se.Constraints(colocate=[["a", "b"]])
    named: dict[str, Layout] = {"a": layouts.column_wise(ranks=[0, 1])}
    plan = se.plan_sharding(
        se.EmbeddingBagCollection(tables), ENV, named, constraints=together, kernel="native"
    )
    assert [[s.num_columns for s in placed.shards] for placed in plan.tables] == [[8, 8], [3, 3]]


@NEEDS_NATIVE
def test_a_plan_of_native_does_not_fit_once_it_says_fbgemm(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made = se.EmbeddingBagCollection(
        [
            table("odd", embedding_dim=6),
            table("split", embedding_dim=8),
            table("brief", dtype="bfloat16"),
        ]
    )
    where: dict[str, Layout] = {
        "odd": layouts.row_wise(),
        "split": layouts.column_wise(ranks=[0, 1, 2, 3]),
        "brief": layouts.row_wise(),
    }
    plan = se.plan_sharding(made, ENV, where, kernel="native")
    plan.save(path)
    assert se.load_plan(path, made, ENV) == plan
    path.write_text(path.read_text().replace('"kernel": "native"', '"kernel": "fbgemm"'))
    with pytest.raises(ValueError, match="does not fit") as caught:
        se.load_plan(path, made, ENV)
    odd, split, brief = str(caught.value).splitlines()[1:-1]
    assert odd.startswith("  table 'odd': embedding_dim must be a positive multiple of 4 for FBG")
    assert split.startswith("  table 'split': column_wise(ranks=(0, 1, 2, 3)) splits 8 columns in")
    assert brief.startswith("  table 'brief': bfloat16 rows cannot be looked up on cpu, FBGEMM has")


def test_bfloat16_rows_are_of_native_or_of_cuda() -> None:
    text = (
        "table 'a': bfloat16 rows cannot be looked up on cpu, FBGEMM has no kernel for it; use "
        "dtype='float16' or 'float32', or on the CPU kernel='native', or run on cuda"
    )
    for where in (ENV, TWO_NODES):
        with pytest.raises(ValueError, match=text):
            se.plan_sharding(pooled(8, dtype="bfloat16"), where, kernel="fbgemm")
    assert se.plan_sharding(pooled(8, dtype="bfloat16"), CUDA).kernel == "fbgemm"


@NEEDS_NATIVE
def test_bfloat16_rows_are_planned_on_cpu_by_native() -> None:
    (placed,) = se.plan_sharding(pooled(8, dtype="bfloat16"), ENV).tables
    assert sum(shard.weight_bytes for shard in placed.shards) == placed.num_embeddings * 8 * 2
