"""What differs between two plans, as tables for people to read."""

from collections.abc import Iterator

import numpy as np

from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.plans.cells import ranges, say_load
from shardemb.plans.costs import PlanCosts, costs_of, imbalance
from shardemb.plans.shards import layout_of
from shardemb.text import format_bytes, format_table

_MOST_RANKS = 16
_ARROW = "->"
_REASON = "chosen_by"
"""What follows from the rest, and is told only where nothing else differs."""


def diff_plans(before: ShardingPlan, after: ShardingPlan) -> str:
    """What differs between two plans.

    Args:
        before: A plan.
        after: Another.

    Returns:
        Tables of what differs in the cluster, the kernel, the workload and the tables, then of the
        totals of ranks, the amounts of a step and the imbalance, before and after; "" if the plans
        are equal.

    Raises:
        ValueError: The profile of a workload has ids that a table does not have.

    Example:
        >>> import shardemb as se, shardemb.layouts
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> one, two = (
        ...     se.plan_sharding(model, se.Env(world_size=2), {"user": se.layouts.table_wise(rank)})
        ...     for rank in (0, 1)
        ... )
        >>> for line in diff_plans(one, two).splitlines()[:2]:
        ...     print(line)
        table  what    before                 after
        user   layout  table_wise(rank=0) ->  table_wise(rank=1)
    """
    if before == after:
        return ""
    rows = [*_frame(before, after), *_tables(before, after)]
    rows = [row for row in rows if row[1] != _REASON] or rows
    what = format_table(("table", "what", "before", "after"), rows)
    costs = costs_of(before), costs_of(after)
    parts = [what, _balance(*costs)]
    if before.world_size == after.world_size:
        parts.insert(1, _ranks(*costs))
    return "\n\n".join(part for part in parts if part)


def _row(table: str, what: str, before: object, after: object) -> tuple[str, str, str, str]:
    return table, what, f"{before} {_ARROW}", str(after)


def _frame(before: ShardingPlan, after: ShardingPlan) -> Iterator[tuple[str, str, str, str]]:
    """What differs in the cluster, the kernel and the workload."""
    for name, old in vars(before.cluster).items():
        new = getattr(after.cluster, name)
        if old != new:
            yield _row("(cluster)", name, old, new)
    if before.kernel != after.kernel:
        yield _row("(plan)", "kernel", before.kernel, after.kernel)
    if before.workload.batch_size != after.workload.batch_size:
        sizes = before.workload.batch_size, after.workload.batch_size
        yield _row("(workload)", "batch_size", *sizes)
    ids = before.workload.ids_per_sample, after.workload.ids_per_sample
    for feature in sorted(ids[0].keys() | ids[1].keys()):
        old, new = (numbers.get(feature, "none") for numbers in ids)
        if old != new:
            yield _row("(workload)", f"ids_per_sample of {feature!r}", old, new)
    profiles = before.workload.profile, after.workload.profile
    if profiles[0] != profiles[1]:
        sources = [profile.source if profile else "none" for profile in profiles]
        if sources[0] == sources[1]:
            sources[1] += ", other counts"
        yield _row("(workload)", "profile", *sources)


def _tables(before: ShardingPlan, after: ShardingPlan) -> Iterator[tuple[str, str, str, str]]:
    old_tables = {table.table: table for table in before.tables}
    new_tables = {table.table: table for table in after.tables}
    for name, old in old_tables.items():
        if name not in new_tables:
            yield _row(name, "removed", _in_short(old, before), "")
        else:
            yield from _table(old, new_tables[name], before, after)
    for name, new in new_tables.items():
        if name not in old_tables:
            yield _row(name, "added", "", _in_short(new, after))
    common = [name for name in old_tables if name in new_tables]
    if common != [name for name in new_tables if name in old_tables]:
        yield _row("(tables)", "order", "first plan's", "second plan's")


def _table(
    old: TablePlacement, new: TablePlacement, before: ShardingPlan, after: ShardingPlan
) -> Iterator[tuple[str, str, str, str]]:
    layouts = _layout(old, before), _layout(new, after)
    if layouts[0] != layouts[1]:
        yield _row(old.table, "layout", *layouts)
    else:
        where = [ranges(shard.rank for shard in table.shards) for table in (old, new)]
        if where[0] != where[1]:
            yield _row(old.table, "ranks", *where)
    sizes = _bytes(old), _bytes(new)
    if sizes[0] != sizes[1]:
        yield _row(old.table, "bytes", *map(format_bytes, sizes))
    for name, value in vars(old).items():
        if name not in {"layout", "shards"} and value != getattr(new, name):
            yield _row(old.table, name, value, getattr(new, name))


def _layout(table: TablePlacement, plan: ShardingPlan) -> str:
    return str(layout_of(table, plan.cluster) or f"{table.layout} of other blocks")


def _bytes(table: TablePlacement) -> int:
    return sum(shard.num_bytes for shard in table.shards)


def _in_short(table: TablePlacement, plan: ShardingPlan) -> str:
    shape = f"{table.num_embeddings:,} x {table.embedding_dim}"
    return f"{shape}, {_layout(table, plan)}, {format_bytes(_bytes(table))}"


def _ranks(before: PlanCosts, after: PlanCosts) -> str:
    """Totals of the ranks whose totals differ as printed; of many, those that change most."""
    loads = {name: (old, after.loads[name]) for name, old in before.loads.items()}
    change_W = np.sum([abs(new - old) / max(1.0, old.max()) for old, new in loads.values()], 0)
    differing = np.array(
        [
            rank
            for rank in np.flatnonzero(change_W).tolist()
            if any(
                say_load(name, old[rank]) != say_load(name, new[rank])
                for name, (old, new) in loads.items()
            )
        ],
        dtype=np.int64,
    )
    most = differing[np.argsort(-change_W[differing], kind="stable")][:_MOST_RANKS]
    rows = [
        (str(rank), *(_change(name, old[rank], new[rank]) for name, (old, new) in loads.items()))
        for rank in sorted(most.tolist())
    ]
    if not rows:
        return ""
    text = format_table(("rank", *loads), rows, right=range(len(loads) + 1))
    more = len(differing) - len(rows)
    return text + (f"\nand {more:,} ranks that change less" if more else "")


def _balance(before: PlanCosts, after: PlanCosts) -> str:
    rows = [
        (
            name,
            _change(name, old.sum(), after.loads[name].sum()),
            _change(name, old.max(), after.loads[name].max()),
            f"{imbalance(old):.2f} {_ARROW} {imbalance(after.loads[name]):.2f}",
        )
        for name, old in before.loads.items()
    ]
    return format_table(("balance", "in all", "most", "most / mean"), rows, right=(1, 2, 3))


def _change(name: str, old: float, new: float) -> str:
    return f"{say_load(name, old)} {_ARROW} {say_load(name, new)}"
