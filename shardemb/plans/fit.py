"""Whether a plan, of a file or not, fits: the model's tables, the ranks and their memory."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shardemb.agree import all_or_none
from shardemb.cluster import Cluster, check_where, cluster_of
from shardemb.constraints import DEFAULT_HEADROOM
from shardemb.env import Env
from shardemb.kernel_choice import Kernel, why_not_native
from shardemb.modules.discovery import Collection, Table, find_collections
from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.planning.kernel_rules import why_not_by_kernel, why_not_sliced
from shardemb.planning.layout_rules import check_slices, why_not
from shardemb.plans.file import read_plan
from shardemb.plans.shards import layout_of
from shardemb.plans.text import describe_ranks
from shardemb.text import format_bytes

_SHOWN = 10


def load_plan(path: str | Path, model: nn.Module, where: Env | Cluster) -> ShardingPlan:
    """Reads a plan that `ShardingPlan.save` wrote, if it still fits the model and the ranks.

    Args:
        path: The file.
        model: The model to shard, as for `plan_sharding`.
        where: The ranks, as for `plan_sharding`. With the `Env` of this run every rank must call
            this, and sees the file.

    Returns:
        The plan, equal to the one that was saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `where` is neither, the file is damaged or of another format, or the plan no
            longer fits: tables were added, removed, renamed or changed, the ranks are others or
            have too little memory or cannot run the plan's kernel, or a table may not have its
            layout. The message lists what changed.
        OtherRankError: Another rank of this run refused it.

    Example:
        >>> import pathlib, tempfile, shardemb as se
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> plan = se.plan_sharding(model, se.Env(world_size=2))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "plan.json")
        >>> plan.save(path)
        >>> load_plan(path, model, se.Env(world_size=2)) == plan
        True
    """
    check_where(where)
    if not isinstance(where, Env) or not where.is_live:
        return _load(path, model, where)
    with all_or_none(where, f"reading the plan {path}"):
        return _load(path, model, where)


def _load(path: str | Path, model: nn.Module, where: Env | Cluster) -> ShardingPlan:
    """Reads a plan on this rank alone.

    Raises:
        ValueError: It is damaged or does not fit.
    """
    plan = read_plan(path)
    check_fits(plan, find_collections(model), where, f"the plan in {path}")
    return plan


def check_fits(
    plan: ShardingPlan, collections: Mapping[str, Collection], where: Env | Cluster, what: str
) -> None:
    """Refuses a plan that does not fit a model and ranks.

    Args:
        plan: The plan.
        collections: The model's, of `find_collections`.
        where: The ranks.
        what: What to call the plan.

    Raises:
        ValueError: It does not fit; the message lists what differs.
    """
    changes = _changes_since(plan, collections, where)
    if not changes:
        return
    shown = [f"  {change}" for change in changes[:_SHOWN]]
    if len(changes) > _SHOWN:
        shown.append(f"  and {len(changes) - _SHOWN} more")
    lines = "\n".join(shown)
    raise ValueError(f"{what} does not fit:\n{lines}\nplan again, or change back what changed")


def _changes_since(
    plan: ShardingPlan, collections: Mapping[str, Collection], where: Env | Cluster
) -> list[str]:
    """A line for each reason why a plan does not fit."""
    found = {
        name: (collection, table)
        for collection in collections.values()
        for name, table in collection.tables.items()
    }
    device = where.device.type if isinstance(where, Env) else where.device
    changes = [
        *_changes_of_ranks(plan, where),
        *_changes_of_kernel(plan.kernel, device, is_here=isinstance(where, Env)),
        *_changes_of_names(plan, {name: declared_of(*each) for name, each in found.items()}),
        *(
            change
            for placed in plan.tables
            if placed.table in found
            for change in _changes_of_table(placed, *found[placed.table], plan, device)
        ),
    ]
    return changes or _mixed_slices(plan)


def _mixed_slices(plan: ShardingPlan) -> list[str]:
    try:
        check_slices(plan)
    except ValueError as error:
        return [str(error)]
    return []


def _changes_of_ranks(plan: ShardingPlan, where: Env | Cluster) -> list[str]:
    """Other ranks, or less memory than was planned for, of which some is to stay free."""
    cluster = cluster_of(where) if isinstance(where, Env) else where
    if (plan.world_size, plan.num_nodes) != (cluster.world_size, cluster.num_nodes):
        return [f"it is for {describe_ranks(plan.cluster)}, this run has {describe_ranks(cluster)}"]
    fullest = max(range(plan.world_size), key=plan.bytes_per_rank.__getitem__)
    needed = plan.bytes_per_rank[fullest]
    there, planned = cluster.memory_bytes, plan.cluster.memory_bytes
    limit = there if there >= planned else there * (1 - DEFAULT_HEADROOM)
    if needed <= limit:
        return []
    return [
        f"rank {fullest} would hold {format_bytes(needed)} of tables and optimizer state, and has "
        f"{format_bytes(limit)} for them of {format_bytes(there)}; it was planned for ranks of "
        f"{format_bytes(planned)}"
    ]


def _changes_of_kernel(kernel: Kernel, device: str, *, is_here: bool) -> list[str]:
    """The native kernel on CUDA, or where it was not compiled; of a cluster that is not known."""
    reason = why_not_native(device) if kernel == "native" else None
    if reason is None or (device == "cpu" and not is_here):
        return []
    return [f"its kernel is 'native': {reason}; or plan with kernel='auto' or 'fbgemm'"]


def _changes_of_names(plan: ShardingPlan, declared: dict[str, dict[str, Any]]) -> list[str]:
    """Tables that came, went, or have the same fields under another name."""
    gone = {table.table: _planned(table) for table in plan.tables if table.table not in declared}
    planned = {table.table for table in plan.tables}
    new = {name: fields for name, fields in declared.items() if name not in planned}
    changes = []
    for name, fields in gone.items():
        same = [other for other in new if new[other] == fields]
        if same:
            (now,) = difflib.get_close_matches(name, same, n=1, cutoff=0)
            del new[now]
            changes.append(f"table {name!r} is called {now!r} now")
        else:
            changes.append(f"table {name!r} is no longer in the model")
    return changes + [f"table {name!r} is in the model, and not in the plan" for name in new]


def _changes_of_table(
    placed: TablePlacement, collection: Collection, table: Table, plan: ShardingPlan, device: str
) -> list[str]:
    declared, planned = declared_of(collection, table), _planned(placed)
    changes = [
        f"table {placed.table!r}: {name} is {declared[name]!r}, the plan was made for "
        f"{planned[name]!r}"
        for name in declared
        if declared[name] != planned[name]
    ]
    if changes:
        return changes
    cluster = plan.cluster
    layout = layout_of(placed, cluster)
    if layout is None:
        return [
            f"table {placed.table!r}: its shards are those of no layout; make the plan with "
            "plan_sharding"
        ]
    reason = (
        why_not_by_kernel(table, plan.kernel, device)
        or why_not(
            table,
            layout,
            world_size=cluster.world_size,
            local_world_size=cluster.ranks_per_node,
        )
        or why_not_sliced(table, layout, plan.kernel)
    )
    return [f"table {placed.table!r}: {reason}"] if reason else []


def declared_of(collection: Collection, table: Table) -> dict[str, Any]:
    """What a plan says of a table beside its name and where it lies, as the model has it.

    Args:
        collection: The table's.
        table: The table.

    Returns:
        Fields of a `TablePlacement`.
    """
    return {
        "module": collection.path,
        "feature_names": tuple(table.config.feature_names),
        "num_embeddings": table.config.num_embeddings,
        "embedding_dim": table.config.embedding_dim,
        "dtype": table.dtype,
        "pooling": table.pooling,
        "is_weighted": table.is_weighted,
        "trainable": table.trainable,
        "optimizer": table.training.optimizer.plan_name if table.trainable else "none",
    }


def _planned(table: TablePlacement) -> dict[str, Any]:
    """The same, as the plan has it."""
    own = {"table", "layout", "chosen_by", "shards"}
    return {name: value for name, value in vars(table).items() if name not in own}
