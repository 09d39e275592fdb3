"""Makes the one optimizer of a sharded model."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from shardemb.optimizer import Optimizer
from shardemb.updates.row_optimizer import RowOptimizer
from shardemb.updates.trained import ids_of_table_parameters, noted_trained


def build_optimizer(
    model: nn.Module,
    *,
    dense: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    max_norm: float | None = None,
) -> Optimizer:
    """Makes one optimizer of the tables' own and one for everything else.

    Use it as any of `torch.optim`: `zero_grad()`, `backward()` once or for several micro-batches,
    `step()`. Rows are updated in `step`, not in the backward pass as TorchRec does of itself. What
    a `torch.optim.lr_scheduler` sets holds at the next `step()`, for rows and dense parameters.

    Args:
        model: Of `shard_modules`.
        dense: Makes a torch optimizer of the dense parameters; needed when there are any.
        max_norm: Scales all gradients, of rows and dense parameters, so that their norm together is
            at most this, as `torch.nn.utils.clip_grad_norm_` does of an unsharded model.

    Returns:
        The optimizer.

    Raises:
        ValueError: The model is not sharded or has an optimizer already, or has dense parameters
            and `dense` makes no optimizer of them, or `max_norm` is not positive.
    """
    trained = noted_trained(model)
    if not isinstance(model, DistributedModelParallel) or trained is None:
        raise ValueError(
            "build_optimizer takes the model that shard_modules returned, got "
            f"{type(model).__name__}"
        )
    if trained.has_optimizer:
        raise ValueError(
            "the model has an optimizer of build_optimizer already, and its rows would obey only "
            "one of the two; use that one, or shard the model again"
        )
    if dense is not None and not callable(dense):
        raise ValueError(
            f"dense must make an optimizer of parameters, got a {type(dense).__name__}; give "
            "dense=lambda parameters: torch.optim.AdamW(parameters)"
        )
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"max_norm must be a positive number, got {max_norm!r}")
    parameters = _dense_parameters(model)
    if parameters and dense is None:
        raise ValueError(
            f"the model has {len(parameters)} dense parameters, such as "
            f"{next(iter(parameters))!r}; give build_optimizer(model, dense=lambda "
            "parameters: torch.optim.AdamW(parameters))"
        )
    keyed = KeyedOptimizerWrapper(parameters, dense) if parameters else None
    if keyed is not None:
        _check_takes_only(keyed, parameters)
    trained.has_optimizer = True
    rows = RowOptimizer(model, trained.tables)
    return Optimizer(rows, keyed, backwards=trained.backwards, max_norm=max_norm)


def _check_takes_only(keyed: KeyedOptimizerWrapper, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses a dense optimizer of other parameters, such as those of tables.

    Raises:
        ValueError: It has some.
    """
    given = {id(parameter) for parameter in parameters.values()}
    taken = [parameter for group in keyed.param_groups for parameter in group["params"]]
    if any(id(parameter) not in given for parameter in taken):
        raise ValueError(
            f"dense made an optimizer of {len(taken)} parameters, not only of the "
            f"{len(given)} dense ones it was given; use those, as in dense=lambda parameters: "
            "torch.optim.AdamW(parameters)"
        )


def _dense_parameters(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """The parameters that belong to no table."""
    of_tables = ids_of_table_parameters(model)
    others = in_backward_optimizer_filter(model.named_parameters())
    return {name: weight for name, weight in others if id(weight) not in of_tables}
