"""A plan as a file: it comes back equal, stays small, and says what is wrong with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardemb.placement import ShardingPlan
from shardemb.plans.file import read_plan
from tests.plans import every_layout, hot_profile, many_tables


def test_every_layout_comes_back_equal_from_its_file_and_from_its_json(tmp_path: Path) -> None:
    plan = every_layout(profile=True)
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    (tmp_path / "all.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "all.json") == plan
    assert plan != every_layout()
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_file_is_stable_and_has_a_line_for_each_table(tmp_path: Path) -> None:
    plan, path = every_layout(profile=True), tmp_path / "plan.json"
    plan.save(path)
    text = path.read_text()
    read_plan(path).save(path)
    assert path.read_text() == text
    for table in plan.tables:
        (line,) = [line for line in text.splitlines() if f'"table": "{table.table}"' in line]
        assert json.loads(line.strip().rstrip(","))["layout"] == table.layout
    assert "shards" not in text
    assert "costs" not in text


def test_json_has_all_shards_and_costs() -> None:
    plan = every_layout()
    dumped = json.loads(plan.to_json())
    assert (dumped["world_size"], dumped["num_nodes"]) == (4, 2)
    assert dumped["bytes_per_rank"] == plan.bytes_per_rank
    for table, line, costs in zip(
        plan.tables, dumped["tables"], dumped["costs"]["tables"], strict=True
    ):
        columns = line["shards"]
        assert [vars(shard) for shard in table.shards] == [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        assert costs["table"] == table.table
        assert costs["weight_bytes"] == sum(shard.weight_bytes for shard in table.shards)
        assert costs["lookups"] > 0
    ranks = dumped["costs"]["ranks"]
    held = [rank["weight_bytes"] + rank["optimizer_bytes"] for rank in ranks]
    assert held == plan.bytes_per_rank
    assert dumped["imbalance"]["memory"] == pytest.approx(max(held) / (sum(held) / 4))
    sent = [rank["sent_bytes"] for rank in ranks]
    assert dumped["imbalance"]["sent"] == pytest.approx(max(sent) / (sum(sent) / 4))


def test_a_thousand_tables_on_a_thousand_ranks_are_a_small_file(tmp_path: Path) -> None:
    plan, path = many_tables(1000, num_nodes=128), tmp_path / "plan.json"
    plan.save(path)
    assert read_plan(path) == plan
    dumped = json.loads(plan.to_json())
    assert path.stat().st_size < 400_000
    assert sum(len(table["shards"]["rank"]) for table in dumped["tables"]) == 1_024_000


def test_a_plan_without_a_layout_for_its_shards_is_not_saved(tmp_path: Path) -> None:
    plan = many_tables(1, num_nodes=1)
    (table,) = plan.tables
    turned = replace(plan, tables=(replace(table, shards=table.shards[::-1]),))
    with pytest.raises(ValueError, match="table 't0': no row_wise layout has its shards"):
        turned.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def changed(plan: ShardingPlan, number: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a plan with other values in a table; None takes a key out."""
    values: dict[str, Any] = json.loads(plan.to_json())
    line = values["tables"][number] | fields
    values["tables"][number] = {key: value for key, value in line.items() if value is not None}
    return values


ROW, COLUMN, WHOLE, SLICES = 0, 1, 4, 6
HOT = vars(hot_profile())


