"""Constraints are kept to exactly, and refused by name where nothing could keep to them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

import shardemb as se
from shardemb import layouts
from shardemb.data.profile import DataProfile
from shardemb.errors import RunError
from shardemb.layouts import Layout
from tests.plans import TWO_NODES, hot_profile, sgd_table

WHOLE = {name: ["table_wise"] for name in "abcdef"}


def plan(
    constraints: se.Constraints,
    named: Mapping[str, Layout] | None = None,
    *,
    num_embeddings: int = 10_000,
) -> se.ShardingPlan:
    tables = [sgd_table(name, num_embeddings) for name in "abcdef"]
    model = se.EmbeddingBagCollection(tables)
    return se.plan_sharding(model, TWO_NODES, named, constraints=constraints)


def ranks(made: se.ShardingPlan) -> dict[str, list[int]]:
    return {found.table: sorted({s.rank for s in found.shards}) for found in made.tables}


def layout_names(made: se.ShardingPlan) -> dict[str, str]:
    return {found.table: found.layout for found in made.tables}


@pytest.mark.parametrize("name", list(layouts.LAYOUTS))
def test_a_table_has_one_of_the_layouts_that_it_may_have(name: str) -> None:
    made = plan(se.Constraints(layouts={"a": [name], "c": ["row_wise", name]}))
    assert layout_names(made)["a"] == name
    assert layout_names(made)["c"] in {"row_wise", name}


def test_layouts_may_be_given_as_values() -> None:
    values = se.Constraints(layouts={"a": [layouts.row_wise(), "grid_shard"]})
    assert values == se.Constraints(layouts={"a": ["row_wise", "grid_shard"]})
    assert values != se.Constraints(layouts={"a": ["row_wise"]})
    one = se.Constraints(layouts={"a": [layouts.grid_shard()]})
    assert layout_names(plan(one))["a"] == "grid_shard"


def test_a_headroom_that_leaves_no_memory_is_refused() -> None:
    text = r"no memory is left for tables: .*memory_bytes=1073741824 .* headroom=0\.999999999999 of"
    with pytest.raises(ValueError, match=text):
        plan(se.Constraints(headroom=0.999999999999))
    model = se.EmbeddingBagCollection([sgd_table("a")])
    with pytest.raises(ValueError, match=r"no memory is left for tables: .*memory_bytes=1 "):
        se.plan_sharding(model, replace(TWO_NODES, memory_bytes=1))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layouts": 5}, "layouts must be given by table name, .*, got 5"),
        ({"layouts": ["a"]}, r"layouts must be given by table name, .*, got \['a'\]"),
        ({"layouts": 0}, "layouts must be given by table name, .*, got 0"),
        ({"layouts": {1: layouts.row_wise()}}, r"layouts must be given by table name, .*, got \{1"),
        ({"constraints": {"a": 1}}, r"constraints must be Constraints, .*, got \{'a': 1\}"),
        ({"workload": 64}, "workload must be a Workload, .*, got 64"),
    ],
)
def test_wishes_of_another_kind_are_refused_by_name(fields: dict[str, Any], text: str) -> None:
    model = se.EmbeddingBagCollection([sgd_table("a")])
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(model, TWO_NODES, **fields)
    for where in (None, 4):
        with pytest.raises(ValueError, match=rf"where: the ranks must be the Env .*, got {where}"):
            se.plan_sharding(model, where)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"where: the ranks must be the Env .*, got {where}"):
            se.load_plan("plan.json", model, where)  # type: ignore[arg-type]


def test_a_profile_of_another_model_is_refused() -> None:
    model = se.EmbeddingBagCollection([sgd_table("a")])
    text = (
        r"profile of clicks\.txt is of other data: it counts 'user_id', and the tables look up 'a'"
    )
    profile = DataProfile(source="clicks.txt", features={"user_id": hot_profile()})
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(model, TWO_NODES, workload=se.Workload(profile=profile))
    both = replace(profile, features={**profile.features, "a": hot_profile(10_000)})
    made = se.plan_sharding(model, TWO_NODES, workload=se.Workload(profile=both))
    assert made.workload.profile == both


def test_tables_lie_on_the_ranks_that_they_may_lie_on() -> None:
    allowed = {"a": [3], "b": [1, 2], "c": [2, 3], "d": [2, 3]}
    may = {"c": ["table_row_wise"], "d": ["column_wise", "table_column_wise"]}
    found = ranks(plan(se.Constraints(ranks=allowed, layouts=may)))
    assert found["a"] == [3]
    assert set(found["b"]) <= {1, 2}
    assert found["c"] == found["d"] == [2, 3]
    free = ranks(plan(se.Constraints(layouts=may)))
    assert free != found


def test_tables_that_are_colocated_lie_on_the_same_ranks() -> None:
    groups = [["a", "d", "e"], ["b", "c"]]
    named: dict[str, Layout] = {"b": layouts.column_wise(ranks=[3, 0])}
    made = plan(se.Constraints(colocate=groups), named)
    of = {found.table: (found.layout, [s.rank for s in found.shards]) for found in made.tables}
    assert of["a"] == of["d"] == of["e"]
    assert of["b"] == of["c"] == ("column_wise", [3, 0])
    apart = plan(se.Constraints(layouts=WHOLE))
    together = plan(se.Constraints(layouts=WHOLE, colocate=groups))
    assert len({r for t in "ade" for r in ranks(apart)[t]}) > 1
    assert len({r for t in "ade" for r in ranks(together)[t]}) == 1


def test_colocated_tables_stay_within_the_ranks_of_all_of_them() -> None:
    made = plan(se.Constraints(colocate=[["a", "b"]], ranks={"a": [0, 2], "b": [2, 3]}))
    assert ranks(made)["a"] == ranks(made)["b"] == [2]


def test_colocated_tables_take_no_layout_that_the_ranks_of_all_of_them_do_not_hold() -> None:
    nodes_of_four = replace(TWO_NODES, ranks_per_node=4)
    may = ["table_row_wise", "column_wise"]
    together = se.Constraints(
        colocate=[["a", "b"]],
        ranks={"a": [0, 1, 2, 3, 4], "b": [1, 4, 5, 6, 7]},  # a node each, and none together
        layouts={"a": may, "b": may},
    )
    model = se.EmbeddingBagCollection([sgd_table(name, 3_000_000) for name in "ab"])  # 732 MiB each
    made = se.plan_sharding(model, nodes_of_four, constraints=together)
    assert layout_names(made) == {"a": "column_wise", "b": "column_wise"}
    assert ranks(made) == {"a": [1, 4], "b": [1, 4]}
    large = se.EmbeddingBagCollection([sgd_table(name, 4_000_000) for name in "ab"])
    with pytest.raises(RunError, match="tables 'a', 'b' as column_wise need 977 MiB on rank 4, an"):
        se.plan_sharding(large, nodes_of_four, constraints=together)


def test_replicated_tables_are_on_every_rank() -> None:
    made = plan(se.Constraints(replicate=["b", "f"]))
    for name in "bf":
        found = next(t for t in made.tables if t.table == name)
        assert found.layout == "data_parallel"
        assert [s.num_rows for s in found.shards] == [10_000] * 4
        assert found.chosen_by == "replicated: constraint"


def test_headroom_stays_free() -> None:
    rows = 1_100_000  # 269 MiB: three of them are 79 % of a rank's memory
    roomy = plan(se.Constraints(layouts=WHOLE, headroom=0.2), num_embeddings=rows)
    assert max(roomy.bytes_per_rank) <= 0.8 * TWO_NODES.memory_bytes
    on_two = {name: [0, 1] for name in "abcdef"}
    packed = se.Constraints(layouts=WHOLE, ranks=on_two, headroom=0.2)
    assert plan(packed, num_embeddings=rows).bytes_per_rank[:2] == [3 * rows * 64 * 4] * 2
    with pytest.raises(RunError, match=r"less 0\.3 of it as headroom"):
        plan(replace(packed, headroom=0.3), num_embeddings=rows)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"headroom": 1.0}, "headroom must be the part of memory .* less than 1, got 1.0"),
        ({"headroom": True}, "headroom must be the part of memory .*, got True"),
        ({"layouts": {"a": "row_wise"}}, r"layouts of table 'a' must be a list, got 'row_wise'"),
        ({"layouts": {"a": []}}, "layouts of table 'a' must not be empty; leave it out instead"),
        ({"layouts": {"a": ["rowwise"]}}, "table 'a' may have layout 'rowwise', which is none"),
        ({"layouts": ["a"]}, r"layouts must be lists by table, .*\['row_wise'\]}, got \['a'\]"),
        ({"ranks": [0]}, r"ranks must be lists by table, such as {'user': \[0, 1\]}, got \[0\]"),
        ({"colocate": "ab"}, r"colocate must be a list, got 'ab'"),
        ({"colocate": 5}, r"colocate must be a list, got 5"),
        ({"colocate": [5]}, r"a group of colocate must be a list, got 5; use \[5\]"),
        ({"colocate": [["a", ["b"]]]}, r"colocate must name tables, got \['b'\]"),
        ({"colocate": None}, "colocate must be a list, got None$"),
        ({"layouts": {"a": None}}, "layouts of table 'a' must be a list, got None$"),
        ({"layouts": {"a": [["row_wise"]]}}, r"table 'a' may have layout \['row_wise'\], which is"),
        ({"layouts": {"a": [None]}}, "table 'a' may have layout None, which is none; there are"),
        ({"layouts": {5: ["row_wise"]}}, "layouts must name tables, got 5"),
        (
            {"layouts": {"a": [layouts.table_wise(rank=1)]}},
            r"layout table_wise\(rank=1\), and constraints .*; name it in layouts instead",
        ),
        ({"replicate": [None]}, "replicate must name tables, got None"),
        ({"ranks": {"a": [-1]}}, "ranks of table 'a' must be numbers from 0, got -1"),
        ({"ranks": {"a": 1}}, r"ranks of table 'a' must be a list, got 1; use \[1\]"),
        ({"colocate": [["a"]]}, r"colocate needs groups of two tables or more, got \('a',\)"),
        ({"colocate": [["a", "b"], ["b", "c"]]}, "table 'b' is in two groups of colocate"),
        ({"replicate": "a"}, r"replicate must be a list, got 'a'; use \['a'\]"),
    ],
)
def test_fields_that_say_nothing_sensible_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"constraints: .*{text}"):
        se.Constraints(**fields)


@pytest.mark.parametrize(
    ("fields", "named", "text"),
    [
        ({"layouts": {"z": ["row_wise"]}}, {}, "constraints: layouts names table 'z', the model"),
        ({"ranks": {"z": [0]}}, {}, "constraints: ranks names table 'z'"),
        ({"colocate": [["a", "z"]]}, {}, "constraints: colocate names table 'z'"),
        ({"replicate": ["z"]}, {}, "constraints: replicate names table 'z'"),
        ({"ranks": {"a": [4]}}, {}, "table 'a' may lie on rank 4, .* for 4 ranks; use ranks in 0"),
        (
            {"layouts": {"a": ["row_wise", "grid_shard"]}},
            {"a": layouts.table_wise(rank=1)},
            r"table 'a' is named table_wise\(rank=1\), and its layouts are only row_wise, grid_sh",
        ),
        (
            {"ranks": {"a": [0, 1]}},
            {"a": layouts.table_wise(rank=2)},
            r"table 'a' is named table_wise\(rank=2\), and may lie on ranks \[0, 1\] only",
        ),
        (
            {"ranks": {"a": [0, 1]}},
            {"a": layouts.row_wise()},
            r"table 'a' is named row_wise, and may lie on ranks \[0, 1\] only, which do not hold",
        ),
        (
            {"ranks": {"a": [0, 2]}},
            {"a": layouts.table_row_wise()},
            r"table 'a' is named table_row_wise, and may lie on ranks \[0, 2\] only",
        ),
        (
            {"ranks": {"a": [0, 2]}, "layouts": {"a": ["table_row_wise"]}},
            {},
            r"table 'a' is left without a layout: it may have table_row_wise on ranks \[0, 2\]",
        ),
        (
            {"replicate": ["a"]},
            {"a": layouts.row_wise()},
            "table 'a' must be replicated, and is named row_wise; drop one of the two",
        ),
        (
            {"replicate": ["a"], "layouts": {"a": ["row_wise"]}},
            {},
            "table 'a' must be replicated, and its layouts are only row_wise; allow data_parallel",
        ),
        (
            {"replicate": ["a"], "ranks": {"a": [0, 1, 2]}},
            {},
            r"table 'a' is left without a layout: it may have data_parallel on ranks \[0, 1, 2\]",
        ),
        (
            {"replicate": ["fp16"]},
            {},
            "table 'fp16' must be replicated, and data_parallel is not supported for float16",
        ),
        (
            {"layouts": {"fp16": ["data_parallel"]}},
            {},
            "table 'fp16' is left without a layout: .* data_parallel is not supported for float16",
        ),
        (
            {"colocate": [["a", "b"]]},
            {"a": layouts.row_wise(), "b": layouts.table_wise()},
            "tables 'a', 'b' are colocated, and 'a' is named row_wise but 'b' table_wise; name one",
        ),
        (
            {"colocate": [["a", "b"]]},
            {"a": layouts.table_wise(rank=0), "b": layouts.table_wise(rank=1)},
            r"'a' is pinned to table_wise\(rank=0\) but 'b' to table_wise\(rank=1\); pin them to",
        ),
        (
            {"colocate": [["a", "b"]], "layouts": {"a": ["row_wise"], "b": ["table_wise"]}},
            {},
            "colocated, and no layout is left to all of them: 'a' may have row_wise; 'b' may have",
        ),
        (
            {"colocate": [["a", "b"]], "ranks": {"a": [0], "b": [1]}},
            {},
            "tables 'a', 'b' are colocated, and the ranks that all of them may lie on, none, do",
        ),
        (
            {"colocate": [["a", "narrow"]]},
            {"a": layouts.column_wise(ranks=[0, 1, 2, 3])},
            "tables 'a', 'narrow' are colocated, and there is no number of slices that suits",
        ),
    ],
)
def test_contradictions_are_refused_by_name(
    fields: dict[str, Any], named: dict[str, Layout], text: str
) -> None:
    tables = [
        sgd_table("a"),
        sgd_table("b"),
        sgd_table("fp16", dtype="float16"),
        sgd_table("narrow", embedding_dim=8),
    ]
    model = se.EmbeddingBagCollection(tables)
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(
            model, TWO_NODES, named, constraints=se.Constraints(**fields), kernel="fbgemm"
        )
