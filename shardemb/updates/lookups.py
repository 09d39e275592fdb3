"""The lookups of a step, and the rows that they touched with their summed gradients."""

# B bags of a feature, F features of a kernel, N ids, D width of a shard, U distinct rows

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional


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


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What one backward pass of a kernel leaves behind.

    Attributes:
        ids_N: Local rows, feature after feature, int64 [N].
        offsets: Where the bags begin and the last ends, int64 [F * B + 1].
        weights_N: Weights of the ids, float32 [N], if they have some.
        gradient: Of the output, float32: pooled [B, sum of the features' widths], else [N, D].
        batches: The ranks whose samples the bags of a feature are, in their order, and how many
            each has.
    """

    ids_N: torch.Tensor
    offsets: torch.Tensor
    weights_N: torch.Tensor | None
    gradient: torch.Tensor
    batches: Sequence[tuple[int, int]]


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


def merge(
    lookups: Sequence[Lookup], features: Features, num_features: int, *, pooling: str | None
) -> RowGradients:
    """Sums the gradients of each row that some lookups touched.

    The order of the sum is that of the lookups and of the ids in each, on any number of threads.

    Args:
        lookups: Of one kernel, at least one.
        features: Those of the shard.
        num_features: Of the kernel.
        pooling: "sum" or "mean"; None where every id has an output of its own.

    Returns:
        The rows and their gradients.
    """
    spreads = [_spread(lookup, features, num_features, pooling=pooling) for lookup in lookups]
    firsts = [0]
    for one in spreads:
        firsts.append(firsts[-1] + len(one.gradients))
    ids_N = torch.cat([one.ids_N for one in spreads])
    source_N = torch.cat(
        [one.source_N + first for one, first in zip(spreads, firsts[:-1], strict=True)]
    )
    gradients = torch.cat([one.gradients for one in spreads])
    sorted_N, order_N = ids_N.sort(stable=True)
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


def _spread(
    lookup: Lookup, features: Features, num_features: int, *, pooling: str | None
) -> _Spread:
    """What each id of a shard's features contributes; arguments as of `merge`."""
    num_bags = (len(lookup.offsets) - 1) // num_features
    first, last = features.first * num_bags, (features.first + features.count) * num_bags
    start, end = lookup.offsets[[first, last]].tolist()
    ids_N = lookup.ids_N[start:end]
    if pooling is None:
        source_N = torch.arange(end - start, device=ids_N.device)
        return _Spread(ids_N, source_N, None, lookup.gradient[start:end])
    lengths = lookup.offsets[first : last + 1].diff()
    source_N = torch.repeat_interleave(lengths, output_size=end - start)
    scale_N = None
    if lookup.weights_N is not None:
        scale_N = lookup.weights_N[start:end]
    elif pooling == "mean":
        scale_N = (1.0 / lengths.to(lookup.gradient.dtype))[source_N]
    columns = features.first_column, features.first_column + features.count * features.width
    by_bag = lookup.gradient[:, slice(*columns)].unflatten(1, (features.count, features.width))
    return _Spread(ids_N, source_N, scale_N, by_bag.transpose(0, 1).flatten(0, 1))


def sample_of(
    lookups: Sequence[Lookup],
    features: Features,
    num_features: int,
    *,
    pooling: str | None,
    row: int,
) -> tuple[int, int] | None:
    """Whose sample looked a row up; one with a gradient that is not finite, if there is one.

    Args:
        lookups: Of one kernel.
        features: Those of the shard.
        num_features: Of the kernel.
        pooling: As of `merge`.
        row: The local row.

    Returns:
        The rank and the number of the sample in its batch.
    """
    found = None
    for lookup in lookups:
        one = _spread(lookup, features, num_features, pooling=pooling)
        at_K = (one.ids_N == row).nonzero().squeeze(1)
        if len(at_K) == 0:
            continue
        bad_K = ~torch.isfinite(one.gradients[one.source_N[at_K]]).all(1)
        if found is None or bad_K.any():
            found = _sample_at(lookup, features, num_features, int(at_K[bad_K.int().argmax()]))
        if bad_K.any():
            break
    return found


def _sample_at(
    lookup: Lookup, features: Features, num_features: int, position: int
) -> tuple[int, int] | None:
    """Whose sample an id of a shard's features is, counted from the first of them."""
    num_bags = (len(lookup.offsets) - 1) // num_features
    offsets = lookup.offsets[features.first * num_bags :]
    sample = (int(torch.searchsorted(offsets, offsets[0] + position, right=True)) - 1) % num_bags
    for rank, size in lookup.batches:
        if sample < size:
            return rank, sample
        sample -= size
    return None
