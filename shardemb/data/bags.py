"""The ids and weights of one feature, checked, or refused with its name and the sample's.

Knows neither tables nor which ids they have.
"""

# B samples, M values with padding and nulls among them, N values without

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from shardemb.data.bag_forms import Given, Offsets, take_apart, take_flat
from shardemb.data.bag_values import UnfitError, to_ids, to_weights

_Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bags:
    """The ids of a feature.

    Attributes:
        ids_N: int64, or strings as objects, bag after bag.
        lengths_B: int64 [B], which add up to N.
        given: As they were given.
    """

    ids_N: npt.NDArray[Any]
    lengths_B: _Lengths
    given: Given


def read_ids(feature: str, data: Any, *, padding: int) -> Bags:
    """Reads the ids of a feature.

    Args:
        feature: Its name, for messages.
        data: In any form of `keyed_jagged_tensor`.
        padding: What is no id in an array [B, L].

    Returns:
        The bags.

    Raises:
        ValueError: The data is malformed.
    """
    who = f"feature {feature!r}"
    try:
        given = take_apart(data, padding=padding)
    except UnfitError as error:
        _refuse(who, error, error.at)
    values_N, lengths_B = given.values_M, given.lengths_B
    if given.kept_M is not None:
        values_N, lengths_B = values_N[given.kept_M], lengths_of_kept(given.kept_M, lengths_B)
    try:
        return Bags(ids_N=to_ids(values_N), lengths_B=lengths_B, given=given)
    except UnfitError as error:
        _refuse(who, error, sample_of(error.at, lengths_B))


def read_weights(feature: str, data: Any, bags: Bags) -> npt.NDArray[np.float32]:
    """Reads the weights of ids.

    Args:
        feature: Its name, for messages.
        data: In a form of the ids, with a weight in the place of each id; what is in the place of
            padding or of a null is not looked at. For ids with offsets the weights alone, [N], do.
        bags: The ids.

    Returns:
        float32 [N], finite, one for each id.

    Raises:
        ValueError: The data is malformed, or of another shape than the ids.
    """
    who, ids = f"weights of feature {feature!r}", bags.given
    try:
        weights = _take_weights_apart(data, ids)
    except UnfitError as error:
        _refuse(who, error, error.at)
    values_M = weights.values_M
    try:
        return to_weights(values_M if ids.kept_M is None else values_M[ids.kept_M])
    except UnfitError as error:
        _refuse(who, error, sample_of(error.at, bags.lengths_B))


def _take_weights_apart(data: Any, ids: Given) -> Given:
    if ids.has_offsets and not isinstance(data, (Offsets, tuple)):
        weights = take_flat(data)
        if len(weights.values_M) != len(ids.values_M):
            raise UnfitError(
                f"there are {len(weights.values_M)} for {len(ids.values_M)} ids; give every id one"
            )
        weights = replace(weights, lengths_B=ids.lengths_B)
    else:
        weights = take_apart(data)
    if len(weights.lengths_B) != len(ids.lengths_B):
        raise UnfitError(
            f"there are {len(weights.lengths_B)} samples, and {len(ids.lengths_B)} of ids; give "
            "the weights in the form of the ids"
        )
    differs_B = weights.lengths_B != ids.lengths_B
    if differs_B.any():
        at = int(differs_B.argmax())
        raise UnfitError(
            f"there are {weights.lengths_B[at]} for {ids.lengths_B[at]} ids; give every id one",
            at=at,
        )
    if weights.kept_M is not None:
        bad_M = ~weights.kept_M if ids.kept_M is None else ids.kept_M & ~weights.kept_M
        if bad_M.any():
            sample = sample_of(int(bad_M.argmax()), ids.lengths_B)
            raise UnfitError("a weight is null, and its id is not; fill it", at=sample)
    return weights


def lengths_of_kept(kept_M: npt.NDArray[np.bool_], lengths_B: _Lengths) -> _Lengths:
    """How many values of each bag are kept.

    Args:
        kept_M: bool [M].
        lengths_B: int64 [B], which add up to M.

    Returns:
        int64 [B].

    Example:
        >>> lengths_of_kept(np.array([True, False, True]), np.array([2, 0, 1]))
        array([1, 0, 1])
    """
    kept_before = np.concatenate([[0], np.cumsum(kept_M, dtype=np.int64)])
    ends_B = np.cumsum(lengths_B)
    lengths: _Lengths = kept_before[ends_B] - kept_before[ends_B - lengths_B]
    return lengths


def sample_of(at: int | None, lengths_B: _Lengths) -> int | None:
    """The sample whose bag holds the value at a position, if any.

    Example:
        >>> sample_of(2, np.array([2, 0, 1]))
        2
    """
    return None if at is None else int(np.searchsorted(np.cumsum(lengths_B), at, side="right"))


def _refuse(who: str, error: UnfitError, sample: int | None) -> NoReturn:
    where = who if sample is None else f"{who}, sample {sample}"
    raise ValueError(f"{where}: {error}") from None
