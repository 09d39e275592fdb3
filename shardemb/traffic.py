"""What a plan makes the ranks send, hold and look up in one step. Arithmetic; measures nothing.

Of each group of tables, those of one layout in one collection, TorchRec 1.8 exchanges at once, with
W ranks of N nodes of L (the classes are of torchrec/distributed):

- the sizes of what follows, int64, between all pairs of ranks: `SplitsAllToAllAwaitable`;
- lengths and ids, int64, and weights, float32, each to the rank of its shard, so of a slice of
  columns to every slice: `KJTAllToAllTensorsAwaitable`;
- rows or pooled rows, float32, to the rank that asked, and their gradients back. By layout:
  table_wise, column_wise, table_column_wise and all sequences by all-to-all: `All2All_Pooled_Req`,
  `All2All_Seq_Req`; row_wise by a reduce-scatter, whose gradient is an all-gather:
  `ReduceScatterBase_Req`; table_row_wise and grid_shard by a reduce-scatter between the L ranks of
  a node and an all-to-all between the N ranks of one number: `TwRwPooledEmbeddingDist`;
- of data_parallel tables that are trained nothing but which rows were touched, a byte for each, and
  the gradient of all rows, by all-reduces of our own: `shardemb.updates.replicated`.
"""

# T tables, W ranks, S shards of a table

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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

    Sent is what leaves a rank, counted as in `shardemb.CollectiveCounter`, which counts the same
    in a step that runs. Not in it is what updates need beside gradients: a few numbers; and where
    columns are split, 4 bytes for each sum over a whole row that an optimizer needs. Nor what
    weights of ids that are learned send beside themselves.

    Attributes:
        tables: Names of the tables, as in the plan.
        sent_bytes_TW: Bytes that each rank sends for each table, float64 [T, W]: ids, lengths and
            weights to the shards, rows or pooled rows back, and their gradients.
        activation_bytes_TW: Bytes of memory that a step takes on each rank for each table, float64
            [T, W], as if all were held until it ends: ids, lengths and weights, rows or pooled
            rows and their gradients, each before and after each exchange; of a data-parallel table
            also the gradient of all rows.
        lookups_TW: Ids that are looked up on each rank, float64 [T, W].
        shared_bytes_W: Bytes that each rank sends for no table in particular, float64 [W]: the
            sizes of what follows.
        num_holders_T: How many ranks hold rows of each table, float64 [T].
    """

    tables: tuple[str, ...]
    sent_bytes_TW: Floats
    activation_bytes_TW: Floats
    lookups_TW: Floats
    shared_bytes_W: Floats
    num_holders_T: Floats

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
        total_T = self.lookups_TW.sum(1)
        skew_T: Floats = np.divide(
            self.lookups_TW.max(1, initial=0.0) * self.num_holders_T,
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
        num_holders_T=np.array(
            [len({shard.rank for shard in table.shards}) for table in plan.tables], np.float64
        ),
    )


class _TableTraffic(NamedTuple):
    """What one table costs each rank, float64 [W] each."""

    sent_bytes_W: Floats
    activation_bytes_W: Floats
    lookups_W: Floats


class _Batch(NamedTuple):
    """What one rank's batch asks of each rank for a table, float64 [W] each."""

    ids_W: Floats
    question_bytes_W: Floats
    answer_bytes_W: Floats


def _of_table(table: TablePlacement, plan: ShardingPlan, *, has_gradient: bool) -> _TableTraffic:
    batch = _batch_of(table, plan)
    if table.layout == DataParallel.torchrec_name:
        return _of_replicas(table, batch)
    question_W, answer_W = batch.question_bytes_W, batch.answer_bytes_W
    size, num_nodes = plan.world_size, plan.num_nodes
    answer = _whole_answer(table, plan.workload)
    if size == 1:
        held_W = question_W + answer * (1 + has_gradient)
        return _TableTraffic(np.zeros(1), held_W, batch.ids_W)
    sent_W = question_W.sum() - question_W + (size - 1) * answer_W
    rows_W = size * answer_W + answer
    if table.layout in _IN_NODES and 1 < num_nodes < size:
        rows_W += 2 * num_nodes * answer_W  # between the two exchanges
    if has_gradient:
        sent_W += _sent_gradients(table, answer_W, num_nodes)
        rows_W *= 2
    held_W = question_W.sum() + size * question_W + rows_W
    return _TableTraffic(sent_W, held_W, size * batch.ids_W)


