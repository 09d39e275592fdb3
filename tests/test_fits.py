"""Tables that do not fit: which needs how much where, and changes that really would fit."""

import re
from dataclasses import replace
from typing import Any

import pytest

import shardemb as se
from shardemb import layouts, optim
from shardemb.errors import RunError
from shardemb.layouts import Layout

CLUSTER = se.Cluster(
    name="two ranks",
    ranks_per_node=2,
    memory_bytes=1 << 30,
    memory_gb_per_s=50,
    intra_node_gb_per_s=5,
    inter_node_gb_per_s=1,
)


def model_of(
    rows: dict[str, int],
    dtype: str = "float32",
    optimizer: optim.SparseOptimizer = optim.RowWiseAdagrad(lr=0.1),  # noqa: B008 - frozen
) -> Any:
    return se.EmbeddingBagCollection(
        [
            se.TableConfig(
                name=name,
                num_embeddings=number,
                embedding_dim=64,
                feature_names=(name,),
                optimizer=optimizer,
                dtype=dtype,  # type: ignore[arg-type]
            )
            for name, number in rows.items()
        ]
    )


def refusal(
    model: Any,
    cluster: se.Cluster = CLUSTER,
    named: dict[str, Layout] | None = None,
    constraints: se.Constraints | None = None,
) -> tuple[str, list[str]]:
    with pytest.raises(RunError) as caught:
        se.plan_sharding(model, cluster, named, constraints=constraints)
    first, *changes = str(caught.value).split("\n  - ")
    return first, changes


def test_another_layout_or_rank_is_offered_where_it_would_fit() -> None:
    rows = {"big": 5_000_000, "small": 1000}  # 1.2 GiB of weights and 19 MiB of state
    model = model_of(rows)
    first, changes = refusal(model, named={"big": layouts.table_wise(rank=1)})
    assert first == (
        "table 'big' as table_wise needs 1.21 GiB on rank 1, and 870 MiB are left there: 1.00 GiB "
        "of memory, less 0.15 of it as headroom. Any one of these changes would fit:"
    )
    assert changes[0] == "layouts.row_wise() for table 'big'"
    se.plan_sharding(model, CLUSTER, {"big": layouts.row_wise()})
    assert changes[1] == "layouts.column_wise() for table 'big'"
    se.plan_sharding(model, CLUSTER, {"big": layouts.column_wise()})
    assert changes[2] == "dtype='float16' for table 'big'"
    se.plan_sharding(model_of(rows, "float16"), CLUSTER, {"big": layouts.table_wise(rank=1)})
    assert len(changes) == 3  # no number of ranks and no headroom makes one rank larger

    named: dict[str, Layout] = {name: layouts.table_wise(rank=0) for name in ("a", "b")}
    both = model_of({"a": 2_000_000, "b": 2_000_000})
    first, changes = refusal(both, named=named)
    assert "on rank 0, and 374 MiB are left there" in first
    assert "less 496 MiB of other tables" in first
    where = next(
        re.search(r"'([ab])', on ranks of the", line) for line in changes if "on ra" in line
    )
    assert where is not None
    se.plan_sharding(both, CLUSTER, named | {where[1]: layouts.table_wise()})
    assert "no named layouts, the planner chooses all" in changes
    se.plan_sharding(both, CLUSTER)


def test_more_ranks_less_headroom_or_half_the_bytes_are_offered_where_they_would_fit() -> None:
    rows = {"a": 3_500_000, "b": 3_500_000}  # 868 MiB each, on ranks with 870 MiB: and c
    model = model_of(rows | {"c": 50_000})
    first, changes = refusal(model)
    assert "MiB are left there: 1.00 GiB of memory, less 0.15 of it as headroom, less " in first
    assert changes == [
        "2 nodes, 4 ranks, instead of 1 and 2",
        "dtype='float16' for table 'a'",
        "Constraints(headroom=0.1) instead of 0.15",
    ]
    se.plan_sharding(model, replace(CLUSTER, num_nodes=2))
    se.plan_sharding(model, CLUSTER, constraints=se.Constraints(headroom=0.1))


def test_the_fewest_nodes_are_offered() -> None:
    tables = {f"t{i}": 3_000_000 for i in range(11)}  # 744 MiB each: one on a rank, or in parts
    model = model_of(tables)
    whole = se.Constraints(layouts={name: ["table_wise"] for name in tables})
    _, changes = refusal(model, constraints=whole)
    assert changes[0] == "6 nodes, 12 ranks, instead of 1 and 2"
    se.plan_sharding(model, replace(CLUSTER, num_nodes=6), constraints=whole)
    with pytest.raises(RunError):
        se.plan_sharding(model, replace(CLUSTER, num_nodes=5), constraints=whole)


