"""Takes the gradients of ids' weights back to the ranks whose samples the ids are.

TorchRec sends weights without their graph. Here each is sent with a code beside it, which tells
where it comes from, in the same exchange: both as one float64, which is copied and never computed
with.
"""

# N ids of this rank's samples, M ids that this rank looks up, W ranks

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor

_WEIGHTS = "_shardemb_weights"


class WeightGradients:
    """The gradients of the weights of one collection.

    All ranks exchange them in a backward pass, or none does. So the ranks agree once, in the first
    forward with gradients, and if the weights of any want them, those of all are seen to from then
    on.

    Args:
        group: The ranks that exchange ids; None where each looks up its own.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.wanted: bool | None = None
        """Whether weights get gradients; None where it is not known yet."""

    def send(self, context: Any, batch: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """What TorchRec is to send to the ranks that look up.

        Args:
            context: TorchRec's, of the batch.
            batch: This rank's, with weights float32 [N].

        Returns:
            The batch; where weights get gradients, with others in their place.

        Raises:
            ValueError: The weights want gradients, and the ranks agreed on none; or the batch is
                too large.
        """
        weights_N = batch.weights().float()
        if not torch.is_grad_enabled() or not self._is_wanted(weights_N, batch.keys()):
            return batch
        if not weights_N.requires_grad:  # another rank's may
            weights_N = weights_N.detach().requires_grad_()
        setattr(context, _WEIGHTS, weights_N)
        rank, world_size = _place_in(self._group)
        codes_N = codes(len(weights_N), rank=rank, world_size=world_size)
        return KeyedJaggedTensor(
            keys=batch.keys(),
            values=batch.values(),
            lengths=batch.lengths(),
            weights=_packed(codes_N, weights_N.detach()),
            stride=batch.stride(),
        )

    def receive(self, context: Any, batches: Sequence[KeyedJaggedTensor]) -> None:
        """Gives what came to the lookups the weights that were sent, with their graph.

        Args:
            context: The same.
            batches: Of each layout, which are changed.
        """
        weights_N = getattr(context, _WEIGHTS, None)
        if weights_N is None:
            return
        packed = [batch.weights() for batch in batches]
        received = _Received.apply(weights_N, self._group, *packed)  # type: ignore[no-untyped-call]
        for batch, weights_M in zip(batches, received, strict=True):
            batch._weights = weights_M

    def _is_wanted(self, weights_N: Tensor, features: Sequence[str]) -> bool:
        wants = weights_N.requires_grad
        if self._group is None:
            self.wanted = wants
        elif self.wanted is None:
            any_wants = torch.tensor([int(wants)], device=weights_N.device)
            dist.all_reduce(any_wants, dist.ReduceOp.MAX, group=self._group)
            self.wanted = bool(any_wants)
        elif wants and not self.wanted:
            raise ValueError(
                f"the collection of features {list(features)} got weights that require a gradient, "
                "and in its first batch those of no rank did, on which the ranks agree once; give "
                "the first batch such weights too, by requires_grad_(), or detach these"
            )
        return self.wanted


def _place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The rank, and of how many."""
    return (0, 1) if group is None else (group.rank(), group.size())


def codes(num_ids: int, *, rank: int, world_size: int) -> Tensor:
    """Numbers that tell where an id comes from: its place, times W, plus the rank.

    Args:
        num_ids: N.
        rank: Whose ids they are.
        world_size: W.

    Returns:
        Int32 [N].

    Raises:
        ValueError: There are too many.

    Example:
        >>> codes(3, rank=1, world_size=2)
        tensor([1, 3, 5], dtype=torch.int32)
    """
    most = torch.iinfo(torch.int32).max // world_size
    if num_ids > most:
        raise ValueError(
            f"a batch of {num_ids} ids whose weights require a gradient is too large: on "
            f"{world_size} ranks each may have {most}; make it of more micro-batches"
        )
    return torch.arange(num_ids, dtype=torch.int32) * world_size + rank


def tied(output: Tensor, weights_M: Tensor) -> Tensor:
    """An output whose backward pass goes on to weights, be they looked up on this rank or not.

    Without it the other ranks would wait for a rank that has no table.

    Args:
        output: Of a lookup.
        weights_M: Of its ids.

    Returns:
        The output.
    """
    out: Tensor = _Tied.apply(output, weights_M)  # type: ignore[no-untyped-call]
    return out


class _Tied(torch.autograd.Function):
    """The identity; weights get no gradient by it, but their backward pass runs."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weights_M: Tensor) -> Tensor:  # noqa: ARG004
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class _Received(torch.autograd.Function):
    """The weights that came to this rank; their gradients go where they came from.

    It is one exchange for all layouts: autograd runs it when all their lookups are done, so on
    every rank after the same other exchanges.
    """

    @staticmethod
    def forward(
        ctx: Any, weights_N: Tensor, group: dist.ProcessGroup | None, *packed: Tensor
    ) -> tuple[Tensor, ...]:
        unpacked = [_unpacked(of_layout) for of_layout in packed]
        ctx.codes_M = torch.cat([codes_M for codes_M, _ in unpacked])
        ctx.group, ctx.num_ids, ctx.num_layouts = group, len(weights_N), len(packed)
        return tuple(weights_M for _, weights_M in unpacked)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places, grad_M = _sent_back(ctx.codes_M, torch.cat(gradients), ctx.group)
        grad_N = grad_M.new_zeros(ctx.num_ids).index_add_(0, places, grad_M)
        return (grad_N, None, *[None] * ctx.num_layouts)


def _sent_back(
    codes_M: Tensor, grad_M: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Takes gradients to the ranks that their codes name; on all ranks together.

    Returns:
        The places of this rank's ids, some more than once and others not at all, int32; and the
        gradients of each.
    """
    if group is None:
        return codes_M, grad_M
    world_size = group.size()
    ranks_M = codes_M % world_size
    by_rank = torch.argsort(ranks_M, stable=True)
    counts_W = torch.bincount(ranks_M, minlength=world_size)
    coming_W = torch.empty_like(counts_W)
    dist.all_to_all_single(coming_W, counts_W, group=group)
    going = _packed(codes_M // world_size, grad_M)[by_rank]
    coming = going.new_empty(int(coming_W.sum()))
    dist.all_to_all_single(coming, going, coming_W.tolist(), counts_W.tolist(), group=group)
    return _unpacked(coming)


def _packed(numbers: Tensor, values: Tensor) -> Tensor:
    """Int32 [N] and float32 [N] bit by bit as float64 [N], which is only to be copied."""
    bits = values.contiguous().view(torch.int32)
    return torch.stack([numbers, bits], 1).view(torch.float64).squeeze(1)


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `_packed` packed."""
    numbers, bits = packed.view(torch.int32).view(-1, 2).unbind(1)
    return numbers.contiguous(), bits.contiguous().view(torch.float32)
