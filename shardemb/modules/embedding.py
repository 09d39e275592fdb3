"""TorchRec's `EmbeddingCollection`, for sequences, from our tables."""

from collections.abc import Sequence

import torch
import torchrec
from torchrec.modules.embedding_configs import EmbeddingConfig

from shardemb.config import TableConfig, check_tables
from shardemb.modules.tables import attach_training, keep_bfloat16, shared_fields


def EmbeddingCollection(  # noqa: N802 - it stands where TorchRec's class stands
    tables: Sequence[TableConfig], *, seed: int = 0, device: str | torch.device = "meta"
) -> torchrec.EmbeddingCollection:
    """Lookups that keep every row: sequences, as TorchRec's own module, ready for `plan_sharding`.

    Args:
        tables: The tables; their names must differ, and they have one `embedding_dim`.
        seed: Seed of the initial values. Rows are a pure function of (seed, table name, row).
        device: "meta", or where to build the whole tables.

    Returns:
        A `torchrec.EmbeddingCollection`. Its forward takes a `KeyedJaggedTensor` and returns for
        each feature a `JaggedTensor` with float32 [N, embedding_dim], one row for each id. A
        feature of two tables is there once for each, as "feature@table".

    Raises:
        ValueError: No table, two of one name, two widths, or a table with mean pooling.

    Example:
        >>> table = TableConfig(
        ...     name="item", num_embeddings=10, embedding_dim=4, feature_names=("clicked",)
        ... )
        >>> EmbeddingCollection([table]).embeddings["item"].weight.shape
        torch.Size([10, 4])
    """
    tables = tuple(tables)
    check_tables(tables)
    first = tables[0]
    for table in tables:
        if table.embedding_dim != first.embedding_dim:
            raise ValueError(
                f"table {table.name!r} has embedding_dim {table.embedding_dim} and table "
                f"{first.name!r} {first.embedding_dim}: an EmbeddingCollection has one; make a "
                "collection for each"
            )
        if table.pooling != "sum":
            raise ValueError(
                f"table {table.name!r}: pooling={table.pooling!r} has no effect in an "
                "EmbeddingCollection, which does not pool; use an EmbeddingBagCollection"
            )
    collection = torchrec.EmbeddingCollection(
        tables=[EmbeddingConfig(**shared_fields(table, seed)) for table in tables],
        device=torch.device(device),
    )
    for table in tables:
        keep_bfloat16(collection.embeddings[table.name], table, seed)
        attach_training(collection.embeddings[table.name], table)
    return collection
