"""One optimizer for all tables and the dense parameters of a sharded model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from shardemb.errors import RunError
from shardemb.updates.row_optimizer import RowOptimizer, Touched
from shardemb.updates.trained import noted_tables

FUSED, DENSE = "fused", "dense"
"""Prefixes of the parameter names in the combined optimizer."""


class Optimizer(CombinedOptimizer):  # type: ignore[misc]
    """TorchRec's `CombinedOptimizer` of all tables and of the dense parameters.

    What `torch.optim` does on parameters, it does on the rows that were looked up: gradients of all
    backward passes since the last `zero_grad` are summed, and `step` updates each row once. Its
    `param_groups` are one for each trained table, in the order of their declaration and the same on
    all ranks, then those of the dense optimizer. A table's group has "table", its name, the fields
    of its sparse optimizer, of which any may be changed by a scheduler or by hand, and "step", the
    number of its updates.

    Args:
        rows: Of the tables.
        dense: Of the dense parameters, if there are any.
        max_norm: Largest norm of all gradients together.
    """

    def __init__(
        self, rows: RowOptimizer, dense: KeyedOptimizerWrapper | None, max_norm: float | None
    ) -> None:
        parts = [(FUSED, rows)] if dense is None else [(FUSED, rows), (DENSE, dense)]
        super().__init__(parts)
        self.rows, self.dense = rows, dense
        self._max_norm = max_norm
        self.grad_norm: torch.Tensor | None = None
        """Norm of all gradients of the last step, before clipping, float64 scalar; if it was
        clipped or watched."""

    @property
    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """The dense parameters by name."""
        return {} if self.dense is None else dict(self.dense.params)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's
        """Forgets all gradients.

        Args:
            set_to_none: As in torch, of dense parameters.
        """
        self.rows.zero_grad()
        if self.dense is not None:
            self.dense.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Updates the rows that were looked up, and the dense parameters. On all ranks together.

        Args:
            closure: As in torch: computes the gradients first.

        Raises:
            RunError: A gradient or an updated row is not finite, on any rank; the message names
                the table and row, or the parameter. The model is not to be saved then.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.rows.begin_step()
        replicated = self.rows.touched_replicated()
        touched = self.rows.touched_sharded(fused=self._max_norm is None)
        self._check_dense()
        if self._max_norm is not None:
            self._clip(touched, replicated, self._max_norm)
        touched += replicated
        self.rows.update(touched)
        self.rows.done()
        if self.dense is not None:
            self.dense.step()
        _check_finite(
            touched, self.rows.named_groups[0][1]["step"] if self.rows.named_groups else 0
        )

    def state_dict(self) -> dict[str, Any]:
        """All of its state.

        Returns:
            "state" by the names of parameters, as of any `CombinedOptimizer`, where tables lie with
            their `ShardedTensor`s; and "param_groups", the settings of the groups in their order.
        """
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.param_groups
        ]
        return {**super().state_dict(), "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` of an optimizer of the same tables and layouts gave.

        Args:
            state_dict: Of such an optimizer; `load_checkpoint` takes one of any layout.

        Raises:
            ValueError: It is of another optimizer.
        """
        groups = state_dict["param_groups"]
        mine = [(group.get("table"), group.get("optimizer")) for group in self.param_groups]
        theirs = [(group.get("table"), group.get("optimizer")) for group in groups]
        if mine != theirs:
            raise ValueError(
                f"the state is of parameter groups (table, optimizer) {theirs}, and this optimizer "
                f"has {mine}; load it into the optimizer it was saved from"
            )
        super().load_state_dict({"state": state_dict["state"]})
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)

    def _check_dense(self) -> None:
        """Refuses dense gradients that are not finite; they are the same on all ranks.

        Raises:
            RunError: One is not.
        """
        grads = {name: p.grad for name, p in self.dense_parameters.items() if p.grad is not None}
        if not grads:
            return
        norms = torch.stack(torch._foreach_norm(list(grads.values())))
        if not torch.isfinite(norms).all():
            bad = list(grads)[int((~torch.isfinite(norms)).nonzero()[0])]
            raise RunError(f"the gradient of {bad!r} is not finite; {_WAY_OUT}")

    def _clip(self, touched: Touched, replicated: Touched, max_norm: float) -> None:
        """Scales all gradients so that their norm together is at most `max_norm`."""
        norm = self._norm(touched, replicated)
        self.grad_norm = norm
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for _, gradients in (*touched, *replicated):
            gradients.grad_UD.mul_(scale.to(gradients.grad_UD))
        for parameter in self.dense_parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad))

    def _norm(self, touched: Touched, replicated: Touched) -> torch.Tensor:
        """The norm of all gradients; what every rank has counts once."""
        sums = [_square_of(gradients.grad_UD) for _, gradients in touched]
        if dist.get_rank() == 0:
            sums += [_square_of(gradients.grad_UD) for _, gradients in replicated]
            grads = (parameter.grad for parameter in self.dense_parameters.values())
            sums += [_square_of(grad) for grad in grads if grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for one in sums:
            total.add_(one)
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        norm: torch.Tensor = total.sqrt()
        return norm

    @property
    def _device(self) -> torch.device:
        blocks = self.rows.blocks
        if blocks:
            return blocks[0].weight_RD.device
        return (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend() == "nccl"
            else torch.device("cpu")
        )


_WAY_OUT = "lower the learning rates, clip by max_norm, or look for such values in the data"


def _square_of(grad: torch.Tensor) -> torch.Tensor:
    square: torch.Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    return square


def _check_finite(touched: Touched, step: int) -> None:
    """Checks what the updates left behind. On all ranks together.

    Raises:
        RunError: Something is not finite, on any rank.
    """
    checks = [rows.check for rows, _ in touched if rows.check is not None]
    fault = None
    if checks and not torch.isfinite(torch.stack(checks)).all():
        faults = (rows.fault(gradients) for rows, gradients in touched)
        fault = next((one for one in faults if one is not None), None)
    if dist.get_world_size() > 1:
        flag = torch.tensor(float(fault is not None))
        dist.all_reduce(flag)
        if flag > 0:
            faults_of_ranks: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(faults_of_ranks, fault)
            fault = next(one for one in faults_of_ranks if one is not None)
    if fault is not None:
        raise RunError(f"step {step}: {fault}; {_WAY_OUT}")


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
        ValueError: The model is not sharded, or has dense parameters and `dense` is not given, or
            `max_norm` is not positive.
    """
    tables = noted_tables(model)
    if not isinstance(model, DistributedModelParallel) or tables is None:
        raise ValueError(
            "build_optimizer takes the model that shard_modules returned, got "
            f"{type(model).__name__}"
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
    return Optimizer(RowOptimizer(model, tables), keyed, max_norm)


def _dense_parameters(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """The parameters that belong to no table."""
    of_tables = {
        id(weight)
        for module in model.modules()
        if isinstance(module, ShardedEmbeddingModule)
        for weight in module.parameters()
    }
    others = in_backward_optimizer_filter(model.named_parameters())
    return {name: weight for name, weight in others if id(weight) not in of_tables}
