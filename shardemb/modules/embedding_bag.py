"""TorchRec's `EmbeddingBagCollection` from our tables, with optimizers and initial values."""

from collections.abc import Sequence

import torch
import torchrec
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from shardemb.config import TableConfig, check_tables
from shardemb.data.bag_padding import padding_of_features
from shardemb.modules.tables import attach_training, keep_bfloat16, shared_fields

_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


def EmbeddingBagCollection(  # noqa: N802 - it stands where TorchRec's class stands
    tables: Sequence[TableConfig],
    *,
    seed: int = 0,
    device: str | torch.device = "meta",
    is_weighted: bool = False,
) -> torchrec.EmbeddingBagCollection:
    """Pooled lookups in several tables, as TorchRec's own module, ready for `plan_sharding`.

    Nothing is allocated on "meta". On another device the tables are whole, hold the initial values
    that they would hold sharded, and train as any torch module: for references and for tests.

    Args:
        tables: The tables; their names must differ.
        seed: Seed of the initial values. Rows are a pure function of (seed, table name, row).
        device: "meta", or where to build the whole tables.
        is_weighted: Whether every id of a batch carries a weight, with which its row is multiplied
            before it is pooled.

    Returns:
        A `torchrec.EmbeddingBagCollection`. Its forward takes a `KeyedJaggedTensor` and returns a
        `KeyedTensor` with float32 [B, embedding_dim] for each feature. A feature of two tables is
        there once for each, as "feature@table".

    Raises:
        ValueError: No table, two of one name, a weighted table with mean pooling, or tables that
            share a feature and differ in `padding_idx`.

    Example:
        >>> table = TableConfig(
        ...     name="user", num_embeddings=10, embedding_dim=4, feature_names=("user_id",)
        ... )
        >>> EmbeddingBagCollection([table]).embedding_bags["user"].weight.device.type
        'meta'
    """
    tables = tuple(tables)
    check_tables(tables)
    for table in tables:
        if is_weighted and table.pooling == "mean":
            raise ValueError(
                f"table {table.name!r}: a weighted bag has no mean in torch; use pooling='sum', "
                "and weights that add up to 1"
            )
    padding_of_features((table.name, table.feature_names, table.padding_idx) for table in tables)
    collection = torchrec.EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(**shared_fields(table, seed), pooling=_POOLING[table.pooling])
            for table in tables
        ],
        is_weighted=is_weighted,
        device=torch.device(device),
    )
    for table in tables:
        keep_bfloat16(collection.embedding_bags[table.name], table, seed)
        attach_training(collection.embedding_bags[table.name], table)
    return collection
