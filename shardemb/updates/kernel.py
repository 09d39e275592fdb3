"""What a kernel of a sharded collection keeps of its lookups until the optimizer steps.

TorchRec itself puts other kernels in the place of FBGEMM's (its Triton one): what it asks of them
is here, but for the lookup and the update, which are FBGEMM's or our own.
"""

# B bags of a feature, F features, N ids, D width

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardemb.updates.lookups import Features, Lookup, RowGradients, merge, sample_of
from shardemb.updates.shard_rows import ShardRows

SMALLEST_EPS = 1e-30
"""Below it float32 may have 0, by which a fused update divides unwatched where a gradient is 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """A block of a table in a kernel.

    Attributes:
        table: Name of the table.
        features: Those that look up in it.
        rows: What is to be updated; None where the table is frozen.
    """

    table: str
    features: Features
    rows: ShardRows | None


class RowKernel(nn.Module, abc.ABC):
    """Looks up rows, and keeps gradients until the optimizer of `build_optimizer` steps.

    Args:
        held: What holds the rows, as TorchRec asks FBGEMM's module for them.
        shards: The blocks, in the order of their features.
        pooling: "sum" or "mean"; None where every id has an output of its own.
    """

    def __init__(self, held: nn.Module, shards: Sequence[Shard], *, pooling: str | None) -> None:
        super().__init__()
        self.held = held
        self.shards = shards
        self.num_features = sum(shard.features.count for shard in shards)
        self.batches: Sequence[tuple[int, int]] = ()
        """Of the next lookup: the ranks whose samples the bags are, in order, with their number."""
        self._pooling = pooling
        self._lookups: list[Lookup] = []
        self._own: list[Shard] = []
        self._anchor = torch.empty(0, requires_grad=True)  # what makes autograd call the backward

    def __getattr__(self, name: str) -> Any:
        """Whatever else TorchRec asks for is of what holds the rows."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("held"), name)

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
            indices: Local rows, feature after feature, int32 or int64 [N].
            offsets: Where bags begin, int32 or int64 [F * B + 1].
            per_sample_weights: Of the ids, float32 [N].

        Returns:
            Pooled rows [B, sum of widths] or rows [N, D], float32.
        """
        if torch.is_grad_enabled() and dist.get_world_size() == 1:
            # of several ranks, what was received; of one, the caller's, who may fill it anew
            indices, offsets = indices.clone(), offsets.clone()
        output, found = self._look_up(indices, offsets, per_sample_weights)
        if not torch.is_grad_enabled():
            return output
        weights_N = None if per_sample_weights is None else per_sample_weights.detach().clone()
        batches = self.batches

        def keep(gradient: torch.Tensor) -> None:
            if not self.trained:  # other ranks may wait for this one in the backward exchange
                return
            self.trained[0].check_fresh()
            lookup = Lookup(
                ids_N=indices,
                offsets=offsets,
                weights_N=weights_N,
                gradient=gradient,
                batches=batches,
                num_features=self.num_features,
                pooling=self._pooling,
            )
            self._lookups.append(lookup)
            self._keep(found)

        weigh = None
        if per_sample_weights is not None and per_sample_weights.requires_grad:
            weigh = self._weigh_later(indices, offsets)
        kept: torch.Tensor = _Kept.apply(  # type: ignore[no-untyped-call]
            self._anchor, per_sample_weights, output.detach(), keep, weigh
        )
        return kept

    @abc.abstractmethod
    def _look_up(
        self, ids_N: torch.Tensor, offsets: torch.Tensor, weights_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """The output, and what `_keep` is to know of it when its gradient comes."""

    @abc.abstractmethod
    def _weigh_later(
        self, ids_N: torch.Tensor, offsets: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes the gradient of the weights [N] of that of the output."""

    @abc.abstractmethod
    def _keep(self, found: Any) -> None:
        """Is told of a lookup whose gradient came."""

    def clear(self) -> None:
        """Forgets all gradients."""
        self._lookups.clear()
        self._own = []
        for rows in self.trained:
            rows.is_stale = False

    def done(self) -> None:
        """Forgets gradients that were applied; the next ones need a `clear` before."""
        stale = [rows.is_stale or bool(self._lookups) for rows in self.trained]
        self.clear()
        for rows, is_stale in zip(self.trained, stale, strict=True):
            rows.is_stale = is_stale

    @abc.abstractmethod
    def choose(self, *, watched: bool) -> None:
        """Chooses the blocks that the kernel updates by itself in this step.

        Args:
            watched: Whether the gradients are to be seen or scaled before.
        """

    def merged(self) -> Iterable[tuple[ShardRows, RowGradients]]:
        """The rows to update in the other blocks, with their gradients."""
        return self._merged_of([shard for shard in self.shards if shard not in self._own])

    def own_merged(self) -> Iterable[tuple[ShardRows, RowGradients]]:
        """Those in the blocks that the kernel updates by itself."""
        return self._merged_of(self._own)

    def _merged_of(self, shards: Sequence[Shard]) -> Iterable[tuple[ShardRows, RowGradients]]:
        for shard in shards:
            if shard.rows is not None and self._lookups:
                yield shard.rows, shard.rows.movable(self._merge(shard))

    def _merge(self, shard: Shard) -> RowGradients:
        return merge(self._lookups, shard.features)

    @abc.abstractmethod
    def own_square(self) -> float:
        """The sum of the squares of the gradients in those blocks."""

    @abc.abstractmethod
    def step(self, scale: float) -> Mapping[ShardRows, int]:
        """Updates the rows of the blocks that were chosen.

        Args:
            scale: What gradients are multiplied by.

        Returns:
            Of some blocks the first row that was left as it was, as it would not have been finite.
        """

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
        weights_N: torch.Tensor | None,  # noqa: ARG004 - what may require one
        output: torch.Tensor,
        keep: Callable[[torch.Tensor], None],
        weigh: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        ctx.keep, ctx.weigh = keep, weigh
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        ctx.keep(gradient)
        grad_N = ctx.weigh(gradient) if ctx.weigh is not None else None
        return None, grad_N, None, None, None
