"""What becomes of the ids that a table does not have: `TableConfig.out_of_range`, as arithmetic."""

# B samples, N ids

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from shardemb.config import OutOfRange, TableConfig
from shardemb.data.bags import Bags, lengths_of_kept, sample_of
from shardemb.data.id_hash import hash_ids, ids_of_strings


@dataclass(frozen=True, kw_only=True)
class IdPolicy:
    """How the ids of a feature become rows.

    Attributes:
        feature: Key in the batch.
        table: Name of the table it looks up, or of the smallest of them.
        num_embeddings: Number of rows of that table.
        out_of_range: The table's.
    """

    feature: str
    table: str
    num_embeddings: int
    out_of_range: OutOfRange


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookups:
    """What a feature looks up.

    Attributes:
        ids_N: int64.
        lengths_B: int64, ids of each sample.
        weights_N: float32, a weight for each id; None in a batch without weights.
        num_given: Ids that were given.
        num_changed: Ids among them that were dropped, clamped, hashed or sent to the last row.
    """

    ids_N: npt.NDArray[np.int64]
    lengths_B: npt.NDArray[np.int64]
    weights_N: npt.NDArray[np.float32] | None
    num_given: int
    num_changed: int = 0


def policies_of(tables: Iterable[TableConfig | BaseEmbeddingConfig]) -> dict[str, IdPolicy]:
    """The policy of each feature, which all tables that it looks up must share.

    Args:
        tables: Ours, or TorchRec's, whose policy is "raise".

    Returns:
        By feature, in the order of the tables.

    Raises:
        ValueError: Two tables of a feature differ in their policies, or, where ids are changed, in
            their number of rows.

    Example:
        >>> table = TableConfig(
        ...     name="t",
        ...     num_embeddings=9,
        ...     embedding_dim=4,
        ...     feature_names=("x",),
        ...     out_of_range="drop",
        ... )
        >>> policies_of([table])["x"].out_of_range
        'drop'
    """
    policies: dict[str, IdPolicy] = {}
    for table in tables:
        for feature in table.feature_names:
            policy = IdPolicy(
                feature=feature,
                table=table.name,
                num_embeddings=table.num_embeddings,
                out_of_range=getattr(table, "out_of_range", "raise"),
            )
            known = policies.get(feature)
            if known is not None:
                _check_agree(known, policy)
            if known is None or policy.num_embeddings < known.num_embeddings:
                policies[feature] = policy
    return policies


def _check_agree(one: IdPolicy, other: IdPolicy) -> None:
    who = f"feature {one.feature!r} looks up tables {one.table!r} and {other.table!r}, and an id "
    if one.out_of_range != other.out_of_range:
        raise ValueError(
            f"{who}becomes the same row of both; out_of_range is {one.out_of_range!r} and "
            f"{other.out_of_range!r}; give both the same"
        )
    if one.out_of_range != "raise" and one.num_embeddings != other.num_embeddings:
        raise ValueError(
            f"{who}becomes the same row of both, which out_of_range={one.out_of_range!r} cannot "
            f"find in {one.num_embeddings} and {other.num_embeddings} rows; give both the same "
            "num_embeddings, or each a feature of its own"
        )


def apply_policy(
    policy: IdPolicy, bags: Bags, weights_N: npt.NDArray[np.float32] | None = None
) -> Lookups:
    """Makes rows of ids; under "raise" they stay as they are, for the guard to check.

    Args:
        policy: Of the feature.
        bags: With integers of any value, or strings.
        weights_N: float32, a weight for each id.

    Returns:
        With ids in [0, num_embeddings), unless the policy is "raise".

    Raises:
        ValueError: The ids are strings, and the table does not hash.
    """
    rows, num_given = policy.num_embeddings, len(bags.ids_N)
    lookups = Lookups(
        ids_N=_integers(policy, bags),
        lengths_B=bags.lengths_B,
        weights_N=weights_N,
        num_given=num_given,
    )
    if policy.out_of_range == "raise":
        return lookups
    if policy.out_of_range == "hash":
        return replace(lookups, ids_N=hash_ids(lookups.ids_N, rows), num_changed=num_given)
    num_real = rows - 1 if policy.out_of_range == "oov_row" else rows
    outside_N = (lookups.ids_N < 0) | (lookups.ids_N >= num_real)
    num_outside = int(outside_N.sum())
    if not num_outside:
        return lookups
    lookups = replace(lookups, num_changed=num_outside)
    if policy.out_of_range == "drop":
        return _drop(lookups, outside_N)
    if policy.out_of_range == "clamp":
        return replace(lookups, ids_N=lookups.ids_N.clip(0, rows - 1))
    return replace(lookups, ids_N=np.where(outside_N, rows - 1, lookups.ids_N))


def _drop(lookups: Lookups, outside_N: npt.NDArray[np.bool_]) -> Lookups:
    kept_N, weights_N = ~outside_N, lookups.weights_N
    return replace(
        lookups,
        ids_N=lookups.ids_N[kept_N],
        lengths_B=lengths_of_kept(kept_N, lookups.lengths_B),
        weights_N=None if weights_N is None else weights_N[kept_N],
    )


def _integers(policy: IdPolicy, bags: Bags) -> npt.NDArray[np.int64]:
    if bags.ids_N.dtype != object:
        return bags.ids_N
    if policy.out_of_range != "hash":
        raise ValueError(
            f"feature {policy.feature!r}, sample {sample_of(0, bags.lengths_B)}: id "
            f"{bags.ids_N[0]!r:.80} is a string, and table {policy.table!r} has "
            f"out_of_range={policy.out_of_range!r}; set it to 'hash', or give integers"
        )
    return ids_of_strings(bags.ids_N)
