"""Refuses a batch with ids that a table does not have, naming feature, sample and id.

Unguarded, such an id trains row 0 of some shard: after sharding, ids are local and nobody can name
them.
"""

# N ids of a batch

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
    """

    feature: str
    table: str
    num_embeddings: int


class IdGuard:
    """Checks batches against the tables that they will look up.

    Args:
        limits: One for each pair of feature and table.
        is_weighted: Whether every id of a batch must have a weight; if not, none may have one.

    Raises:
        ValueError: There are no limits.

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

    def __init__(self, limits: Sequence[FeatureLimit], *, is_weighted: bool = False) -> None:
        if not limits:
            raise ValueError("a batch is checked against at least one table, got none")
        self._limits: dict[str, FeatureLimit] = {}
        for limit in limits:
            known = self._limits.get(limit.feature)
            if known is None or limit.num_embeddings < known.num_embeddings:
                self._limits[limit.feature] = limit
        self.is_weighted = is_weighted
        """Whether every id of a batch must have a weight."""
        self._smallest = min(limit.num_embeddings for limit in self._limits.values())

    @property
    def feature_names(self) -> list[str]:
        """The features that a batch must have."""
        return list(self._limits)

    def check(self, batch: KeyedJaggedTensor) -> None:
        """Raises unless every id of the batch names a row, and every weight is a number.

        Args:
            batch: Ids int32 or int64 [N], lengths [num_features * batch_size], in a weighted
                collection weights float32 [N]; further features are not looked at.

        Raises:
            ValueError: A feature is missing, there are weights where none are used or none where
                some are, ids, lengths or weights are of another dtype or shape, a length is
                negative, the lengths do not add up to the number of ids, the batch has offsets or
                lengths by key that contradict its lengths, an id is out of its table, or a weight
                is not finite.
        """
        self.check_features(batch)
        _check_tensors(batch)
        ids_N, weights_N = batch.values(), batch.weights_or_none()
        if ids_N.numel() == 0:
            return
        if weights_N is not None and not bool(torch.isfinite(weights_N).all()):
            self._check_each_weight(batch)
        low, high = torch.aminmax(ids_N)
        if int(low) < 0 or int(high) >= self._smallest:
            self._check_each_feature(batch)

    def check_features(self, batch: KeyedJaggedTensor) -> None:
        """Raises unless the batch has every feature, once, and weights exactly where they are used.

        Looks at no ids, but at what they are: TorchRec cannot even count samples without integers.

        Args:
            batch: The batch.

        Raises:
            ValueError: Ids, lengths or offsets are no integers, a feature is missing or there
                twice, or there are weights where the tables use none or none where they do.
        """
        _check_dtypes(batch)
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

    def _check_each_weight(self, batch: KeyedJaggedTensor) -> None:
        offsets = batch.offset_per_key()
        for position, feature in enumerate(batch.keys()):
            weights = batch.weights()[offsets[position] : offsets[position + 1]]
            bad = torch.nonzero(~torch.isfinite(weights))
            if feature in self._limits and bad.numel():
                sample = _sample_of(int(bad[0]), batch[feature].lengths())
                raise ValueError(
                    f"weights of feature {feature!r}, sample {sample}: a weight is "
                    f"{float(weights[bad[0]])}; leave out such ids, or mend their weights"
                )


def _check_dtypes(batch: KeyedJaggedTensor) -> None:
    parts = {
        "ids": batch.values(),
        "lengths": batch.lengths_or_none(),
        "offsets": batch.offsets_or_none(),
    }
    for what, values in parts.items():
        if values is not None and (values.dtype not in _ID_DTYPES or values.dim() != 1):
            raise ValueError(
                f"{what} must be int32 or int64 of one dimension, got {values.dtype} "
                f"{list(values.shape)}; convert them where the batch is made"
            )


def _check_tensors(batch: KeyedJaggedTensor) -> None:
    ids_N, lengths, weights_N = batch.values(), batch.lengths(), batch.weights_or_none()
    strides = batch.stride_per_key()
    if lengths.numel() != sum(strides):
        raise ValueError(
            f"a batch of {len(strides)} features and {batch.stride()} samples must have "
            f"{sum(strides)} lengths, one for each bag, got {lengths.numel()}"
        )
    if lengths.numel() and int(lengths.min()) < 0:
        _refuse_length(batch)
    if int(lengths.sum()) != ids_N.numel():
        raise ValueError(
            f"lengths add up to {int(lengths.sum())}, but the batch has {ids_N.numel()} ids"
        )
    _check_sums(batch, strides)
    if weights_N is not None and (
        weights_N.dtype != torch.float32 or weights_N.shape != ids_N.shape
    ):
        raise ValueError(
            f"weights must be float32 {list(ids_N.shape)}, one for each id, got "
            f"{weights_N.dtype} {list(weights_N.shape)}; convert them where the batch is made"
        )


def _check_sums(batch: KeyedJaggedTensor, strides: Sequence[int]) -> None:
    # a batch that was made by hand, or of another, may carry sums of other lengths
    lengths, offsets = batch.lengths(), batch.offsets_or_none()
    carried = (batch.length_per_key_or_none(), batch.offset_per_key_or_none())
    if offsets is None and carried == (None, None):
        return
    sums = torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    if (
        offsets is not None
        and (offsets.numel() or lengths.numel())
        and not offsets.equal(sums.to(offsets.dtype))
    ):
        raise ValueError(
            f"the batch has offsets {offsets.tolist()!s:.80}, and lengths of which they would be "
            f"{sums.tolist()!s:.80}; make the batch of one of them"
        )
    if carried == (None, None):
        return
    offset_per_key = sums[[0, *accumulate(strides)]].tolist()
    length_per_key = [end - start for start, end in pairwise(offset_per_key)]
    for what, known, real in zip(
        ("length_per_key", "offset_per_key"), carried, (length_per_key, offset_per_key), strict=True
    ):
        if known is not None and list(known) != real and (any(known) or any(real)):
            raise ValueError(
                f"the batch has {what} {known!s:.80}, and lengths of which it would be "
                f"{real!s:.80}; leave {what} out where the batch is made"
            )


def _refuse_length(batch: KeyedJaggedTensor) -> None:
    at = int(torch.nonzero(batch.lengths() < 0)[0])
    position, sample = 0, at
    while sample >= batch.stride_per_key()[position]:
        sample -= batch.stride_per_key()[position]
        position += 1
    raise ValueError(
        f"feature {batch.keys()[position]!r}, sample {sample}: the length of a bag must not be "
        f"negative, got {int(batch.lengths()[at])}; offsets, if there are, must not decrease"
    )


def _refuse(limit: FeatureLimit, ids: torch.Tensor, lengths: torch.Tensor) -> None:
    at = int(torch.nonzero((ids < 0) | (ids >= limit.num_embeddings))[0])
    raise ValueError(
        f"feature {limit.feature!r}, sample {_sample_of(at, lengths)}: id {int(ids[at])} is "
        f"outside 0..{limit.num_embeddings - 1} of table {limit.table!r}; mend the id, raise "
        "num_embeddings, or let shardemb.keyed_jagged_tensor make the batch for a TableConfig "
        "whose out_of_range is 'drop', 'clamp', 'hash' or 'oov_row'"
    )


def _sample_of(at: int, lengths: torch.Tensor) -> int:
    return int(torch.searchsorted(lengths.cumsum(0), at, right=True))
