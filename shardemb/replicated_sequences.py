"""Makes FBGEMM's dense kernel give a row for each id on CPU, where it would pool them."""

# B bags, F features, D width

from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding_types import ShardedEmbeddingModule


def keep_replicated_sequences_apart(module: ShardedEmbeddingModule) -> None:
    """Makes the replicated tables of a sharded sequence collection give a row for each id on CPU.

    FBGEMM's dense kernel pools bags there, also where it is told not to; so each id gets a bag of
    its own.

    Args:
        module: The collection, which is changed.
    """
    for lookup in module._lookups:
        if any(isinstance(kernel, BatchedDenseEmbedding) for kernel in lookup.modules()):
            lookup.register_forward_pre_hook(_one_id_per_bag)
            lookup.register_forward_hook(_rows_of_ids)


def _one_id_per_bag(module: nn.Module, args: tuple[Any, ...]) -> KeyedJaggedTensor:  # noqa: ARG001
    features: KeyedJaggedTensor = args[0]
    counts_F = torch.tensor(features.length_per_key(), device=features.device())
    bags_B = torch.arange(max(1, *features.length_per_key()), device=features.device())
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=(bags_B < counts_F.unsqueeze(1)).long().flatten(),
    )


def _rows_of_ids(module: nn.Module, args: tuple[Any, ...], flat: torch.Tensor) -> torch.Tensor:
    """The rows of the ids of each feature, flat, without those of bags that only fill up."""
    features: KeyedJaggedTensor = args[0]
    bags, counts = features.stride(), features.length_per_key()
    width = flat.numel() // (bags * len(counts))
    of_groups: Any = module._feature_splits
    groups = flat.split([bags * width * number for number in of_groups])
    rows = [
        rows_BD
        for group, number in zip(groups, of_groups, strict=True)
        for rows_BD in group.view(bags, number, width).unbind(1)
    ]
    kept = [rows_BD[:count] for rows_BD, count in zip(rows, counts, strict=True)]
    return torch.cat(kept).flatten()