def _of_replicas(table: TablePlacement, batch: _Batch) -> _TableTraffic:
    """Every rank looks up its own batch."""
    size = len(batch.ids_W)
    gradient = table.num_embeddings * table.embedding_dim * _FLOAT32 if table.trainable else 0
    touched = table.num_embeddings if table.trainable else 0
    return _TableTraffic(
        sent_bytes_W=np.full(size, 2 * (size - 1) * (gradient + touched) / size),
        activation_bytes_W=batch.question_bytes_W + 2 * batch.answer_bytes_W + gradient,
        lookups_W=batch.ids_W,
    )


def _sent_gradients(table: TablePlacement, answer_W: Floats, num_nodes: int) -> Floats:
    """Bytes of gradients that each rank sends to where the rows are."""
    sent_W: Floats = answer_W.sum() - answer_W
    if table.layout in _IN_NODES:  # to one rank of each other node, and on within its node
        local_size = len(answer_W) // num_nodes
        sent_W = answer_W.sum() / local_size - answer_W
        sent_W += (local_size - 1) * num_nodes * answer_W
    return sent_W


def _batch_of(table: TablePlacement, plan: ShardingPlan) -> _Batch:
    shards = table.shards
    rank_S = np.fromiter((shard.rank for shard in shards), np.int64, len(shards))
    columns_S = np.fromiter((shard.num_columns for shard in shards), np.float64, len(shards))
    first_S = np.fromiter((shard.first_row for shard in shards), np.float64, len(shards))
    rows_S = np.fromiter((shard.num_rows for shard in shards), np.float64, len(shards))
    ids_S = np.zeros(len(shards))
    for feature in table.feature_names:
        ids_S += _ids(feature, table, plan.workload, first_S, rows_S)
    num_bags = plan.workload.batch_size * len(table.feature_names)
    answers_S = ids_S if table.pooling is None else np.full(len(shards), float(num_bags))
    id_bytes = _INT64 + _FLOAT32 * table.is_weighted
    return _Batch(
        *(
            np.bincount(rank_S, weights=of_S, minlength=plan.world_size).astype(np.float64)
            for of_S in (
                ids_S,
                ids_S * id_bytes + num_bags * _INT64,
                answers_S * columns_S * _FLOAT32,
            )
        )
    )


def _ids(
    feature: str, table: TablePlacement, workload: Workload, first_S: Floats, rows_S: Floats
) -> Floats:
    """Ids of a feature in one rank's batch that lie in each of some ranges of rows.

    Raises:
        ValueError: The profile has ids that the table does not have.
    """
    total = workload.batch_size * workload.ids_of(feature)
    rows = table.num_embeddings
    profile = workload.profile_of(feature, table=table.table, num_embeddings=rows)
    if profile is None:
        return total * rows_S / rows
    counted_S = profile.ids_before(first_S + rows_S) - profile.ids_before(first_S)
    return total * counted_S / profile.num_ids


def _whole_answer(table: TablePlacement, workload: Workload) -> float:
    """Bytes of rows or pooled rows that come back to each rank."""
    num_rows: float = workload.batch_size * len(table.feature_names)
    if table.pooling is None:
        num_rows = sum(workload.batch_size * workload.ids_of(f) for f in table.feature_names)
    return num_rows * table.embedding_dim * _FLOAT32


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
    trainable = {_group(table) for table in plan.tables if table.trainable}
    pooled = {table.module for table in plan.tables if table.pooling and table.trainable}
    return trainable | {_group(table) for table in plan.tables if table.module in pooled}


def _shared_bytes(plan: ShardingPlan) -> Floats:
    """Bytes of the sizes that go before each group's tensors: of every tensor, and the batch's."""
    num_tensors = {
        _group(table): 3 if table.is_weighted else 2
        for table in plan.tables
        if table.layout != DataParallel.torchrec_name
    }
    num_sizes = sum(number + 1 for number in num_tensors.values())
    return np.full(plan.world_size, float((plan.world_size - 1) * num_sizes * _INT64))
