"""Finds the collections of a model, and refuses by name what could not be sharded correctly."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torchrec
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)

from shardemb.data.bag_padding import padding_of_features
from shardemb.modules.torchrec_optimizers import config_of
from shardemb.modules.training import RowTraining, noted_training, num_frozen_rows

_DTYPES = {DataType.FP32: "float32", DataType.FP16: "float16", DataType.BF16: "bfloat16"}
_POOLING = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a collection says of one of its tables.

    Attributes:
        config: TorchRec's.
        weight: The whole table, often on meta.
        padding_idx: A row that stays as it is, and that pooled bags leave out.
        pooling: "sum" or "mean"; None in a sequence collection.
        is_weighted: Whether the ids of its bags carry weights.
    """

    config: BaseEmbeddingConfig
    weight: nn.Parameter
    padding_idx: int | None
    pooling: str | None
    is_weighted: bool

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.config.name)

    @property
    def dtype(self) -> str:
        """Of its rows: "float32", "float16" or "bfloat16"."""
        return _DTYPES[self.config.data_type]

    @property
    def trainable(self) -> bool:
        """Whether its rows are updated."""
        return self.weight.requires_grad

    @property
    def training(self) -> RowTraining:
        """How its rows are trained, if they are."""
        noted = noted_training(self.weight)
        if noted is not None:
            return noted
        kind: type = self.weight._optimizer_classes[0]  # type: ignore[attr-defined]
        given: Mapping[str, Any] = self.weight._optimizer_kwargs[0]  # type: ignore[attr-defined]
        return RowTraining(
            optimizer=config_of(kind, given),
            frozen_rows=num_frozen_rows(self.weight),
            padding_idx=self.padding_idx,
        )


@dataclass(frozen=True, kw_only=True)
class Collection:
    """An unsharded collection and where it is.

    Attributes:
        path: In the model; "" where it is the model.
        module: The collection.
        tables: Its tables by name, in its own order.
    """

    path: str
    module: torchrec.EmbeddingBagCollection | torchrec.EmbeddingCollection
    tables: dict[str, Table]

    @property
    def is_pooled(self) -> bool:
        """Whether it is an `EmbeddingBagCollection`, and not an `EmbeddingCollection`."""
        return isinstance(self.module, torchrec.EmbeddingBagCollection)

    @property
    def is_weighted(self) -> bool:
        """Whether the ids of its bags carry weights."""
        return any(table.is_weighted for table in self.tables.values())

    @property
    def padding_of(self) -> dict[str, int]:
        """The row of each feature that its bags leave out, where there is one."""
        if not self.is_pooled:
            return {}
        return padding_of_features(
            (table.name, table.config.feature_names, table.padding_idx)
            for table in self.tables.values()
        )

    @property
    def outputs(self) -> list[tuple[str, str, Table]]:
        """The name of each output, its feature and its table, as declared."""
        num_tables = Counter(
            name for table in self.tables.values() for name in table.config.feature_names
        )
        return [
            (f"{name}@{table.name}" if num_tables[name] > 1 else name, name, table)
            for table in self.tables.values()
            for name in table.config.feature_names
        ]


def find_collections(model: nn.Module) -> dict[str, Collection]:
    """The unsharded collections of a model by their paths.

    Args:
        model: Any module.

    Returns:
        Paths and collections, at least one; no two tables have one name.

    Raises:
        ValueError: There is none, or one is of a kind that is not supported.
    """
    found: dict[str, Collection] = {}
    path_of_table: dict[str, str] = {}
    path_of: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) not in {torchrec.EmbeddingBagCollection, torchrec.EmbeddingCollection}:
            _check_not_embeddings(path, module)
            continue
        if id(module) in path_of:
            raise ValueError(
                f"one collection is in the model twice, as {path_of[id(module)]!r} and {path!r}, "
                "of which TorchRec would shard the first only; hold it once"
            )
        path_of[id(module)] = path
        found[path] = Collection(path=path, module=module, tables=_tables_in(module))
        _check_outputs(found[path])
        for table in found[path].tables.values():
            _check_table(table)
            if table.name in path_of_table:
                raise ValueError(
                    f"table {table.name!r} is in two collections, {path_of_table[table.name]!r} "
                    f"and {path!r}; rename one of them"
                )
            path_of_table[table.name] = path
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no unsharded EmbeddingBagCollection or "
            "EmbeddingCollection; build one with shardemb.EmbeddingBagCollection(tables) and give "
            "it to the model, or turn torch's own modules into such by shardemb.from_torch"
        )
    return found


def tables_of(collections: Mapping[str, Collection]) -> dict[str, Table]:
    """All tables of some collections by their names, which differ."""
    return {
        name: table
        for collection in collections.values()
        for name, table in collection.tables.items()
    }


def _tables_in(
    module: torchrec.EmbeddingBagCollection | torchrec.EmbeddingCollection,
) -> dict[str, Table]:
    if isinstance(module, torchrec.EmbeddingBagCollection):
        return {
            config.name: Table(
                config=config,
                weight=module.embedding_bags[config.name].weight,
                padding_idx=module.embedding_bags[config.name].padding_idx,
                pooling=_POOLING[config.pooling],
                is_weighted=module.is_weighted(),
            )
            for config in module.embedding_bag_configs()
        }
    return {
        config.name: Table(
            config=config,
            weight=module.embeddings[config.name].weight,
            padding_idx=module.embeddings[config.name].padding_idx,
            pooling=None,
            is_weighted=False,
        )
        for config in module.embedding_configs()
    }


def _check_outputs(collection: Collection) -> None:
    """Refuses outputs of one name, of which TorchRec would return one, and ambiguous padding.

    Raises:
        ValueError: There are two, or tables that share a feature differ in their padding.
    """
    _ = collection.padding_of
    num_outputs = Counter(name for name, _, _ in collection.outputs)
    twice = sorted(name for name, number in num_outputs.items() if number > 1)
    if twice:
        raise ValueError(
            f"collection {collection.path!r} has two outputs {twice[0]!r}: of a feature of that "
            "name, and of a feature that two tables look up; rename one of the features"
        )


def _check_not_embeddings(path: str, module: nn.Module) -> None:
    kinds = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)
    if isinstance(module, kinds):
        raise ValueError(
            f"module {path!r} is a {type(module).__name__}, which is not supported yet; it would "
            "be replicated on every rank instead of sharded"
        )


def _check_table(table: Table) -> None:
    who = f"table {table.name!r}"
    if table.config.data_type not in _DTYPES:
        raise ValueError(
            f"{who}: data_type {table.config.data_type.name} is not supported; use FP32, FP16 or "
            "BF16"
        )
    if table.is_weighted and table.pooling == "mean":
        raise ValueError(
            f"{who}: a weighted bag has no mean in torch; use pooling='sum', and weights that "
            "add up to 1"
        )
    classes = getattr(table.weight, "_optimizer_classes", [])
    if noted_training(table.weight) is not None or (not classes and not table.trainable):
        return
    if len(classes) != 1:
        raise ValueError(
            f"{who} has {len(classes) or 'no'} optimizer{'s' * (len(classes) > 1)}, and needs "
            "one: without it TorchRec plans a kernel that never updates the rows. Build the "
            "collection with shardemb.EmbeddingBagCollection, or attach one to its weight with "
            "torchrec.optim.apply_optimizer_in_backward before plan_sharding"
        )
    try:
        config_of(classes[0], table.weight._optimizer_kwargs[0])  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
