"""Batches as TorchRec's `KeyedJaggedTensor`, from what users have, with the tables' id policies."""

# B samples, N ids

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from shardemb.config import TableConfig
from shardemb.data.bag_forms import Offsets
from shardemb.data.bags import read_ids, read_weights
from shardemb.data.id_counts import IdCounts
from shardemb.data.id_guard import FeatureLimit, IdGuard
from shardemb.data.id_policies import IdPolicy, Lookups, apply_policy, policies_of
from shardemb.env import hide_notices
from shardemb.text import did_you_mean

PADDING = -1


def keyed_jagged_tensor(
    features: Mapping[str, Any],
    tables: Sequence[TableConfig | BaseEmbeddingConfig],
    *,
    weights: Mapping[str, Any] | None = None,
    padding: int = PADDING,
) -> KeyedJaggedTensor:
    """Makes a batch; ids that the tables do not have are refused, or as `out_of_range` says.

    Args:
        features: For each feature that the tables look up the ids of every sample, as one of
            a list of B bags, each a list, array or tensor of ids of any length, including none;
            an array or tensor [B]: one id a sample;
            an array or tensor [B, L], padded with `padding`;
            a tuple (ids, offsets) as `nn.EmbeddingBag` takes them, ids [N] and offsets [B] where
            each bag begins, or `Offsets`, which may say that a last offset follows;
            a NumPy array of objects [B], each a bag;
            an Arrow column of lists, in which a null is no id, or of one id a sample.
            Ids are integers, or strings for tables that hash. Only arrays [B, L] are padded: in a
            list of bags every number is an id.
        tables: The tables that the batch will look up, ours or TorchRec's.
        weights: For each feature a weight in the place of each id, in the same form; with offsets,
            the weights [N] alone will do. None if no table is weighted.
        padding: What pads a padded array.

    Returns:
        The batch, on the CPU: keys in the order of `features`, ids int64, lengths int64
        [num_features * B], weights float32 or None.

    Raises:
        ValueError: A feature or weight is malformed, a feature is missing or looked up by no table,
            the features differ in their number of samples, two tables of one feature contradict
            each other, or an id is out of its table and is to be refused; the message names the
            feature, the sample and the value.

    Example:
        >>> table = TableConfig(
        ...     name="t", num_embeddings=9, embedding_dim=4, feature_names=("clicked",)
        ... )
        >>> keyed_jagged_tensor({"clicked": [[1, 2], [], [8]]}, [table]).lengths()
        tensor([2, 0, 1])
    """
    batch, _ = _Maker(tables, padding).make(features, weights)
    return batch


class Batcher:
    """Makes batches as `keyed_jagged_tensor` does, and counts what becomes of the ids.

    In workers of a DataLoader it counts too, in memory that it shares with them.

    Args:
        tables: The tables that the batches will look up.
        padding: What pads a padded array.

    Raises:
        ValueError: There are no tables, or something else than a list of them, two tables of one
            feature contradict each other, or `padding` is no integer.

    Example:
        >>> table = TableConfig(
        ...     name="t",
        ...     num_embeddings=9,
        ...     embedding_dim=4,
        ...     feature_names=("x",),
        ...     out_of_range="drop",
        ... )
        >>> batcher = Batcher([table])
        >>> batcher({"x": [[1, 9], [8]]}).values()
        tensor([1, 8])
        >>> batcher.counts.of_this_rank()["x"].num_changed
        1
    """

    def __init__(
        self, tables: Sequence[TableConfig | BaseEmbeddingConfig], *, padding: int = PADDING
    ) -> None:
        self._maker = _Maker(tables, padding)
        policies = self._maker.policies
        self.counts = IdCounts({name: policies[name].out_of_range for name in policies})
        """How many ids there were and how many were changed, by feature."""

    def __call__(
        self, features: Mapping[str, Any], *, weights: Mapping[str, Any] | None = None
    ) -> KeyedJaggedTensor:
        """Makes a batch.

        Args:
            features: As for `keyed_jagged_tensor`.
            weights: Likewise.

        Returns:
            The batch.

        Raises:
            ValueError: As by `keyed_jagged_tensor`; nothing of the batch is counted then.
        """
        batch, lookups = self._maker.make(features, weights)
        self.counts.add(
            {name: (part.num_given, part.num_changed) for name, part in lookups.items()}
        )
        return batch


