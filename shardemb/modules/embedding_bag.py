"""TorchRec's `EmbeddingBagCollection` from our tables, with optimizers and initial values."""

from collections.abc import Sequence

import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from shardemb.config import TableConfig, check_tables
from shardemb.init import Init

_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
_VALUES_AT_ONCE = 1 << 18
"""Values drawn at once while a table is filled, in elements: 1 MiB of float32."""


class InitialValues:
    """Fills any block of a table with its initial values. TorchRec's configs hold it as `init_fn`.

    Args:
        table: Name of the table.
        init: The distribution.
        seed: Seed of all tables of the collection.
    """

    def __init__(self, table: str, init: Init, seed: int) -> None:
        self._table, self._init, self._seed = table, init, seed

    def __repr__(self) -> str:
        return f"InitialValues({self._table!r}, {self._init!r}, seed={self._seed})"

    @torch.no_grad()
    def fill(
        self, block_RD: torch.Tensor, *, first_row: int, first_column: int, embedding_dim: int
    ) -> None:
        """Writes the table's initial values into a block of it, a few rows at a time.

        Args:
            block_RD: The block, any floating dtype and device [R, D].
            first_row: Row of the table at which the block begins.
            first_column: Column of the table at which the block begins.
            embedding_dim: Columns of the whole table.
        """
        num_rows, num_columns = block_RD.shape
        step = max(1, _VALUES_AT_ONCE // embedding_dim)
        for start in range(0, num_rows, step):
            drawn = self._init.rows(
                seed=self._seed,
                table=self._table,
                first_row=first_row + start,
                num_rows=min(step, num_rows - start),
                embedding_dim=embedding_dim,
            )
            kept = torch.from_numpy(drawn)[:, first_column : first_column + num_columns]
            block_RD[start : start + step].copy_(kept)

    def __call__(self, weight_RD: torch.Tensor) -> None:
        """Fills a whole table, as TorchRec asks of an `init_fn` of an unsharded collection."""
        self.fill(weight_RD, first_row=0, first_column=0, embedding_dim=weight_RD.shape[1])


def EmbeddingBagCollection(  # noqa: N802 - it stands where TorchRec's class stands
    tables: Sequence[TableConfig], *, seed: int = 0, device: str | torch.device = "meta"
) -> torchrec.EmbeddingBagCollection:
    """Pooled lookups in several tables, as TorchRec's own module, ready for `plan_sharding`.

    Nothing is allocated on "meta". On another device the tables are whole, hold the initial values
    that they would hold sharded, and train as any torch module: for references and for tests.

    Args:
        tables: The tables; their names must differ.
        seed: Seed of the initial values. Rows are a pure function of (seed, table name, row).
        device: "meta", or where to build the whole tables.

    Returns:
        A `torchrec.EmbeddingBagCollection`. Its forward takes a `KeyedJaggedTensor` and returns a
        `KeyedTensor` with float32 [B, embedding_dim] for each feature.

    Raises:
        ValueError: No table, or two of one name.

    Example:
        >>> table = TableConfig(
        ...     name="user", num_embeddings=10, embedding_dim=4, feature_names=("user_id",)
        ... )
        >>> EmbeddingBagCollection([table]).embedding_bags["user"].weight.device.type
        'meta'
    """
    tables = tuple(tables)
    check_tables(tables)
    collection = torchrec.EmbeddingBagCollection(
        tables=[_torchrec_config(table, seed) for table in tables], device=torch.device(device)
    )
    for table in tables:
        weight = collection.embedding_bags[table.name].weight
        if weight.is_meta:
            _apply_optimizer_in_backward(
                getattr(torchrec.optim, table.optimizer.torchrec_class),
                [weight],
                dict(vars(table.optimizer)),
            )
    return collection


def _torchrec_config(table: TableConfig, seed: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(table.feature_names),
        pooling=_POOLING[table.pooling],
        init_fn=InitialValues(table.name, table.initial_values, seed),
    )
