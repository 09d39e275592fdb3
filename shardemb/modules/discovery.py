"""Finds the collections of a model, and refuses by name what could not be sharded correctly."""

import torch
import torchrec
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)

from shardemb import optim
from shardemb.optim import SparseOptimizer

_CONFIG_OF: dict[type, type[SparseOptimizer]] = {
    torch.optim.SGD: optim.SGD,
    torch.optim.Adagrad: optim.Adagrad,
    torchrec.optim.SGD: optim.SGD,
    torchrec.optim.Adagrad: optim.Adagrad,
    torchrec.optim.RowWiseAdagrad: optim.RowWiseAdagrad,
}
_HONOURED = {"lr", "eps"}


def find_collections(model: nn.Module) -> dict[str, torchrec.EmbeddingBagCollection]:
    """The unsharded collections of a model by their paths.

    Args:
        model: Any module.

    Returns:
        Paths and collections, at least one; no two tables have one name.

    Raises:
        ValueError: There is none, or one is of a kind that is not supported.
    """
    found: dict[str, torchrec.EmbeddingBagCollection] = {}
    path_of_table: dict[str, str] = {}
    path_of: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is not torchrec.EmbeddingBagCollection:
            _check_not_embeddings(path, module)
            continue
        if id(module) in path_of:
            raise ValueError(
                f"one collection is in the model twice, as {path_of[id(module)]!r} and {path!r}, "
                "of which TorchRec would shard the first only; hold it once"
            )
        path_of[id(module)] = path
        if module.is_weighted():
            raise ValueError(f"collection {path!r} is weighted, which is not supported yet")
        for config in module.embedding_bag_configs():
            _check_table(config, module.embedding_bags[config.name].weight)
            if config.name in path_of_table:
                raise ValueError(
                    f"table {config.name!r} is in two collections, {path_of_table[config.name]!r} "
                    f"and {path!r}; rename one of them"
                )
            path_of_table[config.name] = path
        found[path] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no unsharded EmbeddingBagCollection; build one with "
            "shardemb.EmbeddingBagCollection(tables) and give it to the model"
        )
    return found


def tables_not_row_wise(collection: torchrec.EmbeddingBagCollection) -> dict[str, str]:
    """Tables that TorchRec 1.8 computes wrongly row-wise: mean pooled, where a feature is shared.

    It divides a row-wise mean after the lookup, and finds its columns by the names of features.

    Args:
        collection: Unsharded.

    Returns:
        For each such table a feature of the collection that two tables look up.
    """
    configs = collection.embedding_bag_configs()
    features = [feature for config in configs for feature in config.feature_names]
    shared = sorted(feature for feature in set(features) if features.count(feature) > 1)
    if not shared:
        return {}
    return {config.name: shared[0] for config in configs if config.pooling == PoolingType.MEAN}


def optimizer_of(weight: nn.Parameter) -> type[SparseOptimizer]:
    """The config class of the optimizer that is attached to a table of `find_collections`."""
    return _CONFIG_OF[weight._optimizer_classes[0]]  # type: ignore[attr-defined]


def _check_not_embeddings(path: str, module: nn.Module) -> None:
    kinds = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)
    if isinstance(module, kinds):
        raise ValueError(
            f"module {path!r} is a {type(module).__name__}, which is not supported yet; it would "
            "be replicated on every rank instead of sharded"
        )


def _check_table(config: EmbeddingBagConfig, weight: nn.Parameter) -> None:
    table = f"table {config.name!r}"
    if config.data_type != DataType.FP32:
        raise ValueError(f"{table}: data_type {config.data_type.name} is not supported; use FP32")
    classes = getattr(weight, "_optimizer_classes", [])
    if len(classes) != 1:
        raise ValueError(
            f"{table} has {len(classes) or 'no'} optimizer{'s' * (len(classes) > 1)}, and needs "
            "one: without it TorchRec plans a kernel that never updates the rows. Build the "
            "collection with shardemb.EmbeddingBagCollection, or attach one to its weight with "
            "torchrec.optim.apply_optimizer_in_backward before plan_sharding"
        )
    if classes[0] not in _CONFIG_OF:
        raise ValueError(
            f"{table}: optimizer {classes[0].__name__} is not supported yet; use SGD, Adagrad or "
            "RowWiseAdagrad of shardemb.optim"
        )
    given = weight._optimizer_kwargs[0]  # type: ignore[attr-defined]
    needed = {"lr", "eps"} if classes[0] is torch.optim.Adagrad else {"lr"}
    if not needed <= set(given):
        raise ValueError(
            f"{table}: optimizer {classes[0].__name__} was not given {min(needed - set(given))}, "
            "and FBGEMM's default is not torch's; give it"
        )
    ignored = sorted(set(given) - _HONOURED)
    if ignored:
        raise ValueError(
            f"{table}: optimizer {classes[0].__name__} was given {ignored[0]}, which FBGEMM's "
            f"kernels would ignore; give only {' and '.join(sorted(_HONOURED))}"
        )
