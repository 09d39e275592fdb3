"""Refuses a batch with ids that a table does not have, naming feature, sample and id.

Unguarded, such an id trains row 0 of some shard: after sharding, ids are local and nobody can name
them.
"""

# N ids of a batch

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
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
        self._limits: dict[str, FeatureLimit] = {}
        for limit in limits:
            known = self._limits.get(limit.feature)
            if known is None or limit.num_embeddings < known.num_embeddings:
                self._limits[limit.feature] = limit
        self._smallest = min(limit.num_embeddings for limit in self._limits.values())

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features that a batch must have."""
        return tuple(self._limits)

    def check(self, batch: KeyedJaggedTensor) -> None:
        """Returns when every id of the batch names a row.

        Args:
            batch: Ids int32 or int64 [N], lengths [num_features * batch_size]; further features are
                not looked at.

        Raises:
            ValueError: A feature is missing, the ids are not integers, a length is negative, the
                lengths do not add up to the number of ids, or an id is out of its table.
        """
        keys = batch.keys()
        missing = [feature for feature in self._limits if feature not in keys]
        if missing:
            raise ValueError(
                f"feature {missing[0]!r} of table {self._limits[missing[0]].table!r} is not in the "
                "batch, "
                f"which has {list(batch.keys())}"
            )
        ids_N, lengths = batch.values(), batch.lengths()
        if ids_N.dtype not in _ID_DTYPES:
            raise ValueError(
                f"ids must be int32 or int64, got {ids_N.dtype}; convert them before the batch is "
                "made"
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

    def _check_each_feature(self, batch: KeyedJaggedTensor) -> None:
        offsets = batch.offset_per_key()
        for position, feature in enumerate(batch.keys()):
            limit = self._limits.get(feature)
            ids = batch.values()[offsets[position] : offsets[position + 1]]
            if limit is None or ids.numel() == 0:
                continue
            low, high = torch.aminmax(ids)
            if int(low) < 0 or int(high) >= limit.num_embeddings:
                self._refuse(limit, ids, batch[feature].lengths())

    @staticmethod
    def _refuse(limit: FeatureLimit, ids: torch.Tensor, lengths: torch.Tensor) -> None:
        at = int(torch.nonzero((ids < 0) | (ids >= limit.num_embeddings))[0])
        sample = int(torch.searchsorted(lengths.cumsum(0), at, right=True))
        raise ValueError(
            f"feature {limit.feature!r}, sample {sample}: id {int(ids[at])} is outside "
            f"0..{limit.num_embeddings - 1} of table {limit.table!r}; hash or drop such ids, or "
            "raise num_embeddings"
        )


class CheckedForward:
    """A forward hook of a sharded collection: checks its batch, and keeps its keys in order.

    TorchRec freezes the order of keys at the first batch; a batch with the same keys in another
    order would look up the wrong tables, in silence.

    Args:
        guard: Checks the ids.
    """

    def __init__(self, guard: IdGuard) -> None:
        self.guard = guard
        self.trusted = False
        self._keys: list[str] | None = None

    def __call__(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
    ) -> tuple[Any, ...] | None:
        """What torch calls before a forward.

        Args:
            module: The collection.
            args: What its forward was called with.

        Returns:
            Other arguments, or None to leave these.

        Raises:
            ValueError: The batch is refused.
        """
        if not args or not isinstance(args[0], KeyedJaggedTensor):
            return None
        batch = args[0]
        if not self.trusted:
            self.guard.check(batch)
        keys = list(batch.keys())
        if self._keys is None:
            self._keys = keys
        if keys == self._keys:
            return None
        missing = [key for key in self._keys if key not in keys]
        if missing:
            raise ValueError(
                f"feature {missing[0]!r} was in the first batch and is not in this one, which has "
                f"{keys}"
            )
        return (batch.permute([keys.index(key) for key in self._keys]), *args[1:])


def checks_of(model: nn.Module) -> list[CheckedForward]:
    """The checks that `shard_modules` put on the collections of a model."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, CheckedForward)]


def check_with_each(checks: Sequence[CheckedForward], batch: KeyedJaggedTensor) -> None:
    """Checks a batch by every guard whose features it has.

    Args:
        checks: Of `checks_of`.
        batch: The batch.

    Raises:
        ValueError: A guard refuses it.
    """
    keys = set(batch.keys())
    for check in checks:
        if keys.issuperset(check.guard.feature_names):
            check.guard.check(batch)


@contextmanager
def trusted(checks: Sequence[CheckedForward]) -> Iterator[None]:
    """Runs a block whose batch was checked already.

    Args:
        checks: Of `checks_of`.

    Yields:
        Nothing.
    """
    for check in checks:
        check.trusted = True
    try:
        yield
    finally:
        for check in checks:
            check.trusted = False
