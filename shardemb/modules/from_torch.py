"""Turns the embedding modules of a torch model into tables that can be sharded, in place."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
import torchrec
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardemb.config import TableConfig
from shardemb.modules.adapters import adapt, feature_of
from shardemb.modules.by_path import Which, chosen_by, optimizers_by
from shardemb.modules.convertible import check_alone, find_embeddings, why_not_convertible
from shardemb.modules.embedding import EmbeddingCollection
from shardemb.modules.embedding_bag import EmbeddingBagCollection
from shardemb.optim import SparseOptimizer

_DTYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
ModelT = TypeVar("ModelT", bound=nn.Module)


def from_torch(
    model: ModelT,
    optimizer: SparseOptimizer | Mapping[str, SparseOptimizer],
    *,
    skip: Which = (),
    weighted: Which = (),
) -> ModelT:
    """Makes tables of a model's `nn.EmbeddingBag` and `nn.Embedding`, in place, weights kept.

    The modules stay where they are, are called as before and return the same, sharded or not: ids
    and offsets, padded ids, `padding_idx`, sum and mean. What changes:

    - Each now holds a TorchRec collection of one table, which `plan_sharding` finds. The table of
      the module `emb_l.0` is named `emb_l_0`, and its feature `emb_l.0.input`.
    - Its key in `state_dict()` goes from `emb_l.0.weight` to
      `emb_l.0.collection.embedding_bags.emb_l_0.weight`, and for `nn.Embedding` to
      `item.collection.embeddings.item.weight`. So load a checkpoint of the torch model before.
    - Once sharded, `optimizer` updates the rows, when that of `build_optimizer` steps; until then
      they are parameters as before. Frozen ones (`requires_grad=False`) are never updated.
      `sparse=True` has no effect: only rows that were looked up are touched anyway.
    - Once sharded there is no whole `weight`. Every rank makes every call, be it with no ids, and
      each call is an exchange between the ranks.

    Args:
        model: Holds the modules; their weights on rank 0 count.
        optimizer: One for all tables, or one for each path; a path names a module or one around
            it, "" the model, and the longest that fits counts.
        skip: Modules to leave as they are: dense, and averaged by data parallelism. Good for small
            ones.
        weighted: Sum bags that are called with `per_sample_weights`, always or at times. Their ids
            then always carry weights, 1 where none are given. Once sharded, given ones get their
            gradient by the native kernel; FBGEMM's refuses those that require one.

    Returns:
        The model.

    Raises:
        ValueError: It is no module, there is nothing to convert, a path is unknown, or a module
            cannot be sharded with the same result: other modes, `max_norm`, `scale_grad_by_freq`,
            tied weights, subclasses. The model is then as it was. Widths that are no multiples
            of 4 are refused by `plan_sharding` where FBGEMM's kernels serve.

    Example:
        >>> from shardemb import optim
        >>> model = nn.ModuleDict({"item": nn.Embedding(10, 4)})
        >>> from_torch(model, optim.SGD(lr=0.1))["item"](torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
        >>> list(model.state_dict())
        ['item.collection.embeddings.item.weight']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {model!r:.80}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in a DistributedDataParallel already; convert it before, shard_modules "
            "makes all else data parallel"
        )
    found = find_embeddings(model)
    skipped = chosen_by(skip, found, "skip")
    chosen = {path: module for path, module in found.items() if path not in skipped}
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} holds no nn.EmbeddingBag or nn.Embedding to convert"
            f"{', but those that skip leaves out' if skipped else ''}; TorchRec's collections need "
            "no conversion"
        )
    for path, module in chosen.items():
        reason = why_not_convertible(module)
        if reason:
            raise ValueError(f"module {path!r}: {reason}, or leave it to torch by skip=({path!r},)")
    check_alone(model, chosen)
    with_weights = chosen_by(weighted, chosen, "weighted")
    _check_weighted(with_weights, chosen)
    _check_names(chosen)
    optimizers = optimizers_by(optimizer, chosen)
    collections = {
        path: _collection(path, module, optimizers.get(path), is_weighted=path in with_weights)
        for path, module in chosen.items()
    }
    for path, module in chosen.items():
        adapt(path, module, collections[path])
    return model


def _check_weighted(weighted: Iterable[str], chosen: Mapping[str, nn.Module]) -> None:
    for path in sorted(weighted):
        module = chosen[path]
        if not isinstance(module, nn.EmbeddingBag) or module.mode != "sum":
            what = f"a {module.mode} bag" if isinstance(module, nn.EmbeddingBag) else "no bag"
            raise ValueError(
                f"module {path!r} is {what}, and only sum bags take per_sample_weights; leave it "
                "out of weighted"
            )


def _table_name(path: str) -> str:
    return path.replace(".", "_") or "model"


def _check_names(chosen: Iterable[str]) -> None:
    path_of: dict[str, str] = {}
    for path in chosen:
        first = path_of.setdefault(_table_name(path), path)
        if first != path:
            raise ValueError(
                f"modules {first!r} and {path!r} would both be table {_table_name(path)!r}; "
                "rename one of them"
            )


def _collection(
    path: str, module: nn.Module, optimizer: SparseOptimizer | None, *, is_weighted: bool
) -> torchrec.EmbeddingBagCollection | torchrec.EmbeddingCollection:
    """A collection of one table, which holds the module's own weight."""
    assert isinstance(module, (nn.EmbeddingBag, nn.Embedding))
    weight = module.weight
    fields: dict[str, Any] = {} if optimizer is None else {"optimizer": optimizer}
    table = TableConfig(
        name=_table_name(path),
        num_embeddings=weight.shape[0],
        embedding_dim=weight.shape[1],
        feature_names=(feature_of(path),),
        pooling="mean" if getattr(module, "mode", "sum") == "mean" else "sum",
        dtype=_DTYPES[weight.dtype],
        padding_idx=module.padding_idx,
        trainable=weight.requires_grad,
        **fields,
    )
    if isinstance(module, nn.EmbeddingBag):
        return EmbeddingBagCollection([table], is_weighted=is_weighted)
    return EmbeddingCollection([table])
