"""One optimizer object for the fused and the dense parameters of a sharded model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from shardemb.optim.replicated import is_replicated, replicated_optimizer

FUSED, DENSE = "fused", "dense"
"""Prefixes of the parameter names in the combined optimizer."""


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
    replicated = [
        replicated_optimizer(name, parameters.pop(name))
        for name, weight in list(parameters.items())
        if is_replicated(weight)
    ]
    optimizers: list[Any] = [(FUSED, CombinedOptimizer([model.fused_optimizer, *replicated]))]
    if parameters:
        if dense is None:
            raise ValueError(
                f"the model has {len(parameters)} dense parameters, such as "
                f"{next(iter(parameters))!r}; give build_optimizer(model, dense=lambda "
                "parameters: torch.optim.AdamW(parameters))"
            )
        optimizers.append((DENSE, KeyedOptimizerWrapper(parameters, dense)))
    return CombinedOptimizer(optimizers)
