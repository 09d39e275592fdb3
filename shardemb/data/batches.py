"""Batches as TorchRec's `KeyedJaggedTensor`, from lists, arrays and padded arrays, guarded."""

# B batch, L padded length, N ids of a feature

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from shardemb.config import TableConfig
from shardemb.data.id_guard import FeatureLimit, IdGuard

PADDING = -1
_INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}


def keyed_jagged_tensor(
    features: Mapping[str, Any], tables: Sequence[TableConfig], *, padding: int = PADDING
) -> KeyedJaggedTensor:
    """Makes a batch and refuses ids that the tables do not have.

    Args:
        features: For each feature the ids of every sample, as one of
            a list of B bags, each a list or array of ids of any length, including none;
            an integer array or tensor [B]: one id a sample;
            an integer array or tensor [B, L], padded with `padding`.
        tables: The tables that the batch will look up.
        padding: What pads a padded array.

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
        raise ValueError(
            f"all features of a batch must have the same number of samples, got {sizes}"
        )
    batch = KeyedJaggedTensor(
        keys=list(features), values=torch.cat(all_ids), lengths=torch.cat(all_lengths)
    )
    IdGuard(limits_of(tables)).check(batch)
    return batch


def limits_of(
    tables: Iterable[TableConfig | BaseEmbeddingConfig], *, is_weighted: bool = False
) -> list[FeatureLimit]:
    """The limits that tables, ours or TorchRec's, set to the ids of their features.

    Args:
        tables: The tables of a collection.
        is_weighted: Whether their ids carry weights.

    Returns:
        One for each pair of feature and table.
    """
    return [
        FeatureLimit(
            feature=feature,
            table=table.name,
            num_embeddings=table.num_embeddings,
            is_weighted=is_weighted,
        )
        for table in tables
        for feature in table.feature_names
    ]


def _flatten(feature: str, bags: Any, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(bags, (list, tuple)):
        arrays = [_bag(feature, sample, bag) for sample, bag in enumerate(bags)]
        lengths_B = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
        ids_N = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *arrays]))
        return ids_N, lengths_B
    array = torch.as_tensor(bags)
    if array.dim() not in {1, 2}:
        raise ValueError(
            f"feature {feature!r}: ids must be [B] or [B, L], got shape {list(array.shape)}"
        )
    if array.dtype not in _INTEGERS:
        raise ValueError(f"feature {feature!r}: ids must be integers, got {array.dtype}")
    if array.dim() == 1:
        return array.to(torch.int64), torch.ones(len(array), dtype=torch.int64)
    kept_BL = array != padding
    return array[kept_BL].to(torch.int64), kept_BL.sum(1)


def _bag(feature: str, sample: int, bag: Any) -> npt.NDArray[np.int64]:
    try:
        array = np.asarray(bag)
    except ValueError:  # a list of lists of different lengths
        array = np.asarray(None)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    too_large = array.dtype == np.uint64 and array.size > 0 and int(array.max()) >= 1 << 63
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or too_large:
        raise ValueError(
            f"feature {feature!r}, sample {sample}: a bag must be a list of integer ids, got "
            f"{bag!r:.80}"
        )
    return array.astype(np.int64)
