"""One optimizer object for the fused and the dense parameters of a sharded model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from shardemb.optim.configs import SGD, Adagrad, RowWiseAdagrad, SparseOptimizer

FUSED, DENSE, REPLICATED = "fused", "dense", "replicated"
"""Prefixes of the parameter names in the combined optimizer."""


_REPLICATED = "_shardemb_optimizer"
_TORCH_CLASS: dict[type[SparseOptimizer], type[torch.optim.Optimizer]] = {
    SGD: torch.optim.SGD,
    Adagrad: torch.optim.Adagrad,
    RowWiseAdagrad: torchrec.optim.RowWiseAdagrad,
}
"""Dense optimizers that compute the same as the fused ones: a row without a gradient stays."""


def mark_replicated(
    weight: nn.Parameter, optimizer: type[SparseOptimizer], options: Mapping[str, Any]
) -> None:
    """Notes on a data-parallel table how it is trained: `build_optimizer` reads it.

    Args:
        weight: The whole table on this rank.
        optimizer: What trains it.
        options: The fields of that: "lr" and for some "eps".
    """
    setattr(weight, _REPLICATED, (_TORCH_CLASS[optimizer], dict(options)))


def _replicated_optimizer(name: str, weight: nn.Parameter) -> KeyedOptimizerWrapper:
    kind, options = getattr(weight, _REPLICATED)
    return KeyedOptimizerWrapper({name: weight}, lambda weights: kind(weights, **options))


def build_optimizer(
    model: nn.Module, *, dense: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
) -> CombinedOptimizer:
    """Makes one optimizer of the tables' fused ones and one for everything else.

    Call `zero_grad()`, then `backward()`, which updates the rows that were looked up, then
    `step()`, which updates the dense parameters. A learning rate that a `torch.optim.lr_scheduler`
    sets reaches the rows at the next `zero_grad()` or `step()`, so in that order it holds from the
    very next step on.

    Args:
        model: Of `shard_modules`.
        dense: Makes a torch optimizer of the dense parameters; needed when there are any.

    Returns:
        TorchRec's `CombinedOptimizer`, also a `torch.optim.Optimizer`.

    Raises:
        ValueError: The model is not sharded, or has dense parameters and `dense` is not given.
    """
    if not isinstance(model, DistributedModelParallel):
        raise ValueError(
            "build_optimizer takes the model that shard_modules returned, got "
            f"{type(model).__name__}"
        )
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizers: list[Any] = [(FUSED, model.fused_optimizer)]
    replicated = [name for name in parameters if hasattr(parameters[name], _REPLICATED)]
    for name in replicated:
        weight = parameters.pop(name)
        optimizers.append((f"{REPLICATED}.{name}", _replicated_optimizer(name, weight)))
    if parameters:
        if dense is None:
            raise ValueError(
                f"the model has {len(parameters)} dense parameters, such as "
                f"{next(iter(parameters))!r}; give build_optimizer(model, dense=lambda "
                "parameters: torch.optim.AdamW(parameters))"
            )
        optimizers.append((DENSE, KeyedOptimizerWrapper(parameters, dense)))
    return CombinedOptimizer(optimizers)
