"""FBGEMM's kernel in TorchRec's: looks up by it, and lets it update rows where it does so right."""

# B bags of a feature, F features, N ids, D width

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from shardemb.updates.kernel import SMALLEST_EPS, RowKernel, Shard
from shardemb.updates.shard_rows import ShardRows

_LARGEST_NORM = 1e12
"""Of a gradient that FBGEMM may square and add up unwatched; our own update looks at the rows."""


@dataclass(frozen=True, kw_only=True)
class _Fused:
    """A lookup whose backward pass in FBGEMM would update the rows.

    Attributes:
        output: Of FBGEMM, with its graph.
        lr: The learning rate that FBGEMM's CPU kernel takes from the forward pass.
    """

    output: torch.Tensor
    lr: float


class FbgemmKernel(RowKernel):
    """Looks up by FBGEMM, which also updates the rows where that is just what is asked.

    Args:
        fbgemm: FBGEMM's module: holds the rows and looks them up.
        shards: The blocks, in its order.
        pooling: "sum" or "mean"; None where every id has an output of its own.
        fused: Whether FBGEMM's own update is the one that all its tables declare.
    """

    def __init__(
        self, fbgemm: nn.Module, shards: Sequence[Shard], *, pooling: str | None, fused: bool
    ) -> None:
        super().__init__(fbgemm, shards, pooling=pooling)
        self._fused = fused
        self._last: _Fused | None = None
        self._lr = math.nan

    def _look_up(
        self, ids_N: torch.Tensor, offsets: torch.Tensor, weights_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, _Fused | None]:
        with torch.set_grad_enabled(self._fused and torch.is_grad_enabled()):
            self._set_lr()
            output: torch.Tensor = self.held(ids_N, offsets, weights_N)
        return output, _Fused(output=output, lr=self._lr) if self._fused else None

    def _weigh_later(self, ids_N: torch.Tensor, offsets: torch.Tensor) -> NoReturn:  # noqa: ARG002
        raise AssertionError(
            "weights that require a gradient are refused where batches are checked"
        )

    def _keep(self, found: _Fused | None) -> None:
        self._last = found

    def _set_lr(self) -> None:
        settings = self.trained[0].settings if self._fused else {}
        if not settings:
            return
        lr = float(settings["lr"])
        if lr != self._lr:
            self.held.set_learning_rate(lr)  # type: ignore[operator]
            self._lr = lr

    def clear(self) -> None:
        """Forgets all gradients."""
        super().clear()
        self._last = None

    def choose(self, *, watched: bool) -> None:
        """Chooses all blocks or none; FBGEMM does not tell gradients, nor scale them."""
        self._own = list(self.shards) if not watched and self._fits() else []

    def _fits(self) -> bool:
        """Whether FBGEMM's own update does just what is asked, with values that cannot go wrong."""
        if self._last is None or len(self._lookups) != 1:
            return False
        settings = [rows.settings for rows in self.trained]
        if any(float(own["lr"]) != self._last.lr for own in settings):
            return False
        declared = vars(self.trained[0].training.optimizer)
        if any(
            own[name] != value
            for own in settings
            for name, value in declared.items()
            if name != "lr"
        ):
            return False
        if declared.get("eps", 1.0) < SMALLEST_EPS:
            return False
        lookup = self._lookups[0]
        norm = torch.linalg.vector_norm(lookup.gradient)
        if lookup.weights_N is not None:
            norm = norm * torch.linalg.vector_norm(lookup.weights_N).clamp(min=1.0)
        return float(norm) < _LARGEST_NORM and abs(self._last.lr) < _LARGEST_NORM

    def own_square(self) -> float:
        """0: none are left to FBGEMM where gradients are to be seen."""
        assert not self._own
        return 0.0

    def step(self, scale: float) -> Mapping[ShardRows, int]:
        """Lets FBGEMM update the rows.

        Args:
            scale: 1.

        Returns:
            Nothing ({}): FBGEMM does not tell.
        """
        if self._own:
            assert self._last is not None
            assert scale == 1.0
            self._last.output.backward(self._lookups[0].gradient)
        return {}
