"""What a plan makes the ranks send, hold and look up in one step. Arithmetic; measures nothing.

The formulas follow TorchRec 1.8: the collectives of `dist_data.py` and `comm_ops.py` in
torchrec/distributed, and what each of `sharding/*.py` hands to them.
"""

# T tables, W ranks, S shards of a table

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardemb.data.profile import FeatureProfile
from shardemb.layouts import ColumnWise, DataParallel, GridShard, TableColumnWise, TableRowWise
from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.workload import Workload

Floats = npt.NDArray[np.float64]

_INT64, _FLOAT32 = 8, 4
"""Bytes of ids and lengths, and of weights and all that is looked up, also from float16 rows."""
_IN_NODES = {TableRowWise.torchrec_name, GridShard.torchrec_name}


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What each table costs each rank in a step: forward, backward and update.

    Bytes are sent when they leave a rank; what a rank keeps for itself is not. A collective of W
    ranks counts as the exchange that moves the least: all-to-all what is addressed to others,
    reduce-scatter (W - 1) / W of its input, all-gather W - 1 times its input, all-reduce
    2 (W - 1) / W times its tensor.

    Attributes:
        tables: Names of the tables, as in the plan.
        sent_bytes_TW: Bytes that each rank sends for each table, float64 [T, W]: ids, lengths and
            weights to the shards, rows or pooled rows back, and their gradients.
        activation_bytes_TW: Bytes that pass through each rank's memory for each table, float64
            [T, W], counted once each as if all were held until the step ends: ids, lengths and
            weights, rows or pooled rows and their gradients, before and after each exchange.
        lookups_TW: Ids that are looked up on each rank, float64 [T, W].
        shared_bytes_W: Bytes that each rank sends for no table in particular, float64 [W]: the
            sizes of what follows.
    """

    tables: tuple[str, ...]
    sent_bytes_TW: Floats
    activation_bytes_TW: Floats
    lookups_TW: Floats
    shared_bytes_W: Floats

    @property
    def sent_bytes_W(self) -> Floats:  # noqa: N802 - its shape
        """All bytes that each rank sends, float64 [W]."""
        total_W: Floats = self.sent_bytes_TW.sum(0) + self.shared_bytes_W
        return total_W

    @property
    def skew_T(self) -> Floats:  # noqa: N802 - its shape
        """Lookups on each table's busiest rank over the mean of those that hold it, float64 [T].

        1 where all are equally busy, and where nothing is looked up.
        """
        holders_T = (self.lookups_TW > 0).sum(1)
        total_T = self.lookups_TW.sum(1)
        skew_T: Floats = np.divide(
            self.lookups_TW.max(1, initial=0.0) * holders_T,
            total_T,
            out=np.ones(len(self.tables)),
            where=total_T > 0,
        )
        return skew_T


def traffic_of(plan: ShardingPlan) -> Traffic:
    """What a step of a plan's workload costs each rank.

    Every rank is taken to have a batch like the workload's: of its size, and with ids that spread
    over the rows as its profile says, or evenly where there is none.

    Args:
        plan: Where the tables lie, and the workload.

    Returns:
        Bytes and lookups by table and rank.

    Raises:
        ValueError: The workload's profile has ids that a table does not have.

    Example:
        >>> import shardemb as se, shardemb.layouts
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> plan = se.plan_sharding(
        ...     model, se.Env(world_size=4), {"user": se.layouts.table_wise(rank=1)}
        ... )
        >>> traffic_of(plan).lookups_TW
        array([[   0., 2048.,    0.,    0.]])
    """
    holds_gradient = _groups_with_gradient(plan)
    parts = [
        _of_table(table, plan, has_gradient=_group(table) in holds_gradient)
        for table in plan.tables
    ]
    shape = (len(plan.tables), plan.world_size)
    sent, activations, lookups = (
        np.array([part[number] for part in parts], np.float64).reshape(shape) for number in range(3)
    )
    return Traffic(
        tables=tuple(table.table for table in plan.tables),
        sent_bytes_TW=sent,
        activation_bytes_TW=activations,
        lookups_TW=lookups,
        shared_bytes_W=_shared_bytes(plan),
    )


def _of_table(
    table: TablePlacement, plan: ShardingPlan, *, has_gradient: bool
) -> tuple[Floats, Floats, Floats]:
    """Bytes sent, bytes held and lookups of a table, float64 [W] each."""
    size, num_nodes = plan.world_size, plan.num_nodes
    ids_W, row_bytes_W, num_shards_W = _by_rank(table, plan)
    bags = plan.workload.batch_size * len(table.feature_names)
    id_bytes = _INT64 + (_FLOAT32 if table.is_weighted else 0)
    # what one rank hands to each, and each hands back: for pooled rows and for sequences
    asked_W = ids_W * id_bytes + num_shards_W * bags * _INT64
    if table.layout == DataParallel.torchrec_name or size == 1:
        gradient = 0
        if table.layout == DataParallel.torchrec_name:
            gradient = table.num_embeddings * table.embedding_dim * _FLOAT32
        sent_W = np.full(size, 2 * (size - 1) / size * gradient)
        return sent_W, asked_W + row_bytes_W * (1 + has_gradient) + gradient, ids_W
    sent_W = asked_W.sum() - asked_W + (size - 1) * row_bytes_W
    rows_on_the_way_W = size * row_bytes_W
    if table.layout in _IN_NODES and 1 < num_nodes < size:
        rows_on_the_way_W = rows_on_the_way_W + 2 * num_nodes * row_bytes_W
    if has_gradient:
        sent_W = sent_W + _gradient_bytes(table, row_bytes_W, num_nodes)
    answer = _answer_bytes(table, plan)
    held_W = asked_W.sum() + size * asked_W + (rows_on_the_way_W + answer) * (1 + has_gradient)
    return sent_W, held_W, size * ids_W


def _gradient_bytes(table: TablePlacement, row_bytes_W: Floats, num_nodes: int) -> Floats:
    """Bytes of gradients that each rank sends to where the rows are."""
    to_others_W: Floats = row_bytes_W.sum() - row_bytes_W
    if table.layout in _IN_NODES:
        local_size = len(row_bytes_W) // num_nodes
        to_others_W = row_bytes_W.sum() / local_size - row_bytes_W
        to_others_W += (local_size - 1) * num_nodes * row_bytes_W
    return to_others_W


def _by_rank(table: TablePlacement, plan: ShardingPlan) -> tuple[Floats, Floats, Floats]:
    """What one rank's batch asks of each: ids, bytes of rows in answer, and of how many shards."""
    shards, size = table.shards, plan.world_size
    rank_S = np.fromiter((shard.rank for shard in shards), np.int64, len(shards))
    columns_S = np.fromiter((shard.num_columns for shard in shards), np.float64, len(shards))
    first_S = np.fromiter((shard.first_row for shard in shards), np.float64, len(shards))
    rows_S = np.fromiter((shard.num_rows for shard in shards), np.float64, len(shards))
    ids_S = np.zeros(len(shards))
    for feature in table.feature_names:
        ids_S += _ids(feature, table, plan.workload, first_S, rows_S)
    bags = plan.workload.batch_size * len(table.feature_names)
    answers_S = ids_S if table.pooling is None else np.full(len(shards), float(bags))
    ids_W, row_bytes_W, num_shards_W = (
        np.bincount(rank_S, weights=of_S, minlength=size).astype(np.float64)
        for of_S in (ids_S, answers_S * columns_S * _FLOAT32, np.ones(len(shards)))
    )
    return ids_W, row_bytes_W, num_shards_W


