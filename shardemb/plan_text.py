"""A plan as tables for people to read: where each table lies, what each rank bears, and why."""

# T tables, W ranks

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardemb.cluster import Cluster
from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.plan_costs import Floats, PlanCosts, costs_of, imbalance, row_skew
from shardemb.text import format_bytes, format_table

_MOST_TABLES = 40
_MOST_RANKS = 16
_BUSIEST = 4
"""Ranks that are shown from either end, where there are too many to show all."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A table of text.

    Attributes:
        header: A name for each column.
        rows: The cells.
        right: Columns that stand to the right.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        return format_table(self.header, self.rows, right=self.right)


def plan_to_text(plan: ShardingPlan) -> str:
    """A plan as text, as `print(plan)` shows it.

    Args:
        plan: The plan.

    Returns:
        Lines without a trailing newline: tables, ranks, balance, and with a profile the skew of
        tables that are split by rows. Of many tables the largest, of many ranks the most and least
        loaded.

    Raises:
        ValueError: The workload's profile has ids that a table does not have.
    """
    costs = costs_of(plan)
    parts = [
        describe_plan(plan),
        _tables_in_short(plan, costs),
        _ranks_in_short(plan, costs),
        str(balance_cells(costs)),
    ]
    if plan.workload.profile is not None:
        parts.append(_skews_in_short(plan, costs))
    return "\n\n".join(part for part in parts if part)


def describe_plan(plan: ShardingPlan) -> str:
    """What a plan is for, and what all its tables share.

    Args:
        plan: The plan.

    Returns:
        A line or two.
    """
    profile = plan.workload.profile
    lines = [
        f"plan for {describe_ranks(plan.cluster)} of {plan.cluster.name!r} "
        f"({plan.cluster.device}, {format_bytes(plan.cluster.memory_bytes)} a rank); "
        f"{plan.workload.batch_size:,} samples a rank and step"
        + (f", ids as in {profile.source}" if profile else "")
    ]
    shared = [
        kinds.pop()
        for kinds in (
            {table.dtype for table in plan.tables},
            {f"optimizer {table.optimizer}" for table in plan.tables},
        )
        if len(kinds) == 1
    ]
    count = f"{len(plan.tables):,} table{'s' * (len(plan.tables) != 1)}"
    lines.append(", ".join([count, *shared]) + "; activations, sent and lookups are of one step")
    return "\n".join(lines)


def describe_ranks(cluster: Cluster) -> str:
    """The number of ranks and nodes in words.

    Example:
        >>> describe_ranks(
        ...     Cluster(
        ...         name="two of four",
        ...         num_nodes=2,
        ...         ranks_per_node=4,
        ...         memory_bytes=2**35,
        ...         memory_gb_per_s=50,
        ...         intra_node_gb_per_s=20,
        ...         inter_node_gb_per_s=1,
        ...     )
        ... )
        '8 ranks on 2 nodes'
    """
    ranks, nodes = cluster.world_size, cluster.num_nodes
    return f"{ranks:,} rank{'s' * (ranks > 1)} on {nodes:,} node{'s' * (nodes > 1)}"


def table_cells(plan: ShardingPlan, costs: PlanCosts, numbers: Iterable[int]) -> Cells:
    """Where tables lie, and their costs on all ranks together.

    Args:
        plan: The plan.
        costs: Its costs.
        numbers: Which of its tables, by their place in the plan.

    Returns:
        A row for each; a column for the dtype where not all are float32, and for the optimizer
        where they differ.
    """
    with_dtype = any(table.dtype != "float32" for table in plan.tables)
    with_optimizer = len({table.optimizer for table in plan.tables}) > 1
    before = ("table", "rows x dim", *["dtype"] * with_dtype, "layout", "ranks")
    amounts = ("weights", "optimizer", "activations", "sent")
    after = (*["trained by"] * with_optimizer, "chosen by")
    rows = []
    for number in numbers:
        table = plan.tables[number]
        rows.append(
            (
                table.table,
                f"{table.num_embeddings:,} x {table.embedding_dim}",
                *[table.dtype] * with_dtype,
                table.layout,
                ranges([shard.rank for shard in table.shards]),
                *_amounts(costs, [number]),
                *[table.optimizer] * with_optimizer,
                table.chosen_by,
            )
        )
    first = len(before)
    return Cells(
        header=before + amounts + after,
        rows=rows,
        right=(1, *range(first, first + len(amounts))),
    )


def rank_cells(costs: PlanCosts, ranks: Iterable[int]) -> Cells:
    """What ranks hold, and what they bear in a step.

    Args:
        costs: Of a plan.
        ranks: Which ranks.

    Returns:
        A row for each.
    """
    columns = (
        costs.memory_W,
        costs.weight_bytes_TW.sum(0),
        costs.optimizer_bytes_TW.sum(0),
        costs.activation_bytes_TW.sum(0),
        costs.sent_bytes_W,
    )
    rows = [
        (
            str(rank),
            *(format_bytes(float(column_W[rank])) for column_W in columns),
            f"{costs.lookups_W[rank]:,.0f}",
        )
        for rank in ranks
    ]
    header = ("rank", "memory", "weights", "optimizer", "activations", "sent", "lookups")
    return Cells(header=header, rows=rows, right=tuple(range(len(header))))


def balance_cells(costs: PlanCosts) -> Cells:
    """How evenly the ranks are loaded.

    Args:
        costs: Of a plan.

    Returns:
        Rows for memory, bytes sent and lookups: in all, the mean and the most of a rank.
    """
    rows = []
    for name, load_W in costs.loads.items():
        amounts = (load_W.sum(), load_W.mean(), load_W.max())
        said = (say_load(name, float(amount)) for amount in amounts)
        rows.append((name, *said, str(load_W.argmax()), f"{imbalance(load_W):.2f}"))
    header = ("balance", "in all", "mean of ranks", "most", "on rank", "most / mean")
    return Cells(header=header, rows=rows, right=(1, 2, 3, 4, 5))


def skew_cells(plan: ShardingPlan, costs: PlanCosts) -> Cells:
    """How evenly the lookups of tables that are split by rows fall on their shards.

    Args:
        plan: The plan; only tables with a feature in the profile of its workload count.
        costs: Its costs.

    Returns:
        A row for each such table, the most uneven first.
    """
    profile = plan.workload.profile
    profiled = set() if profile is None else set(profile.features)
    found: list[tuple[float, TablePlacement, Floats]] = []
    for table, lookups_W in zip(plan.tables, costs.lookups_TW, strict=True):
        skew = row_skew(table, lookups_W)
        if skew is not None and profiled & set(table.feature_names):
            found.append((skew, table, lookups_W))
    found.sort(key=lambda each: -each[0])
    rows = [
        (
            table.table,
            table.layout,
            f"{lookups_W.max():,.0f}",
            str(lookups_W.argmax()),
            f"{lookups_W.max() / skew:,.0f}",
            f"{skew:.2f}",
        )
        for skew, table, lookups_W in found
    ]
    header = ("split by rows", "layout", "hottest shard", "on rank", "mean", "hottest / mean")
    return Cells(header=header, rows=rows, right=(2, 3, 4, 5))


def say_load(name: str, amount: float) -> str:
    """An amount of one of `PlanCosts.loads` in words.

    Example:
        >>> say_load("sent", 2048), say_load("lookups", 2048)
        ('2.00 KiB', '2,048')
    """
    return f"{amount:,.0f}" if name == "lookups" else format_bytes(amount)


def ranges(ranks: Iterable[int]) -> str:
    """Ranks in few characters.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0-2,5'
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _amounts(costs: PlanCosts, numbers: Sequence[int]) -> list[str]:
    """Bytes of some tables on all ranks: weights, optimizer, activations, sent."""
    return [
        format_bytes(float(of_TW[numbers].sum()))
        for of_TW in (
            costs.weight_bytes_TW,
            costs.optimizer_bytes_TW,
            costs.activation_bytes_TW,
            costs.sent_bytes_TW,
        )
    ]


