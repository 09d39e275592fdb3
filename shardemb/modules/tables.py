"""What both kinds of collection make of a table: TorchRec's config, and how it is trained."""

from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType

from shardemb.config import TableConfig
from shardemb.modules.initial_values import InitialValues
from shardemb.modules.training import RowTraining, freeze_first_rows, note_training

_DATA_TYPE = {"float32": DataType.FP32, "float16": DataType.FP16, "bfloat16": DataType.BF16}


def shared_fields(table: TableConfig, seed: int) -> dict[str, Any]:
    """The fields that TorchRec's configs of both kinds have.

    Args:
        table: Our table.
        seed: Of its initial values.

    Returns:
        Names and values.

    Raises:
        ValueError: Torch keeps no module under the table's name.
    """
    if hasattr(nn.ModuleDict(), table.name):
        raise ValueError(
            f"table {table.name!r}: torch's modules have an attribute of that name, and keep no "
            f"table under it; use another, such as '{table.name}_table'"
        )
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "feature_names": list(table.feature_names),
        "data_type": _DATA_TYPE[table.dtype],
        "init_fn": _initial_values(table, seed),
    }


def _initial_values(table: TableConfig, seed: int) -> InitialValues:
    return InitialValues(table.name, table.initial_values, seed, padding_idx=table.padding_idx)


def keep_bfloat16(module: nn.EmbeddingBag | nn.Embedding, table: TableConfig, seed: int) -> None:
    """Gives a table of an unsharded collection its dtype; TorchRec makes all 16-bit rows float16.

    Args:
        module: Of the table.
        table: Names the dtype.
        seed: Of its initial values.
    """
    if table.dtype != "bfloat16":
        return
    module.to(torch.bfloat16)
    weight = module.get_parameter("weight")
    if not weight.is_meta:
        _initial_values(table, seed)(weight)


def attach_training(module: nn.EmbeddingBag | nn.Embedding, table: TableConfig) -> None:
    """Tells a table of an unsharded collection how it is to be trained, if at all.

    One that is not on meta trains as any torch module, but for its padding row and frozen rows,
    which get no gradient.

    Args:
        module: Of the table.
        table: Names the optimizer, and rows that stay as they are.
    """
    weight = module.get_parameter("weight")
    module.padding_idx = table.padding_idx  # torch leaves it out, and so does `shard_modules`
    if not table.trainable:
        weight.requires_grad_(False)  # noqa: FBT003
    elif weight.is_meta:
        note_training(
            weight,
            RowTraining(
                optimizer=table.optimizer,
                rounding=table.rounding,
                frozen_rows=table.frozen_rows,
                padding_idx=table.padding_idx,
            ),
        )
    elif table.frozen_rows:
        freeze_first_rows(weight, table.frozen_rows)
