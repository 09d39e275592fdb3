"""Lets ranks have batches of different sizes, where the rows of a table are on several ranks."""

# B batch of this rank, D width of a feature, N rows of a shard's output

import copy

import torch
from torch import nn
from torch.nn import functional
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingDist
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from shardemb.env import Env
from shardemb.updates.sharded import ranks_in_output


class _EvenBatches(nn.Module):
    """An output distribution that pads the batches of all ranks to the largest, and cuts again.

    The reduce-scatter of pooled rows has a gradient on gloo only where batches are equal.

    Args:
        inner: TorchRec's output distribution.
        rank: Of this process.
        num_nodes: The order of ranks in the output of a shard is by local rank, then by node; 1
            where it is by rank.
    """

    def __init__(self, inner: nn.Module, *, rank: int, num_nodes: int) -> None:
        super().__init__()
        self._inner, self._rank, self._num_nodes = inner, rank, num_nodes

    def forward(
        self, pooled_ND: torch.Tensor, context: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Starts the exchange.

        Args:
            pooled_ND: This shard's part of the pooled rows of all ranks' samples.
            context: Knows the size of each rank's batch.

        Returns:
            The pooled rows of this rank's samples [B, D].
        """
        sizes = context.batch_size_per_rank if context is not None else []
        if context is None or len(set(sizes)) < 2 or context.variable_batch_per_feature:
            awaitable: Awaitable[torch.Tensor] = self._inner(pooled_ND, context)
            return awaitable
        largest = max(sizes)
        ranks = ranks_in_output(len(sizes), num_nodes=self._num_nodes)
        in_order = [sizes[rank] for rank in ranks]
        padded = torch.cat(
            [
                functional.pad(part, (0, 0, 0, largest - len(part)))
                for part in pooled_ND.split(in_order)
            ]
        )
        even = copy.copy(context)
        even.batch_size_per_rank = [largest] * len(sizes)
        awaitable = self._inner(padded, even)
        awaitable.callbacks.append(lambda out_BD: out_BD[: sizes[self._rank]])
        return awaitable


def allow_uneven_batches(module: ShardedEmbeddingModule, env: Env) -> None:
    """Makes a sharded pooled collection take batches that differ in size between ranks.

    Args:
        module: The collection, which is changed.
        env: This process.
    """
    for position, inner in enumerate(module._output_dists):
        if isinstance(inner, (TwRwPooledEmbeddingDist, GridPooledEmbeddingDist)):
            num_nodes = env.num_nodes
        elif isinstance(inner, RwPooledEmbeddingDist):
            num_nodes = 1
        else:
            continue
        module._output_dists[position] = _EvenBatches(inner, rank=env.rank, num_nodes=num_nodes)