def _tables_in_short(plan: ShardingPlan, costs: PlanCosts) -> str:
    """All tables in their order, or the largest and the sum of the rest."""
    if len(plan.tables) <= _MOST_TABLES:
        return str(table_cells(plan, costs, range(len(plan.tables))))
    by_size = np.argsort(-costs.memory_TW.sum(1), kind="stable").tolist()
    largest, rest = by_size[:_MOST_TABLES], by_size[_MOST_TABLES:]
    weights, optimizer, activations, sent = _amounts(costs, rest)
    return (
        f"{table_cells(plan, costs, largest)}\n"
        f"and {len(rest):,} smaller tables: weights {weights}, optimizer {optimizer}, activations "
        f"{activations}, sent {sent}; to_json() has them all"
    )


def _ranks_in_short(plan: ShardingPlan, costs: PlanCosts) -> str:
    """All ranks, or the most and the least loaded."""
    if plan.world_size <= _MOST_RANKS:
        return str(rank_cells(costs, range(plan.world_size)))
    loads = np.stack([costs.lookups_W, costs.sent_bytes_W, costs.memory_W])
    by_load = np.lexsort(-loads).tolist()
    shown = rank_cells(costs, by_load[:_BUSIEST] + by_load[-_BUSIEST:])
    lines = str(shown).splitlines()
    hidden = plan.world_size - 2 * _BUSIEST
    lines.insert(
        1 + _BUSIEST, f"... {hidden:,} ranks in between, by memory, then bytes sent, then lookups"
    )
    return "\n".join(lines)


def _skews_in_short(plan: ShardingPlan, costs: PlanCosts) -> str:
    cells = skew_cells(plan, costs)
    if not cells.rows:
        return ""
    shown = Cells(header=cells.header, rows=cells.rows[:_MOST_TABLES], right=cells.right)
    hidden = len(cells.rows) - len(shown.rows)
    return f"{shown}" + (f"\nand {hidden:,} tables with less skew" if hidden else "")
