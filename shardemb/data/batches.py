"""Batches as TorchRec's `KeyedJaggedTensor`, from lists, arrays and padded arrays, guarded."""

# B batch, L padded length, N ids of a feature

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from shardemb.config import TableConfig
from shardemb.data.id_guard import FeatureLimit, IdGuard

PADDING = -1


def keyed_jagged_tensor(
    features: Mapping[str, Any], tables: Sequence[TableConfig], *, padding: int = PADDING
) -> KeyedJaggedTensor:
    """Makes a batch and refuses ids that the tables do not have.

    Args:
        features: For each feature the ids of every sample, as one of
            a list of B lists of ids, of any length, also none;
            an integer array or tensor [B]: one id a sample;
            an integer array or tensor [B, L], filled up with `padding`.
        tables: The tables that the batch will look up.
        padding: What fills up a padded array.

    Returns:
        The batch: keys in the order of `features`, ids int64, lengths int64 [num_features * B].

    Raises:
        ValueError: The features differ in their number of samples, ids are not integers, or an id
            is out of its table; the message names the feature, the sample and the id.

    Example:
        >>> table = TableConfig(
        ...     name="t", num_embeddings=9, embedding_dim=4, feature_names=("clicked",)
        ... )
        >>> keyed_jagged_tensor({"clicked": [[1, 2], [], [8]]}, [table]).lengths()
        tensor([2, 0, 1])
    """
    if not features:
        raise ValueError("a batch needs at least one feature, got none")
    all_ids, all_lengths = [], []
    for feature, bags in features.items():
        ids_N, lengths_B = _flatten(feature, bags, padding)
        all_ids.append(ids_N)
        all_lengths.append(lengths_B)
    sizes = {feature: len(lengths) for feature, lengths in zip(features, all_lengths, strict=True)}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all features of a batch must have as many samples, got {sizes}")
    batch = KeyedJaggedTensor(
        keys=list(features), values=torch.cat(all_ids), lengths=torch.cat(all_lengths)
    )
    IdGuard(limits_of(tables)).check(batch)
    return batch


def limits_of(tables: Sequence[TableConfig]) -> list[FeatureLimit]:
    """The limits that tables set to the ids of their features."""
    return [
        FeatureLimit(feature=feature, table=table.name, num_embeddings=table.num_embeddings)
        for table in tables
        for feature in table.feature_names
    ]


def _flatten(feature: str, bags: Any, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(bags, (list, tuple)):
        lengths = [len(bag) if isinstance(bag, Sequence) else 1 for bag in bags]
        flat = [i for bag in bags for i in (bag if isinstance(bag, Sequence) else (bag,))]
        ids_N = torch.as_tensor(np.asarray(flat)) if flat else torch.empty(0, dtype=torch.int64)
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
    else:
        array = torch.as_tensor(bags)
        if array.dim() not in {1, 2}:
            raise ValueError(
                f"feature {feature!r}: ids must be [B] or [B, L], got shape {list(array.shape)}"
            )
        array_BL = array.reshape(len(array), -1)
        kept_BL = (
            array_BL != padding if array.dim() == 2 else torch.ones_like(array_BL, dtype=torch.bool)
        )
        ids_N, lengths_B = array_BL[kept_BL], kept_BL.sum(1)
    if ids_N.dtype.is_floating_point or ids_N.dtype in {
        torch.bool,
        torch.complex64,
        torch.complex128,
    }:
        raise ValueError(f"feature {feature!r}: ids must be integers, got {ids_N.dtype}")
    return ids_N.to(torch.int64), lengths_B
