"""A plan as text for people to read: where each table lies, what each rank bears, and why."""

# T tables, W ranks

import numpy as np

from shardemb.cluster import Cluster
from shardemb.layouts import DataParallel
from shardemb.placement import ShardingPlan
from shardemb.plans.cells import (
    Cells,
    amounts_of,
    balance_cells,
    rank_cells,
    skew_cells,
    table_cells,
)
from shardemb.plans.costs import PlanCosts, costs_of
from shardemb.text import format_bytes

_MOST_TABLES = 40
_MOST_RANKS = 16
_BUSIEST = 4
"""Ranks that are shown from either end, where there are too many to show all."""


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
        "\n".join(filter(None, (_tables_in_short(plan, costs), explain_choices(plan)))),
        _ranks_in_short(plan, costs),
        str(balance_cells(costs)),
        memory_warning(plan, costs),
    ]
    if plan.workload.profile is not None:
        parts.append(_skews_in_short(plan, costs))
    return "\n\n".join(part for part in parts if part)


def describe_plan(plan: ShardingPlan) -> str:
    """What a plan is for, and what all its tables share.

    Args:
        plan: The plan.

    Returns:
        Lines.
    """
    profile, ids_per_sample = plan.workload.profile, plan.workload.ids_per_sample
    assumed = "" if ids_per_sample else ", 1 id a sample of each feature"
    lines = [
        f"plan for {describe_ranks(plan.cluster)} of {plan.cluster.name!r} "
        f"({plan.cluster.device}, {format_bytes(plan.cluster.memory_bytes)} a rank); "
        f"{plan.workload.batch_size:,} samples a rank and step"
        + (f", ids as in {profile.source}" if profile else assumed)
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
    lines.append(", ".join([count, *shared]) + "; memory is weights and optimizer state")
    lines[-1] += "; activations, sent and lookups are of one step"
    lines.append(_describe_kernel(plan))
    return "\n".join(lines)


def _describe_kernel(plan: ShardingPlan) -> str:
    """What looks up and updates the rows, and what those of replicated tables."""
    whose = {"native": "shardemb's own", "fbgemm": "FBGEMM's"}[plan.kernel]
    name = DataParallel.torchrec_name
    replicated = sum(table.layout == name for table in plan.tables)
    dense = f"; {replicated:,} {name} table{'s' * (replicated > 1)} by FBGEMM's dense one"
    return f"kernel {plan.kernel}, {whose}{dense if replicated else ''}"


def explain_choices(plan: ShardingPlan) -> str:
    """What the reasons of the planner mean.

    Args:
        plan: The plan.

    Returns:
        A line; empty if the planner gave no reasons.
    """
    if not any(table.chosen_by.startswith("planner") for table in plan.tables):
        return ""
    return (
        "planner: estimated ms of a step on each rank that holds the table (of them lookup); then "
        "what the next best layout would take"
    )


def memory_warning(plan: ShardingPlan, costs: PlanCosts) -> str:
    """Says where a step may not fit beside the tables; the planner counts only the tables.

    Args:
        plan: The plan.
        costs: Of the plan.

    Returns:
        A sentence, empty if there is nothing to say.
    """
    activations_TW = costs.traffic.activation_bytes_TW
    activations_W = activations_TW.sum(0)
    fullest = int((costs.memory_W + activations_W).argmax())
    if costs.memory_W[fullest] + activations_W[fullest] <= plan.cluster.memory_bytes:
        return ""
    most = int(activations_TW[:, fullest].argmax())
    held, passing, there = (
        format_bytes(number)
        for number in (
            costs.memory_W[fullest],
            activations_W[fullest],
            plan.cluster.memory_bytes,
        )
    )
    return (
        f"careful: rank {fullest} may run out of memory. Beside {held} of tables and optimizer "
        f"state a step takes up to {passing}, most of it for table {plan.tables[most].table!r}, "
        f"and there are {there}. Use fewer samples a rank, more ranks, or layouts with fewer "
        "activations."
    )


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


def _tables_in_short(plan: ShardingPlan, costs: PlanCosts) -> str:
    """All tables in their order, or the largest and the sum of the rest."""
    if len(plan.tables) <= _MOST_TABLES:
        return str(table_cells(plan, costs, range(len(plan.tables))))
    by_size = np.argsort(-costs.memory_TW.sum(1), kind="stable").tolist()
    largest, rest = by_size[:_MOST_TABLES], by_size[_MOST_TABLES:]
    weights, optimizer, activations, sent = amounts_of(costs, rest)
    return (
        f"{table_cells(plan, costs, largest)}\n"
        f"and {len(rest):,} smaller tables: weights {weights}, optimizer {optimizer}, activations "
        f"{activations}, sent {sent}; to_json() has them all"
    )


def _ranks_in_short(plan: ShardingPlan, costs: PlanCosts) -> str:
    """All ranks, or the most and the least loaded."""
    if plan.world_size <= _MOST_RANKS:
        return str(rank_cells(costs, range(plan.world_size)))
    loads = np.stack([costs.loads[name] for name in ("lookups", "sent", "memory")])
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