class _Maker:
    """What a batch is made by: the tables' policies and the guard."""

    def __init__(self, tables: Sequence[TableConfig | BaseEmbeddingConfig], padding: int) -> None:
        hide_notices()  # batches are made where no process group is, too
        if isinstance(padding, bool) or not isinstance(padding, int):
            raise ValueError(f"padding must be an integer, got {padding!r}")
        tables = checked_tables(tables)
        self.policies = policies_of(tables)
        self._padding = padding
        self._guards = {
            is_weighted: IdGuard(limits_of(tables), is_weighted=is_weighted)
            for is_weighted in (False, True)
        }

    def make(
        self, features: Mapping[str, Any], weights: Mapping[str, Any] | None
    ) -> tuple[KeyedJaggedTensor, dict[str, Lookups]]:
        _check_names(features, weights, self.policies)
        lookups = {}
        for name, data in features.items():
            bags = read_ids(name, data, padding=self._padding)
            weights_N = None if weights is None else read_weights(name, weights[name], bags)
            lookups[name] = apply_policy(self.policies[name], bags, weights_N)
        _check_sizes(features, lookups)
        parts = lookups.values()
        batch = KeyedJaggedTensor(
            keys=list(features),
            values=torch.from_numpy(np.concatenate([part.ids_N for part in parts])),
            lengths=torch.from_numpy(np.concatenate([part.lengths_B for part in parts])),
            weights=None
            if weights is None
            else torch.from_numpy(np.concatenate([part.weights_N for part in parts])),
        )
        self._guards[weights is not None].check(batch)
        return batch, lookups


def checked_tables(tables: Any) -> list[TableConfig | BaseEmbeddingConfig]:
    """Checks that tables are tables.

    Args:
        tables: What a user gave.

    Returns:
        The tables.

    Raises:
        ValueError: They are something else.

    Example:
        >>> checked_tables("user")
        Traceback (most recent call last):
        ValueError: tables must be a list of TableConfigs, got 'user'
    """
    if isinstance(tables, (TableConfig, BaseEmbeddingConfig)):
        raise ValueError(
            f"tables must be a list of TableConfigs, got the one of {tables.name!r}; use [table]"
        )
    if not isinstance(tables, Iterable) or isinstance(tables, (str, bytes, Mapping)):
        is_short = tables is None or isinstance(tables, (str, int, float))
        got = f"{tables!r:.80}" if is_short else type(tables).__name__
        raise ValueError(f"tables must be a list of TableConfigs, got {got}")
    listed = list(tables)
    for table in listed:
        if not isinstance(table, (TableConfig, BaseEmbeddingConfig)):
            raise ValueError(f"tables must be a list of TableConfigs, got one with {table!r:.80}")
    return listed


def limits_of(tables: Iterable[TableConfig | BaseEmbeddingConfig]) -> list[FeatureLimit]:
    """The limits that tables, ours or TorchRec's, set to the ids of their features.

    Args:
        tables: The tables of a collection.

    Returns:
        One for each pair of feature and table.
    """
    return [
        FeatureLimit(feature=feature, table=table.name, num_embeddings=table.num_embeddings)
        for table in tables
        for feature in table.feature_names
    ]


def _check_names(
    features: Mapping[str, Any], weights: Mapping[str, Any] | None, policies: Mapping[str, IdPolicy]
) -> None:
    if not features:
        raise ValueError("a batch needs at least one feature, got none")
    for what, given in (("features", features), ("weights", {} if weights is None else weights)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{what} must be a dict by feature, got {type(given).__name__}")
    for name in features:
        if name not in policies:
            raise ValueError(
                f"feature {name!r} is looked up by none of the tables; {_meant(name, policies)}"
                "leave it out, or give the table that looks it up too"
            )
    if weights is None:
        return
    for name in weights:
        if name not in features:
            raise ValueError(
                f"there are weights of feature {name!r}, which is not in the batch; "
                f"{_meant(name, features)}leave them out, or give the ids too"
            )
    for name in features:
        if name not in weights:
            raise ValueError(
                f"feature {name!r} has no weights; {_meant(name, weights)}give all features "
                "weights, or weights=None"
            )


def _meant(name: str, names: Iterable[str]) -> str:
    question = did_you_mean(name, names)
    return question and f"{question} Else "


def _check_sizes(features: Mapping[str, Any], lookups: Mapping[str, Lookups]) -> None:
    sizes = {name: len(part.lengths_B) for name, part in lookups.items()}
    if len(set(sizes.values())) > 1:
        hint = (
            "; offsets that end with the number of ids need Offsets(..., include_last_offset=True)"
            if any(isinstance(data, (tuple, Offsets)) for data in features.values())
            else ""
        )
        raise ValueError(
            f"all features of a batch must have the same number of samples, got {sizes}{hint}"
        )