def test_constraints_that_stand_in_the_way_are_named() -> None:
    model = model_of({"a": 5_000_000, "b": 1000})
    only = se.Constraints(layouts={"a": ["table_wise"]})
    first, changes = refusal(model, constraints=only)
    assert first.startswith("table 'a' as table_wise needs 1.21 GiB on rank 0, and 870 MiB")
    assert "layouts.row_wise() for table 'a', without constraints" in changes
    together = se.Constraints(colocate=[["a", "b"]], layouts={"b": ["table_wise"]})
    first, changes = refusal(model, constraints=together)
    assert first.startswith("tables 'a', 'b' as table_wise need 1.21 GiB on rank")
    assert "tables 'a', 'b' not colocated" in changes


FILLED = {0: 700_000, 1: 3_000_000, 2: 2_500_000, 3: 1_500_000}
"""Rows that are named onto each rank: 171, 732, 610 and 366 of its 870 MiB."""


@pytest.mark.parametrize(
    ("name", "ranks", "rank"),  # the k-th freest; of nodes the fullest rank of the k-th freest
    [
        ("table_wise", None, 0),
        ("table_wise", [2, 3, 1], 3),
        ("column_wise", None, 3),
        ("column_wise", [2, 3, 1], 2),
        ("table_row_wise", None, 2),
        ("table_row_wise", [2, 3, 1], 2),
        ("table_column_wise", None, 2),
        ("table_column_wise", [0, 1, 3], 1),
        ("grid_shard", None, 1),
        ("grid_shard", [2, 3, 1], 2),
        ("row_wise", None, 1),
        ("data_parallel", None, 1),
    ],
)
def test_what_is_needed_is_more_than_what_is_left_on_the_rank_that_is_named(
    name: str, ranks: list[int] | None, rank: int
) -> None:
    whole = name in {"table_wise", "data_parallel"}
    rows = {f"on{number}": of for number, of in FILLED.items()}
    rows["c"] = 3_000_000 if whole else 5_000_000  # 732 MiB; or 1.19 GiB in two or four blocks
    named: dict[str, Layout] = {f"on{r}": layouts.table_wise(rank=r) for r in FILLED}
    only = se.Constraints(
        layouts={"c": [name]}, ranks={} if ranks is None else {"c": ranks}, headroom=0.15
    )
    model = model_of(rows, optimizer=optim.SGD(lr=0.1))
    first, _ = refusal(model, replace(CLUSTER, num_nodes=2), named, only)
    found = re.search(r"'c' as (\w+) needs (.+) on rank (\d), and (.+) are left there", first)
    assert found is not None, first
    assert (found[1], int(found[3])) == (name, rank)
    needed, left = (mebibytes(found[number]) for number in (2, 4))
    assert needed > left
    assert left == pytest.approx(0.85 * 1024 - FILLED[rank] * 64 * 4 / 2**20, rel=0.01)


def mebibytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def test_it_says_so_where_no_single_change_would_fit() -> None:
    model = model_of({"a": 2_000_000_000, "b": 2_000_000_000})
    where: dict[str, Layout] = {"a": layouts.table_wise(rank=0), "b": layouts.table_wise(rank=1)}
    _, changes = refusal(model, named=where)
    assert len(changes) == 1
    found = re.search(r"no named layouts, .*, and (\d+) nodes", changes[0])
    assert found is not None
    se.plan_sharding(model, replace(CLUSTER, num_nodes=int(found[1])))
    whole = se.Constraints(layouts={"a": ["table_wise"], "b": ["table_wise"]})
    first, changes = refusal(model, constraints=whole)
    assert first.endswith(
        "no single change of a layout, the ranks, a dtype or the headroom would fit"
    )
    assert changes == []


def test_a_step_that_may_not_fit_beside_the_tables_is_said_in_the_plan() -> None:
    model = model_of({"big": 3_000_000})
    named: dict[str, Layout] = {"big": layouts.table_wise(rank=1)}
    roomy = se.plan_sharding(model, CLUSTER, named, workload=se.Workload(batch_size=1000))
    assert "careful" not in str(roomy)
    full = se.plan_sharding(model, CLUSTER, named, workload=se.Workload(batch_size=500_000))
    assert re.search(
        r"careful: rank 1 may run out of memory. Beside 744 MiB of tables and optimizer state a "
        r"step takes up to 755 MiB, most of it for table 'big', and there are 1\.00 GiB",
        str(full),
    )
    assert "careful: rank 1 may run out of memory" in full.to_html()
