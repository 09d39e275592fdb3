"""Leaves ids of padding rows out of pooled bags, as `torch.nn.EmbeddingBag(padding_idx)` does."""

# F features, B samples, N ids

from collections.abc import Iterable, Mapping

import torch
from torchrec import KeyedJaggedTensor

_NO_PADDING = torch.iinfo(torch.int64).min


def padding_of_features(
    tables: Iterable[tuple[str, Iterable[str], int | None]],
) -> dict[str, int]:
    """The padding row of each feature, on which all tables that it looks up must agree.

    Args:
        tables: The name, the features and the `padding_idx` of each table of a pooled collection.

    Returns:
        By feature, where there is one.

    Raises:
        ValueError: Two tables of a feature differ.

    Example:
        >>> padding_of_features([("user", ["user_id"], None), ("item", ["clicked", "bought"], 0)])
        {'clicked': 0, 'bought': 0}
    """
    first: dict[str, tuple[str, int | None]] = {}
    for table, features, padding_idx in tables:
        for feature in features:
            other, known = first.setdefault(feature, (table, padding_idx))
            if known != padding_idx:
                raise ValueError(
                    f"feature {feature!r} looks up tables {other!r} and {table!r}, which get the "
                    f"same ids, and padding_idx is {known} and {padding_idx}: an id would be left "
                    "out of the bags of both; give both the same, or each a feature of its own"
                )
    return {feature: row for feature, (_, row) in first.items() if row is not None}


def leave_padding_out(batch: KeyedJaggedTensor, padding_of: Mapping[str, int]) -> KeyedJaggedTensor:
    """Removes ids that name the padding row of their feature, with their weights.

    Args:
        batch: Ids int32 or int64, lengths int64, the same number of samples for each feature.
        padding_of: The padding row of each feature that has one.

    Returns:
        The batch itself where there are none such.

    Example:
        >>> batch = KeyedJaggedTensor(
        ...     keys=["x"], values=torch.tensor([0, 3, 0]), lengths=torch.tensor([2, 1])
        ... )
        >>> out = leave_padding_out(batch, {"x": 0})
        >>> out.values(), out.lengths()
        (tensor([3]), tensor([1, 0]))
    """
    ids_N, lengths, weights_N = batch.values(), batch.lengths(), batch.weights_or_none()
    keys = list(batch.keys())
    rows = [padding_of.get(key, _NO_PADDING) for key in keys]
    padding_F = torch.tensor(rows, device=ids_N.device)
    counts_F = lengths.view(len(keys), batch.stride()).sum(1)
    kept_N = ids_N != padding_F.repeat_interleave(counts_F, output_size=len(ids_N))
    if kept_N.all():
        return batch
    return KeyedJaggedTensor(
        keys=keys,
        values=ids_N[kept_N],
        lengths=_lengths_of_kept(kept_N, lengths),
        weights=None if weights_N is None else weights_N[kept_N],
    )


def _lengths_of_kept(kept_N: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    before_N1 = torch.cat([kept_N.new_zeros(1, dtype=torch.int64), kept_N.cumsum(0)])
    ends = lengths.cumsum(0)
    return before_N1[ends] - before_N1[ends - lengths]
