"""The lookups of a step, and the rows that they touched with their summed gradients."""

# B bags of a feature, F features of a kernel, N ids, D width of a shard, U distinct rows

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.modules.embedding_configs import PoolingType


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of a kernel that look up in one shard; they are neighbours.

    Attributes:
        first: Number of the first.
        count: How many.
        first_column: Column of the kernel's pooled output at which theirs begin.
        width: Columns of the shard.
    """

    first: int
    count: int
    first_column: int
    width: int


def features_of(tables: Iterable[ShardedEmbeddingTable]) -> list[Features]:
    """The features of each of a kernel's tables, which come one after the other.

    Args:
        tables: In the order of the kernel.
    """
    found: list[Features] = []
    first = first_column = 0
    for table in tables:
        count, width = table.num_features(), table.local_cols
        found.append(Features(first=first, count=count, first_column=first_column, width=width))
        first += count
        first_column += count * width
    return found


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What one backward pass of a kernel leaves behind.

    Attributes:
        ids_N: Local rows, feature after feature, int64, or of our own kernel also int32 [N].
        offsets: Where the bags begin and the last ends, of the same dtypes [F * B + 1].
        weights_N: Weights of the ids, float32 [N], if they have some.
        gradient: Of the output, float32: pooled [B, sum of the features' widths], else [N, D].
        batches: The ranks whose samples the bags of a feature are, in their order, and how many
            each has.
        num_features: Of the kernel.
        pooling: "sum" or "mean"; None where every id has an output of its own.
    """

    ids_N: torch.Tensor
    offsets: torch.Tensor
    weights_N: torch.Tensor | None
    gradient: torch.Tensor
    batches: Sequence[tuple[int, int]]
    num_features: int
    pooling: str | None

    @property
    def num_bags(self) -> int:
        """Bags of each feature."""
        return (len(self.offsets) - 1) // self.num_features

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where the ids of each feature begin, and the last end: one wait for the device."""
        if self.num_bags == 0:
            return [0] * (self.num_features + 1)
        starts: list[int] = self.offsets[:: self.num_bags].tolist()
        return starts


class RowGradients(NamedTuple):
    """Rows of a shard and the sums of their gradients.

    Attributes:
        rows_U: Local rows, each once, ascending, int64 [U].
        grad_UD: Their gradients, float32 [U, D].
        counts_U: How many ids looked each up, int64 [U]; where every rank holds the table, ids of
            this rank only.
    """

    rows_U: torch.Tensor
    grad_UD: torch.Tensor
    counts_U: torch.Tensor


class _Spread(NamedTuple):
    """A lookup by a shard's features, id by id.

    Attributes:
        ids_N: Local rows.
        source_N: The row of `gradients` that is each id's.
        scale_N: What it is multiplied by, if by anything.
        gradients: Float32 [_, D].
    """

    ids_N: torch.Tensor
    source_N: torch.Tensor
    scale_N: torch.Tensor | None
    gradients: torch.Tensor


def merge(lookups: Sequence[Lookup], features: Features) -> RowGradients:
    """Sums the gradients of each row that some lookups touched, where the compiled code does not.

    The order of the sum is that of the lookups and of the ids in each, on any number of threads.

    Args:
        lookups: Of one kernel, at least one; with ids of int64.
        features: Those of the shard.

    Returns:
        The rows and their gradients.
    """
    spreads = [_spread(lookup, features) for lookup in lookups]
    firsts = [0]
    for one in spreads:
        firsts.append(firsts[-1] + len(one.gradients))
    ids_N = torch.cat([one.ids_N for one in spreads])
    source_N = torch.cat(
        [one.source_N + first for one, first in zip(spreads, firsts[:-1], strict=True)]
    )
    gradients = torch.cat([one.gradients for one in spreads])
    sorted_N, order_N = _sorted(ids_N)
    rows_U, counts_U = torch.unique_consecutive(sorted_N, return_counts=True)
    if len(rows_U) == 0:
        return RowGradients(rows_U, gradients.new_zeros(0, features.width), counts_U)
    scale_N = None
    if spreads[0].scale_N is not None:
        scale_N = torch.cat([one.scale_N for one in spreads if one.scale_N is not None])[order_N]
    grad_UD = functional.embedding_bag(
        source_N[order_N],
        gradients,
        counts_U.cumsum(0) - counts_U,
        mode="sum",
        per_sample_weights=scale_N,
    )
    return RowGradients(rows_U, grad_UD, counts_U)


def _sorted(ids_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids in ascending order, equal ones as they came, and where each came."""
    num_bits = (len(ids_N) - 1).bit_length()
    if ids_N.is_cuda or len(ids_N) == 0 or int(ids_N.max()).bit_length() + num_bits > 63:
        return ids_N.sort(stable=True)
    # id and place in one number: NumPy sorts int64 with SIMD, up to 13 times as fast as torch
    packed_N = (ids_N << num_bits) | torch.arange(len(ids_N))
    packed_N.numpy().sort()
    return packed_N >> num_bits, packed_N & ((1 << num_bits) - 1)


