"""A plan as a file: JSON that goes into git and comes back as the same plan. Knows no model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from shardemb.cluster import Cluster
from shardemb.config import BYTES_OF, MAX_NUM_EMBEDDINGS
from shardemb.data.profile import DataProfile
from shardemb.files import write_whole
from shardemb.kernel_choice import Kernel
from shardemb.layouts import LAYOUTS, Layout
from shardemb.placement import Shard, ShardingPlan, TablePlacement
from shardemb.plans.costs import costs_to_json
from shardemb.plans.shards import OPTIMIZERS, layout_of, shards_like
from shardemb.typed_json import make_typed, parse_json, typed_value
from shardemb.workload import Workload

_FORMAT = 1
_NAME = "shardemb_plan"
_FOLLOWS = {"world_size", "num_nodes", "bytes_per_rank", "costs", "imbalance"}
"""What `plan_to_json` adds and `read_plan` passes over."""
_OLD_KEY = "accumulator_per_slice"
"""Older plans have it for row-wise Adagrad under a split of the columns."""
_OLD_KERNEL = "fbgemm"
"""That of plans that name none, as older ones."""
_SHARD_FIELDS = tuple(field.name for field in fields(Shard))
_TABLE_FIELDS = tuple(
    field.name for field in fields(TablePlacement) if field.name not in {"layout", "shards"}
)

_MOST = {"num_embeddings": MAX_NUM_EMBEDDINGS, "embedding_dim": 2**31 - 1}


class _Line(dict[str, Any]):
    """A JSON object that stands on one line."""


def write_plan(plan: ShardingPlan, path: str | Path) -> None:
    """Writes a plan to a file, as `ShardingPlan.save` says.

    Args:
        plan: The plan.
        path: The file.

    Raises:
        ValueError: The shards of a table are not blocks of it.
        OSError: The file cannot be written.
    """
    write_whole(path, plan_to_file_text(plan))


def plan_to_file_text(plan: ShardingPlan) -> str:
    """What the file of a plan holds.

    Args:
        plan: The plan.

    Returns:
        JSON, a line for each table; equal for equal plans.

    Raises:
        ValueError: The shards of a table are not blocks of it.
    """
    tables = [
        _Line(_table_to_json(table, plan.cluster, with_shards=False)) for table in plan.tables
    ]
    return _render(_decided(plan, tables)) + "\n"


def plan_to_json(plan: ShardingPlan) -> str:
    """A plan and what follows from it, as `ShardingPlan.to_json` says.

    Args:
        plan: The plan.

    Returns:
        JSON.

    Raises:
        ValueError: The shards of a table are not blocks of it.
    """
    tables = [_Line(_table_to_json(table, plan.cluster, with_shards=True)) for table in plan.tables]
    decided = _decided(plan, tables)
    costs, imbalance = costs_to_json(plan)
    return _render(
        {_NAME: decided.pop(_NAME), "world_size": plan.world_size, "num_nodes": plan.num_nodes}
        | decided
        | {
            "bytes_per_rank": plan.bytes_per_rank,
            "costs": {kind: [_Line(one) for one in rows] for kind, rows in costs.items()},
            "imbalance": imbalance,
        }
    )


def read_plan(path: str | Path) -> ShardingPlan:
    """Reads the plan of a file, whatever the model and the ranks; `load_plan` compares with those.

    Args:
        path: A file that `ShardingPlan.save` wrote, or that holds what `to_json` returns.

    Returns:
        The plan, equal to the one that was saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds something else, or is of another format.
    """
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a plan, or is damaged: {error}; write it again with "
            "ShardingPlan.save or shardemb plan --save"
        ) from error
    if not isinstance(values, dict) or _NAME not in values:
        raise ValueError(
            f"{path} is not a plan: it lacks the key {_NAME!r}; ShardingPlan.save and shardemb "
            "plan --save write plans"
        )
    if values[_NAME] != _FORMAT:
        raise ValueError(
            f"{path} is a plan of format {values[_NAME]!r}, this version of shardemb reads "
            f"{_FORMAT}; plan again, or use the version that wrote it"
        )
    try:
        return _plan_of({name: v for name, v in values.items() if name not in {_NAME, *_FOLLOWS}})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _decided(plan: ShardingPlan, tables: list[_Line]) -> dict[str, Any]:
    workload = asdict(plan.workload)
    profile = workload.pop("profile")
    decided = {
        _NAME: _FORMAT,
        "cluster": asdict(plan.cluster),
        "workload": workload,
        "kernel": plan.kernel,
        "tables": tables,
    }
    if profile is not None:
        features = {name: _Line(feature) for name, feature in profile["features"].items()}
        decided["profile"] = profile | {"features": features}
    return decided


def _plan_of(values: dict[str, Any]) -> ShardingPlan:
    wanted = {"cluster", "workload", "tables"}
    for name in (*wanted - values.keys(), *values.keys() - wanted - {"kernel", "profile"}):
        raise ValueError(f"it {'lacks the' if name in wanted else 'has an unknown'} key {name!r}")
    cluster = make_typed(Cluster, values["cluster"], "cluster")
    profile = values.get("profile")
    if profile is not None:
        profile = make_typed(DataProfile, profile, "profile")
    workload = make_typed(Workload, values["workload"], "workload", profile=profile)
    kernel = typed_value(Kernel, values.get("kernel", _OLD_KERNEL), "kernel")
    if not isinstance(values["tables"], list):
        raise ValueError("tables must be a list")
    tables = tuple(_table_of(table, cluster) for table in values["tables"])
    names = [table.table for table in tables]
    if len(set(names)) < len(names):
        raise ValueError(f"table {max(names, key=names.count)!r} is there twice")
    return ShardingPlan(cluster=cluster, workload=workload, kernel=kernel, tables=tables)


def _table_to_json(table: TablePlacement, cluster: Cluster, *, with_shards: bool) -> dict[str, Any]:
    """A table and its layout, and if asked its shards.

    Raises:
        ValueError: Its shards should follow from its layout, and do not.
    """
    layout = layout_of(table, cluster)
    if layout is None and not with_shards:
        raise ValueError(
            f"table {table.table!r}: no {table.layout} layout has its shards, so that a file could "
            "not say where it lies; make the plan with plan_sharding"
        )
    line: dict[str, Any] = {"table": table.table, "layout": table.layout}
    line |= {} if layout is None else vars(layout)
    line |= {name: getattr(table, name) for name in _TABLE_FIELDS}
    if with_shards:
        line["shards"] = _columns(table)
    return line


def _columns(table: TablePlacement) -> dict[str, list[int]]:
    return {name: [getattr(shard, name) for shard in table.shards] for name in _SHARD_FIELDS}


def _table_of(values: Any, cluster: Cluster) -> TablePlacement:
    """The table of a line of the file.

    Raises:
        ValueError: The line is not one that `_table_to_json` writes.
    """
    if not isinstance(values, dict) or not isinstance(values.get("table"), str):
        raise ValueError("tables must be objects with the key 'table', a string")
    who = f"table {values['table']!r}"
    name = values.get("layout")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(f"{who}: layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    if _OLD_KEY in values:
        raise ValueError(
            f"{who} has the key {_OLD_KEY!r}, which layouts no longer have; remove the key, the "
            "update is exact now"
        )
    own = {field.name for field in fields(LAYOUTS[name])}
    where = {key: value for key, value in values.items() if key in own}
    layout = make_typed(LAYOUTS[name], where, who)
    rest = {key: value for key, value in values.items() if key not in own | {"shards"}}
    table = make_typed(TablePlacement, rest, who, shards=())
    _check_place(table, layout)
    table = replace(table, shards=shards_like(table, layout, cluster))
    _check_shards(table, layout, cluster)
    if "shards" in values and values["shards"] != _columns(table):
        raise ValueError(f"{who}: its shards are not those of {layout}; leave the key out")
    return table


def _check_place(table: TablePlacement, layout: Layout) -> None:
    """Checks what the shards of a table are computed from.

    Raises:
        ValueError: It is out of its range.
    """
    for name, allowed in (("dtype", BYTES_OF), ("optimizer", OPTIMIZERS)):
        if getattr(table, name) not in allowed:
            raise ValueError(
                f"table {table.table!r}: {name} must be one of {', '.join(allowed)}, got "
                f"{getattr(table, name)!r}"
            )
    for name in ("num_embeddings", "embedding_dim"):
        if getattr(table, name) < 1:
            raise ValueError(
                f"table {table.table!r}: {name} must be at least 1, got {getattr(table, name)}"
            )
        if getattr(table, name) > _MOST[name]:
            raise ValueError(
                f"table {table.table!r}: {name} must be at most {_MOST[name]}, got "
                f"{getattr(table, name)}"
            )
    for name, value in vars(layout).items():
        if value is None:
            raise ValueError(f"table {table.table!r}: {layout.torchrec_name} lacks {name!r}")


def _check_shards(table: TablePlacement, layout: Layout, cluster: Cluster) -> None:
    """Checks that shards are whole and on ranks that there are.

    Raises:
        ValueError: They are not.
    """
    last = max(shard.rank for shard in table.shards)
    if last >= cluster.world_size:
        raise ValueError(
            f"table {table.table!r}: {layout} needs rank {last}, the cluster has "
            f"{cluster.world_size} ranks"
        )
    num_columns = sum(shard.num_columns for shard in table.shards if shard.first_row == 0)
    if layout.splits_columns and num_columns != table.embedding_dim:
        raise ValueError(
            f"table {table.table!r}: {layout} does not divide {table.embedding_dim} columns"
        )


def _render(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of an object, and for each `_Line` and number."""
    inner = f"{indent}  "
    if value and isinstance(value, Mapping) and not isinstance(value, _Line):
        entries = [
            f"{json.dumps(name, ensure_ascii=False)}: {_render(entry, inner)}"
            for name, entry in value.items()
        ]
    elif value and isinstance(value, list) and isinstance(value[0], _Line):
        entries = [_render(entry, inner) for entry in value]
    else:
        return json.dumps(value, ensure_ascii=False)
    first, last = "[]" if isinstance(value, list) else "{}"
    return first + ",".join(f"\n{inner}{entry}" for entry in entries) + f"\n{indent}{last}"
