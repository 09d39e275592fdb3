"""Stands where TorchRec's kernels keep FBGEMM's: looks up by it, and keeps what updates the rows.

TorchRec itself puts other kernels there (its Triton one): what it asks of them is here.
"""

# B bags of a feature, F features, N ids, D width

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardemb.updates.lookups import Features, Lookup, RowGradients, merge, sample_of
from shardemb.updates.shard_rows import ShardRows

_LARGEST_NORM = 1e12
"""Of a gradient that FBGEMM may square and add up unwatched; our own update looks at the rows."""

_SMALLEST_EPS = 1e-30
"""Below it float32 may have 0, and FBGEMM divides by it unwatched where a gradient is 0."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A block of a table in a kernel.

    Attributes:
        features: Those that look up in it.
        rows: What is to be updated; None where the table is frozen.
    """

    features: Features
    rows: ShardRows | None


@dataclass(frozen=True, kw_only=True)
class _Fused:
    """A lookup whose backward pass in FBGEMM would update the rows.

    Attributes:
        output: Of FBGEMM, with its graph.
        lr: The learning rate that FBGEMM's CPU kernel takes from the forward pass.
    """

    output: torch.Tensor
    lr: float


class RowKernel(nn.Module):
    """Looks up rows, and keeps gradients until the optimizer of `build_optimizer` steps.

    Args:
        fbgemm: FBGEMM's module: holds the rows and looks them up.
        shards: The blocks, in its order.
        pooling: "sum" or "mean"; None where every id has an output of its own.
        fused: Whether FBGEMM's own update is the one that all its tables declare.
    """

    def __init__(
        self, fbgemm: nn.Module, shards: Sequence[Shard], *, pooling: str | None, fused: bool
    ) -> None:
        super().__init__()
        self.fbgemm = fbgemm
        self.shards = shards
        self._pooling, self._fused = pooling, fused
        self._num_features = sum(shard.features.count for shard in shards)
        self.batches: Sequence[tuple[int, int]] = ()
        """Of the next lookup: the ranks whose samples the bags are, in order, with their number."""
        self._lookups: list[Lookup] = []
        self._last: _Fused | None = None
        self._lr = math.nan
        self._anchor = torch.empty(0, requires_grad=True)  # what makes autograd call the backward

    def __getattr__(self, name: str) -> Any:
        """Whatever else TorchRec asks for is FBGEMM's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("fbgemm"), name)

    @property
    def trained(self) -> list[ShardRows]:
        """The blocks that are to be updated."""
        return [shard.rows for shard in self.shards if shard.rows is not None]

    def get_optimizer_state(self) -> list[dict[str, torch.Tensor]]:
        """The state of each block's optimizer, as TorchRec asks for it."""
        return [dict(shard.rows.state) if shard.rows else {} for shard in self.shards]

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Looks rows up.

        Args:
            indices: Local rows, feature after feature, int64 [N].
            offsets: Where bags begin, int64 [F * B + 1].
            per_sample_weights: Of the ids, float32 [N].

        Returns:
            Pooled rows [B, sum of widths] or rows [N, D], float32.
        """
        arguments = (indices, offsets, per_sample_weights)
        if not torch.is_grad_enabled():
            return self.fbgemm(*arguments)  # type: ignore[no-any-return]
        with torch.set_grad_enabled(self._fused):
            self._set_lr()
            output: torch.Tensor = self.fbgemm(*arguments)
        graph = _Fused(output=output, lr=self._lr) if self._fused else None
        batches = self.batches

        def keep(gradient: torch.Tensor) -> None:
            if not self.trained:  # other ranks may wait for this one in the backward exchange
                return
            lookup = Lookup(
                ids_N=indices,
                offsets=offsets,
                weights_N=per_sample_weights,
                gradient=gradient,
                batches=batches,
                num_features=self._num_features,
                pooling=self._pooling,
            )
            self._keep(lookup, graph)

        kept: torch.Tensor = _Kept.apply(  # type: ignore[no-untyped-call]
            self._anchor, output.detach(), keep
        )
        return kept

    def _set_lr(self) -> None:
        settings = self.trained[0].settings if self._fused else {}
        if not settings:
            return
        lr = float(settings["lr"])
        if lr != self._lr:
            self.fbgemm.set_learning_rate(lr)  # type: ignore[operator]
            self._lr = lr

    def _keep(self, lookup: Lookup, graph: _Fused | None) -> None:
        """Keeps what a backward pass left behind."""
        self.trained[0].check_fresh()
        self._lookups.append(lookup)
        self._last = graph

    def clear(self) -> None:
        """Forgets all gradients."""
        self._lookups.clear()
        self._last = None
        for rows in self.trained:
            rows.is_stale = False

    def done(self) -> None:
        """Forgets gradients that were applied; the next ones need a `clear` before."""
        for rows in self.trained:
            rows.is_stale |= bool(self._lookups)
        self._lookups.clear()
        self._last = None

    def fits_fbgemm(self) -> bool:
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
        if declared.get("eps", 1.0) < _SMALLEST_EPS:
            return False
        lookup = self._lookups[0]
        norm = torch.linalg.vector_norm(lookup.gradient)
        if lookup.weights_N is not None:
            norm = norm * torch.linalg.vector_norm(lookup.weights_N).clamp(min=1.0)
        return float(norm) < _LARGEST_NORM and abs(self._last.lr) < _LARGEST_NORM

    def step_fused(self) -> None:
        """Lets FBGEMM update the rows."""
        assert self._last is not None
        self._last.output.backward(self._lookups[0].gradient)

    def merged(self) -> Iterable[tuple[ShardRows, RowGradients]]:
        """The rows to update in each block, with their gradients."""
        for shard in self.shards:
            if shard.rows is not None and self._lookups:
                gradients = merge(self._lookups, shard.features)
                yield shard.rows, shard.rows.movable(gradients)

    def sample_of(self, rows: ShardRows, row: int) -> tuple[int, int] | None:
        """Whose sample looked a row up; one with a gradient that is not finite, if there is one.

        Args:
            rows: A block; of another kernel's there is none.
            row: The local row.

        Returns:
            The rank, and the number of the sample in its batch.
        """
        for shard in self.shards:
            if shard.rows is rows:
                return sample_of(self._lookups, shard.features, row)
        return None


class _Kept(torch.autograd.Function):
    """The identity, whose backward pass keeps the gradient for the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,  # noqa: ARG004 - what requires a gradient
        output: torch.Tensor,
        keep: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.keep = keep
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.keep(gradients[0])
        return None, None, None
