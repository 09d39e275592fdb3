"""Trains a data-parallel table as FBGEMM's fused kernels train the others."""

# R rows, D width

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from shardemb.optim.configs import SGD, RowWiseAdagrad, SparseOptimizer

_OPTIMIZER = "_shardemb_optimizer"


class ReplicatedOptimizer(KeyedOptimizer):  # type: ignore[misc]
    """The optimizer of one table that every rank holds; TorchRec would leave it to the dense one.

    Computes on the gradient of the whole table; a row whose gradient is zero stays as it is. State
    and parameter group are named as those of a fused table, so that a checkpoint fits both.

    Args:
        name: Of the weight in the model.
        weight: The whole table.
        kind: What to compute; formulas in `configs.py`.
        options: The fields of that: "lr" and for some "eps".
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        kind: type[SparseOptimizer],
        options: dict[str, Any],
    ) -> None:
        self._weight, self._kind = weight, kind
        self._eps = options.get("eps", 1e-8)
        state: dict[str, torch.Tensor] = {}
        self._sum: torch.Tensor | None = None
        if kind is not SGD:
            shape = weight.shape[:1] if kind is RowWiseAdagrad else weight.shape
            self._sum = weight.new_zeros(shape, dtype=torch.float32)
            state[f"{name.split('.')[-2]}.momentum1"] = self._sum
        super().__init__(
            {name: weight}, {weight: state}, [{"params": [weight], "lr": options["lr"]}]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # noqa: ARG002
        """Applies the gradient, if there is one."""
        grad_RD = self._weight.grad
        if grad_RD is None:
            return
        lr = float(self.param_groups[0]["lr"])
        if self._sum is None:
            self._weight.sub_(grad_RD, alpha=lr)
            return
        square = grad_RD.square()
        self._sum += square.mean(1) if self._kind is RowWiseAdagrad else square
        root = self._sum.sqrt().add_(self._eps)
        if self._kind is RowWiseAdagrad:
            root = root.unsqueeze(1)
        self._weight.addcdiv_(grad_RD, root, value=-lr)


def mark_replicated(
    weight: nn.Parameter, optimizer: type[SparseOptimizer], options: dict[str, Any]
) -> None:
    """Notes on a data-parallel table how it is trained, for `build_optimizer`.

    Args:
        weight: The whole table on this rank.
        optimizer: What trains it.
        options: The fields of that: "lr" and for some "eps".
    """
    setattr(weight, _OPTIMIZER, (optimizer, options))


def is_replicated(weight: nn.Parameter) -> bool:
    """Whether a parameter is a data-parallel table of `shard_modules`."""
    return hasattr(weight, _OPTIMIZER)


def replicated_optimizer(name: str, weight: nn.Parameter) -> ReplicatedOptimizer:
    """The optimizer of a table that was marked.

    Args:
        name: Of the weight in the model.
        weight: The whole table on this rank.

    Returns:
        A new one.
    """
    kind, options = getattr(weight, _OPTIMIZER)
    return ReplicatedOptimizer(name, weight, kind, options)