def _spread(lookup: Lookup, features: Features) -> _Spread:
    """What each id of a shard's features contributes."""
    last_feature = features.first + features.count
    start, end = lookup.starts[features.first], lookup.starts[last_feature]
    ids_N = lookup.ids_N[start:end]
    if lookup.pooling is None:
        source_N = torch.arange(end - start, device=ids_N.device)
        return _Spread(ids_N, source_N, None, lookup.gradient[start:end])
    bags = slice(features.first * lookup.num_bags, last_feature * lookup.num_bags + 1)
    lengths = lookup.offsets[bags].diff()
    source_N = torch.repeat_interleave(lengths, output_size=end - start)
    scale_N = None
    if lookup.weights_N is not None:
        scale_N = lookup.weights_N[start:end]
    elif lookup.pooling == "mean":
        scale_N = (1.0 / lengths.to(lookup.gradient.dtype))[source_N]
    columns = features.first_column, features.first_column + features.count * features.width
    by_bag = lookup.gradient[:, slice(*columns)].unflatten(1, (features.count, features.width))
    return _Spread(ids_N, source_N, scale_N, by_bag.transpose(0, 1).flatten(0, 1))


def sample_of(lookups: Sequence[Lookup], features: Features, row: int) -> tuple[int, int] | None:
    """Whose sample looked a row up; one with a gradient that is not finite, if there is one.

    Args:
        lookups: Of one kernel.
        features: Those of the shard.
        row: The local row.

    Returns:
        The rank and the number of the sample in its batch.
    """
    found = None
    for lookup in lookups:
        one = _spread(lookup, features)
        at_K = (one.ids_N == row).nonzero().squeeze(1)
        if len(at_K) == 0:
            continue
        bad_K = ~torch.isfinite(one.gradients[one.source_N[at_K]]).all(1)
        if found is None or bad_K.any():
            found = _sample_at(lookup, features, int(at_K[bad_K.int().argmax()]))
        if bad_K.any():
            break
    return found


def _sample_at(lookup: Lookup, features: Features, position: int) -> tuple[int, int] | None:
    """Whose sample an id of a shard's features is, counted from the first of them."""
    num_bags = lookup.num_bags
    offsets = lookup.offsets[features.first * num_bags :]
    sample = (int(torch.searchsorted(offsets, offsets[0] + position, right=True)) - 1) % num_bags
    for rank, size in lookup.batches:
        if sample < size:
            return rank, sample
        sample -= size
    return None


def pooling_of(kernel: BaseBatchedEmbeddingBag) -> str:
    """What a kernel makes of a bag; of rows of several shards TorchRec asks it for a sum."""
    return "mean" if kernel._pooling.name == PoolingType.MEAN.name else "sum"