def _ids(
    feature: str, table: TablePlacement, workload: Workload, first_S: Floats, rows_S: Floats
) -> Floats:
    """Ids of a feature in one rank's batch that lie in each of some ranges of rows.

    Raises:
        ValueError: The profile has ids that the table does not have.
    """
    total = workload.batch_size * workload.ids_of(feature)
    profile = None if workload.profile is None else workload.profile.features.get(feature)
    if profile is None or not profile.num_ids:
        return total * rows_S / table.num_embeddings
    end_S = first_S + rows_S
    if _counted_before(profile, np.array([table.num_embeddings]))[0] < profile.num_ids:
        raise ValueError(
            f"the profile has ids of feature {feature!r} that table {table.table!r} does not have, "
            f"of {table.num_embeddings} rows; it was counted for {profile.num_embeddings}"
        )
    counted_S = _counted_before(profile, end_S) - _counted_before(profile, first_S)
    return total * counted_S / profile.num_ids


def _counted_before(profile: FeatureProfile, row_S: npt.NDArray[np.generic]) -> Floats:
    """Counted ids below each of some rows; within a block they are taken as even."""
    num_blocks = len(profile.block_counts)
    edges = np.minimum(np.arange(num_blocks + 1) * profile.block_rows, profile.num_embeddings)
    below = np.concatenate([[0], np.cumsum(profile.block_counts)])
    hot = np.array(sorted(profile.hot_rows), np.int64)
    hot_counts = np.array([profile.hot_rows[int(row)] for row in hot], np.int64)
    hot_below = np.concatenate([[0], np.cumsum(hot_counts)])
    counted_S: Floats = np.interp(row_S.astype(np.float64), edges, below)
    counted_S += hot_below[np.searchsorted(hot, row_S)]
    return counted_S


def _answer_bytes(table: TablePlacement, plan: ShardingPlan) -> float:
    """Bytes of rows or pooled rows that come back to each rank."""
    workload = plan.workload
    if table.pooling is None:
        rows = sum(workload.batch_size * workload.ids_of(f) for f in table.feature_names)
    else:
        rows = workload.batch_size * len(table.feature_names)
    return rows * table.embedding_dim * _FLOAT32


def _group(table: TablePlacement) -> tuple[str, str]:
    """What TorchRec exchanges at once: the tables of one layout in one collection."""
    layout = table.layout
    if table.pooling is None and layout == TableColumnWise.torchrec_name:
        layout = ColumnWise.torchrec_name
    return table.module, layout


def _groups_with_gradient(plan: ShardingPlan) -> set[tuple[str, str]]:
    """The groups whose rows have gradients.

    Pooled features of a collection are one tensor, so one trainable table gives all groups some.
    """
    pooled = {
        table.module
        for table in plan.tables
        if table.pooling is not None
        and (table.trainable or table.layout == DataParallel.torchrec_name)
    }
    trainable = {_group(table) for table in plan.tables if table.trainable}
    return trainable | {_group(table) for table in plan.tables if table.module in pooled}


def _shared_bytes(plan: ShardingPlan) -> Floats:
    """Bytes of the sizes that go before each group's ids: of every tensor, and the batch's."""
    num_numbers = 0
    for group in _exchanged_groups(plan.tables).values():
        num_tensors = 3 if group.is_weighted else 2
        num_numbers += num_tensors + 1
    return np.full(plan.world_size, float((plan.world_size - 1) * num_numbers * _INT64))


def _exchanged_groups(
    tables: Iterable[TablePlacement],
) -> dict[tuple[str, str], TablePlacement]:
    """A table of each group that exchanges ids."""
    return {_group(table): table for table in tables if table.layout != DataParallel.torchrec_name}
