"""What a plan says, as cells of tables: of its tables, ranks, balance and skew."""

# T tables, W ranks

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shardemb.placement import ShardingPlan
from shardemb.plans.costs import SPLITS_ROWS, PlanCosts, imbalance
from shardemb.text import format_bytes, format_table


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
                *amounts_of(costs, [number]),
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
        costs.traffic.activation_bytes_TW.sum(0),
        costs.loads["sent"],
    )
    rows = [
        (
            str(rank),
            *(format_bytes(float(column_W[rank])) for column_W in columns),
            f"{costs.loads['lookups'][rank]:,.0f}",
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
    found = [
        number
        for number, table in enumerate(plan.tables)
        if table.layout in SPLITS_ROWS and profiled & set(table.feature_names)
    ]
    rows, skew_T = [], costs.traffic.skew_T
    for number in sorted(found, key=lambda number: -skew_T[number]):
        lookups_W, skew = costs.traffic.lookups_TW[number], skew_T[number]
        rows.append(
            (
                plan.tables[number].table,
                plan.tables[number].layout,
                f"{lookups_W.max():,.0f}",
                str(lookups_W.argmax()),
                f"{lookups_W.max() / skew:,.0f}",
                f"{skew:.2f}",
            )
        )
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


def amounts_of(costs: PlanCosts, numbers: Sequence[int]) -> list[str]:
    """Bytes of some tables on all ranks together.

    Args:
        costs: Of a plan.
        numbers: Which of its tables, by their place in the plan.

    Returns:
        Of weights, optimizer state, activations, and sent.
    """
    return [
        format_bytes(float(of_TW[numbers].sum()))
        for of_TW in (
            costs.weight_bytes_TW,
            costs.optimizer_bytes_TW,
            costs.traffic.activation_bytes_TW,
            costs.traffic.sent_bytes_TW,
        )
    ]
