"""A sharding plan as a value, as text and as JSON. How one is made is in `plan.py`."""

import functools
import json
from dataclasses import asdict, dataclass

from shardemb.cluster import Cluster
from shardemb.text import format_bytes, format_table
from shardemb.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A block of a table on one rank.

    Attributes:
        rank: The rank that holds it.
        first_row: Its first row in the table.
        num_rows: Number of its rows.
        first_column: Its first column in the table.
        num_columns: Number of its columns.
        weight_bytes: Bytes of its weights.
        optimizer_bytes: Bytes of its optimizer state.
    """

    rank: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    weight_bytes: int
    optimizer_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.weight_bytes + self.optimizer_bytes


@dataclass(frozen=True, kw_only=True)
class TablePlacement:
    """Where one table lies.

    Attributes:
        table: Name of the table.
        module: Path of its collection in the model; "" where the model is the collection.
        feature_names: The features that look it up.
        num_embeddings: Number of rows.
        embedding_dim: Number of columns.
        dtype: Of its rows: "float32" or "float16".
        pooling: "sum" or "mean"; None in a sequence collection, which does not pool.
        is_weighted: Whether the ids of its bags carry weights.
        trainable: Whether its rows are updated.
        layout: TorchRec's name of the layout, such as "row_wise".
        chosen_by: Who chose the layout, and why.
        optimizer: Name of its sparse optimizer.
        shards: Its blocks: by slice of columns and within it by rows. Of a data-parallel table
            every rank has one, which is the whole table.
    """

    table: str
    module: str
    feature_names: tuple[str, ...]
    num_embeddings: int
    embedding_dim: int
    dtype: str
    pooling: str | None
    is_weighted: bool
    trainable: bool
    layout: str
    chosen_by: str
    optimizer: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    """Which rank holds which rows of which table.

    Attributes:
        cluster: The ranks that it is for.
        workload: The batches that it is for.
        tables: One placement for each table.
    """

    cluster: Cluster
    workload: Workload
    tables: tuple[TablePlacement, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks that it is for."""
        return self.cluster.world_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes, each with the same number of ranks."""
        return self.cluster.num_nodes

    @functools.cached_property
    def bytes_per_rank(self) -> list[int]:
        """Bytes of weights and optimizer state on each rank."""
        totals = [0] * self.world_size
        for table in self.tables:
            for shard in table.shards:
                totals[shard.rank] += shard.num_bytes
        return totals

    def to_json(self) -> str:
        """The plan as JSON: `world_size`, `num_nodes`, `tables` and `bytes_per_rank`."""
        plan = {
            "world_size": self.world_size,
            "num_nodes": self.num_nodes,
            "tables": [asdict(table) for table in self.tables],
            "bytes_per_rank": self.bytes_per_rank,
        }
        return json.dumps(plan, indent=2)

    def __str__(self) -> str:
        rows = [
            (
                table.table,
                f"{table.num_embeddings:,} x {table.embedding_dim}",
                table.layout,
                _ranges([shard.rank for shard in table.shards]),
                format_bytes(sum(shard.weight_bytes for shard in table.shards)),
                format_bytes(sum(shard.optimizer_bytes for shard in table.shards)),
                format_bytes(max(shard.num_bytes for shard in table.shards)),
                table.optimizer,
                table.chosen_by,
            )
            for table in self.tables
        ]
        header = (
            "table",
            "rows x dim",
            "layout",
            "ranks",
            "weights",
            "state",
            "per rank",
            "optimizer",
            "chosen by",
        )
        totals = self.bytes_per_rank
        busiest = max(range(self.world_size), key=totals.__getitem__)
        mean = sum(totals) / self.world_size
        lines = [format_table(header, rows, right=(1, 4, 5, 6))]
        if self.world_size <= 16:
            lines += [f"rank {rank}: {format_bytes(total)}" for rank, total in enumerate(totals)]
        lines.append(
            f"in all {format_bytes(sum(totals))}; most on rank {busiest}: "
            f"{format_bytes(totals[busiest])}, {totals[busiest] / mean:.2f} times the mean"
        )
        return "\n".join(lines)


def _ranges(ranks: list[int]) -> str:
    """Ranks in few characters: [0, 1, 2, 5] is '0-2,5'."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