@pytest.mark.parametrize(
    ("table", "fields", "text"),
    [
        (ROW, {"layout": "row_wide"}, "table 'user': layout must be one of table_wise, row_wise"),
        (ROW, {"layout": ["row_wise"]}, r"'user': layout must be one of .*, got \['row_wise'\]"),
        (ROW, {"layout": {}}, r"table 'user': layout must be one of .*, got \{\}"),
        (
            ROW,
            {"num_embeddings": 10**400},
            r"num_embeddings must be from -2\*\*63 to 2\*\*63, got 1",
        ),
        (ROW, {"num_embeddings": 2**60}, "'user': num_embeddings must be at most .*, got 1152921"),
        (ROW, {"embedding_dim": 2**40}, "'user': embedding_dim must be at most 2147483647, got"),
        (ROW, {"rank": 3}, "table 'user' has an unknown key 'rank'; known are table, module"),
        (ROW, {"num_embeddings": None}, "table 'user' lacks the key 'num_embeddings'"),
        (ROW, {"num_embeddings": "9"}, 'num_embeddings must be a whole number, got "9"'),
        (ROW, {"num_embeddings": 0}, "table 'user': num_embeddings must be at least 1, got 0"),
        (ROW, {"is_weighted": 1}, "table 'user': is_weighted must be true or false, got 1"),
        (ROW, {"feature_names": "f"}, "table 'user': feature_names must be a list, got \"f\""),
        (ROW, {"feature_names": [1]}, "table 'user': feature_names must be a string, got 1"),
        (ROW, {"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (
            ROW,
            {"optimizer": "Lion"},
            "optimizer must be one of none, SGD, LarsSGD, Adagrad, RowWise",
        ),
        (ROW, {"num_embeddings": 999}, "table 'user': its shards are not those of row_wise; leave"),
        (WHOLE, {"rank": 4}, r"'city': table_wise\(rank=4\) needs rank 4, the cluster has 4"),
        (WHOLE, {"rank": -1}, "'city': table_wise: rank must be a number from 0"),
        (WHOLE, {"rank": None}, "table 'city': table_wise lacks 'rank'"),
        (COLUMN, {"ranks": [0, 0]}, "table 'item': column_wise: .*ranks must differ"),
        (COLUMN, {"ranks": [0, 1, 2]}, "does not divide 32 columns"),
        (
            SLICES,
            {"accumulator_per_slice": True},
            "'tag' has the key 'accum.*; remove the key, the up",
        ),
        (ROW, {"table": "item"}, "table 'item' is there twice"),
        (ROW, {"table": 3}, "tables must be objects with the key 'table', a string"),
    ],
)
def test_a_damaged_table_is_refused_by_name(
    table: int, fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed(every_layout(), table, fields)))
    with pytest.raises(ValueError, match=rf"plan\.json: .*{text}"):
        read_plan(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"plan\.json is not a plan, or is damaged: Expecting value: line 1 column 1"),
        ('{"shardemb_plan": 1, "tab', r"is not a plan, or is damaged: Unterminated string"),
        ('{"a": 1, "a": 2}', r"is not a plan, or is damaged: key 'a' is there twice"),
        ("\xff", "is not a plan, or is damaged: 'utf-8' codec can't decode"),
        ("[" * 100_000, "is not a plan, or is damaged: its lists and objects are nested too deep"),
        ("[1]", "is not a plan: it lacks the key 'shardemb_plan'; ShardingPlan.save and"),
        ('{"shardemb_plan": 2}', "is a plan of format 2, this version of shardemb reads 1; plan"),
        ('{"shardemb_plan": 1}', r"plan\.json: it lacks the key "),
    ],
)
def test_a_damaged_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_plan(path)


@pytest.mark.parametrize(
    ("section", "fields", "text"),
    [
        ("cluster", {"num_nodes": "2"}, 'cluster: num_nodes must be a whole number, got "2"'),
        ("cluster", {"speed": 2}, "cluster has an unknown key 'speed'; known are name, num_nodes"),
        ("cluster", {"device": "tpu"}, 'cluster: device must be one of cpu, cuda, got "tpu"'),
        ("cluster", {"memory_bytes": 10**400}, "cluster: memory_bytes must be from .*, got 10000"),
        ("cluster", {"memory_gb_per_s": 10**400}, "memory_gb_per_s must be from .*, got 10000"),
        ("cluster", {"memory_gb_per_s": float("nan")}, "memory_gb_per_s must be .*, got NaN"),
        ("cluster", {"device": ["cpu"]}, r'device must be one of cpu, cuda, got \["cpu"\]'),
        ("workload", {"batch_size": 10**400}, "workload: batch_size must be from .*, got 10000"),
        ("workload", {"batch_size": 2**31}, "workload: batch_size must be at most 2147483647"),
        (
            "workload",
            {"ids_per_sample": {"a": 1e10}},
            "of feature 'a' must be a number from 0, got 1",
        ),
        ("profile", {"features": {"user_id": HOT | {"num_ids": 10**400}}}, "num_ids must be from"),
        ("profile", {"features": {"user_id": HOT | {"hot_rows": {"1" * 20: 1}}}}, "18 digits"),
        ("workload", {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ("workload", {"ids_per_sample": {"a": "b"}}, "ids_per_sample 'a' must be a number, got"),
        ("profile", {"features": {"user_id": {}}}, "features 'user_id' lacks the key 'num_emb"),
    ],
)
def test_a_damaged_section_is_refused(
    section: str, fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    values = json.loads(every_layout(profile=True).to_json())
    values[section] |= fields
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"plan\.json: .*{text}"):
        read_plan(path)
    values["sections"] = 1
    values[section] = {}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"plan\.json: it has an unknown key 'sections'"):
        read_plan(path)


def test_a_missing_file_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")
