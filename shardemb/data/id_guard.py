"""Refuses a batch with ids that a table does not have, naming feature, sample and id.

Unguarded, such an id trains row 0 of some shard: after sharding, ids are local and nobody can name
them.
"""

# N ids of a batch

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchrec import KeyedJaggedTensor

_ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class FeatureLimit:
    """How many rows the ids of a feature may name.

    Attributes:
        feature: Key in the batch.
        table: Name of the table it looks up.
        num_embeddings: Number of rows of that table.
        is_weighted: Whether its ids carry weights.
    """

    feature: str
    table: str
    num_embeddings: int
    is_weighted: bool = False


class IdGuard:
    """Checks batches against the tables that they will look up.

    Args:
        limits: One for each pair of feature and table.

    Example:
        >>> guard = IdGuard([FeatureLimit(feature="item", table="item", num_embeddings=10)])
        >>> guard.check(
        ...     KeyedJaggedTensor(
        ...         keys=["item"], values=torch.tensor([3, 12]), lengths=torch.tensor([1, 1])
        ...     )
        ... )  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: feature 'item', sample 1: id 12 is outside 0..9 of table 'item'; ...
    """

    def __init__(self, limits: Sequence[FeatureLimit]) -> None:
        if not limits:
            raise ValueError("a batch is checked against at least one table, got none")
        self._limits: dict[str, FeatureLimit] = {}
        for limit in limits:
            known = self._limits.get(limit.feature)
            if known is None or limit.num_embeddings < known.num_embeddings:
                self._limits[limit.feature] = limit
        self.is_weighted = limits[0].is_weighted
        """Whether every id of a batch must have a weight."""
        self._smallest = min(limit.num_embeddings for limit in self._limits.values())

    @property
    def feature_names(self) -> list[str]:
        """The features that a batch must have."""
        return list(self._limits)

    def check(self, batch: KeyedJaggedTensor) -> None:
        """Raises unless every id of the batch names a row.

        Args:
            batch: Ids int32 or int64 [N], lengths [num_features * batch_size]; further features are
                not looked at.

        Raises:
            ValueError: A feature is missing, the batch has weights, the ids are not integers or not
                [N], a length is negative, the lengths do not add up to the number of ids, or an id
                is out of its table.
        """
        self.check_features(batch)
        ids_N, lengths = batch.values(), batch.lengths()
        if ids_N.dtype not in _ID_DTYPES or ids_N.dim() != 1:
            raise ValueError(
                f"ids must be int32 or int64 [N], got {ids_N.dtype} {list(ids_N.shape)}; convert "
                "them where the batch is made"
            )
        if lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"lengths of bags must not be negative, got {int(lengths.min())}")
        if int(lengths.sum()) != ids_N.numel():
            raise ValueError(
                f"lengths add up to {int(lengths.sum())}, but the batch has {ids_N.numel()} ids"
            )
        if ids_N.numel() == 0:
            return
        low, high = torch.aminmax(ids_N)
        if int(low) < 0 or int(high) >= self._smallest:
            self._check_each_feature(batch)

    def check_features(self, batch: KeyedJaggedTensor) -> None:
        """Raises unless the batch has every feature, once, and no weights. Looks at no ids.

        Args:
            batch: The batch.

        Raises:
            ValueError: A feature is missing or there twice, or there are weights.
        """
        keys = list(batch.keys())
        if len(set(keys)) < len(keys):
            raise ValueError(f"the batch has a feature twice: {keys}")
        has_weights = batch.weights_or_none() is not None
        if has_weights != self.is_weighted:
            raise ValueError(
                "the batch has weights, and the tables do not use them; leave them out"
                if has_weights
                else "the batch has no weights, and the tables are of a weighted collection; give "
                "every id one"
            )
        missing = [feature for feature in self._limits if feature not in keys]
        if missing:
            raise ValueError(
                f"feature {missing[0]!r} of table {self._limits[missing[0]].table!r} is not in "
                f"the batch, which has {keys}"
            )

    def _check_each_feature(self, batch: KeyedJaggedTensor) -> None:
        offsets = batch.offset_per_key()
        for position, feature in enumerate(batch.keys()):
            limit = self._limits.get(feature)
            ids = batch.values()[offsets[position] : offsets[position + 1]]
            if limit is None or ids.numel() == 0:
                continue
            low, high = torch.aminmax(ids)
            if int(low) < 0 or int(high) >= limit.num_embeddings:
                _refuse(limit, ids, batch[feature].lengths())


def _refuse(limit: FeatureLimit, ids: torch.Tensor, lengths: torch.Tensor) -> None:
    at = int(torch.nonzero((ids < 0) | (ids >= limit.num_embeddings))[0])
    sample = int(torch.searchsorted(lengths.cumsum(0), at, right=True))
    raise ValueError(
        f"feature {limit.feature!r}, sample {sample}: id {int(ids[at])} is outside "
        f"0..{limit.num_embeddings - 1} of table {limit.table!r}; hash or drop such ids, or raise "
        "num_embeddings"
    )
