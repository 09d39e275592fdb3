"""A sharding plan as a value. Made in `plan.py`; its text, file and page are of `plans/`."""

import functools
from dataclasses import dataclass
from pathlib import Path

from shardemb.cluster import Cluster
from shardemb.files import write_whole
from shardemb.kernel_choice import Kernel
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
        dtype: Of its rows: "float32", "float16" or "bfloat16".
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
        kernel: What looks up and updates the rows: "native", shardemb's own on the CPU, or
            "fbgemm". Replicated tables have FBGEMM's dense kernel in either case.
        tables: One placement for each table.
    """

    cluster: Cluster
    workload: Workload
    kernel: Kernel
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
                totals[shard.rank] += shard.weight_bytes + shard.optimizer_bytes
        return totals

    def save(self, path: str | Path) -> None:
        """Writes the plan to a file that `load_plan` reads: JSON, a line for each table.

        The file holds what was decided and for what; it fits into git, and `shardemb plan diff`
        compares two of them.

        Args:
            path: The file; one that is there is replaced in one move.

        Raises:
            ValueError: The shards of a table are not blocks of it.
            OSError: The file cannot be written.
        """
        from shardemb.plans.file import write_plan

        write_plan(self, path)

    def to_json(self) -> str:
        """The plan as JSON: what `save` writes, and all that follows from it.

        Returns:
            A JSON object: `world_size`, `num_nodes`, `cluster`, `workload`, `tables`, each with its
            `shards` as columns of equal length, `profile` if there is one, `bytes_per_rank`,
            `costs` of each table and of each rank in a step, and `imbalance`, the most on a rank
            over the mean. `load_plan` reads it too, and recomputes what follows.

        Raises:
            ValueError: The shards of a table are not blocks of it, or the profile of the workload
                has ids that a table does not have.
        """
        from shardemb.plans.file import plan_to_json

        return plan_to_json(self)

    def to_html(self) -> str:
        """The plan as a page for the browser: memory and load of each rank, stacked by table.

        Returns:
            One HTML document that needs no other file and no network.

        Raises:
            ValueError: The profile of the workload has ids that a table does not have.
        """
        from shardemb.plans.html import plan_to_html

        return plan_to_html(self)

    def save_html(self, path: str | Path) -> None:
        """Writes `to_html` to a file.

        Args:
            path: The file; one that is there is replaced in one move.

        Raises:
            ValueError: The profile of the workload has ids that a table does not have.
            OSError: The file cannot be written.
        """
        write_whole(path, self.to_html())

    def __str__(self) -> str:
        from shardemb.plans.text import plan_to_text

        return plan_to_text(self)
