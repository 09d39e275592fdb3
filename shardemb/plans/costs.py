"""What a plan costs each rank: memory that stays, and what a step moves. Arithmetic on arrays."""

# T tables, W ranks

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardemb.layouts import LAYOUTS
from shardemb.placement import ShardingPlan
from shardemb.traffic import Traffic, traffic_of

Floats = npt.NDArray[np.float64]
SPLITS_ROWS = {name for name, kind in LAYOUTS.items() if kind.splits_rows}
"""The layouts whose ranks are as busy as their rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanCosts:
    """What each table costs each rank.

    Attributes:
        weight_bytes_TW: Bytes of weights, float64 [T, W].
        optimizer_bytes_TW: Bytes of optimizer state, float64 [T, W].
        traffic: What a step makes the ranks send, hold and look up.
    """

    weight_bytes_TW: Floats
    optimizer_bytes_TW: Floats
    traffic: Traffic

    @functools.cached_property
    def memory_TW(self) -> Floats:  # noqa: N802 - its shape
        """Bytes of weights and optimizer state, float64 [T, W]."""
        return self.weight_bytes_TW + self.optimizer_bytes_TW

    @functools.cached_property
    def memory_W(self) -> Floats:  # noqa: N802 - its shape
        """Bytes of weights and optimizer state on each rank, float64 [W]."""
        total_W: Floats = self.memory_TW.sum(0)
        return total_W

    @functools.cached_property
    def loads(self) -> dict[str, Floats]:
        """What should be even over the ranks: "memory", bytes "sent" and "lookups", each [W]."""
        return {
            "memory": self.memory_W,
            "sent": self.traffic.sent_bytes_W,
            "lookups": self.traffic.lookups_TW.sum(0),
        }


def costs_of(plan: ShardingPlan) -> PlanCosts:
    """What a plan costs each rank.

    Args:
        plan: The plan.

    Returns:
        The costs, by table and rank.

    Raises:
        ValueError: The workload's profile has ids that a table does not have.

    Example:
        >>> import shardemb as se, shardemb.layouts
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> plan = se.plan_sharding(model, se.Env(world_size=4), {"user": se.layouts.row_wise()})
        >>> costs_of(plan).memory_W
        array([65000., 65000., 65000., 65000.])
    """
    shape = len(plan.tables), plan.world_size
    weights_TW, optimizer_TW = np.zeros(shape), np.zeros(shape)
    for number, table in enumerate(plan.tables):
        ranks_S = [shard.rank for shard in table.shards]
        np.add.at(weights_TW[number], ranks_S, [shard.weight_bytes for shard in table.shards])
        np.add.at(optimizer_TW[number], ranks_S, [shard.optimizer_bytes for shard in table.shards])
    return PlanCosts(
        weight_bytes_TW=weights_TW, optimizer_bytes_TW=optimizer_TW, traffic=traffic_of(plan)
    )


def imbalance(of_ranks_W: Floats) -> float:
    """The most on a rank over the mean; 1 where there is nothing.

    Example:
        >>> imbalance(np.array([1.0, 3.0]))
        1.5
    """
    mean = float(of_ranks_W.mean())
    return float(of_ranks_W.max()) / mean if mean else 1.0


def costs_to_json(plan: ShardingPlan) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """The costs as lists and numbers.

    Args:
        plan: The plan.

    Returns:
        Costs by "tables" and by "ranks", and the imbalance of each load.

    Raises:
        ValueError: The workload's profile has ids that a table does not have.
    """
    costs = costs_of(plan)
    columns = {
        "weight_bytes": costs.weight_bytes_TW,
        "optimizer_bytes": costs.optimizer_bytes_TW,
        "activation_bytes": costs.traffic.activation_bytes_TW,
        "sent_bytes": costs.traffic.sent_bytes_TW,
        "lookups": costs.traffic.lookups_TW,
    }
    of_tables = {name: _numbers(column_TW.sum(1)) for name, column_TW in columns.items()}
    of_ranks = {name: _numbers(column_TW.sum(0)) for name, column_TW in columns.items()}
    of_ranks["sent_bytes"] = _numbers(costs.loads["sent"])
    tables = [
        {"table": table.table} | {name: column[number] for name, column in of_tables.items()}
        for number, table in enumerate(plan.tables)
    ]
    for line, table, skew in zip(tables, plan.tables, costs.traffic.skew_T.tolist(), strict=True):
        if table.layout in SPLITS_ROWS:
            line["row_skew"] = skew
    ranks = [
        {"rank": rank} | {name: column[rank] for name, column in of_ranks.items()}
        for rank in range(plan.world_size)
    ]
    return {"tables": tables, "ranks": ranks}, {
        name: imbalance(load_W) for name, load_W in costs.loads.items()
    }


def _numbers(amounts: Floats) -> list[float]:
    """Amounts as JSON has them: whole ones without a point."""
    return [int(amount) if amount.is_integer() else amount for amount in amounts.tolist()]
