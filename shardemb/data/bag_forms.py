"""Takes bags apart into values and lengths, in every form that users hold them in.

Knows neither whether the values are ids or weights, nor of which feature.
"""

# B samples, L padded length, M values with padding and nulls among them

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardemb.data.arrow import is_arrow, read_arrow
from shardemb.data.bag_values import UnfitError, array_of

_Array = npt.NDArray[Any]
_Ints = npt.NDArray[np.int64]
_BAGS = (list, tuple, range, np.ndarray, torch.Tensor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Offsets:
    """The values of all bags one after another, and where each bag begins: `nn.EmbeddingBag`'s way.

    A plain tuple (ids, offsets) stands for the same, without a last offset.

    Attributes:
        ids: Integers or strings [N]: a list, array, tensor or Arrow column.
        offsets: Integers [B], the position of each bag's first id; the last bag ends with the ids.
        include_last_offset: Whether N follows as a last offset, so that there are B + 1.

    Example:
        >>> bags = Offsets(ids=[5, 7, 9], offsets=[0, 2, 2, 3], include_last_offset=True)
        >>> take_apart(bags).lengths_B
        array([2, 0, 1])
    """

    ids: Any
    offsets: Any
    include_last_offset: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """Bags as they were given.

    Attributes:
        values_M: Of any dtype.
        lengths_B: int64 [B], which add up to M.
        kept_M: bool, false for padding and nulls; None if there are none.
        has_offsets: Whether they came with offsets.
    """

    values_M: _Array
    lengths_B: _Ints
    kept_M: npt.NDArray[np.bool_] | None = None
    has_offsets: bool = False


def take_apart(data: Any, *, padding: int | None = None) -> Given:
    """Takes bags apart.

    Args:
        data: In any form of `keyed_jagged_tensor`.
        padding: What is no value in an array [B, L].

    Returns:
        The values, unchecked, and the lengths.

    Raises:
        UnfitError: The form is none of these; its `at` is the sample.
    """
    if is_arrow(data):
        return _of_arrow(data)
    if isinstance(data, tuple):
        if len(data) != 2:
            raise UnfitError(
                f"a tuple must be (ids, offsets), got {len(data)} elements; give bags as a list"
            )
        return _of_offsets(Offsets(ids=data[0], offsets=data[1]))
    if isinstance(data, Offsets):
        return _of_offsets(data)
    return _of_list(data) if isinstance(data, list) else _of_array(array_of(data), padding)


def take_flat(data: Any) -> Given:
    """Takes values that are in no bags: a bag of one for each.

    Args:
        data: A list, array, tensor or Arrow column.

    Returns:
        The values, unchecked.

    Raises:
        UnfitError: It is none of these.
    """
    given = _of_arrow(data) if is_arrow(data) else None
    if given is not None and (given.lengths_B == 1).all():
        return given
    array = array_of(data) if given is None else np.empty((0, 0))
    if array.ndim != 1:
        raise UnfitError("with offsets, values must be one list, array or column without bags")
    return Given(values_M=array, lengths_B=np.ones(len(array), dtype=np.int64))


def _of_arrow(column: Any) -> Given:
    values_M, lengths_B, kept_M = read_arrow(column)
    has_nulls = not kept_M.all()
    return Given(values_M=values_M, lengths_B=lengths_B, kept_M=kept_M if has_nulls else None)


def _of_array(array: _Array, padding: int | None) -> Given:
    if array.ndim == 1:
        if array.dtype == object and any(isinstance(bag, _BAGS) for bag in array):
            return _of_list(list(array))
        return Given(values_M=array, lengths_B=np.ones(len(array), dtype=np.int64))
    if array.ndim != 2:
        got = f"shape {list(array.shape)}" if array.ndim else f"{array.item()!r:.80}"
        raise UnfitError(
            "bags must be a list of bags, an array [B] or [B, L], (ids, offsets) or an Arrow "
            f"column, got {got}"
        )
    if array.dtype.kind not in "iufb":
        raise UnfitError(
            f"a padded array must hold numbers, got {array.dtype}; give a list of bags"
        )
    return Given(
        values_M=array.reshape(-1),
        lengths_B=np.full(array.shape[0], array.shape[1], dtype=np.int64),
        kept_M=None if padding is None else (array != padding).reshape(-1),
    )


def _of_list(bags: Sequence[Any]) -> Given:
    if set(map(type, bags)) <= {list, tuple}:
        return Given(
            values_M=array_of(list(chain.from_iterable(bags))),
            lengths_B=np.fromiter(map(len, bags), dtype=np.int64, count=len(bags)),
        )
    arrays = [_array_of_bag(sample, bag) for sample, bag in enumerate(bags)]
    filled = [array for array in arrays if array.size] or [np.empty(0, dtype=np.int64)]
    if len({array.dtype for array in filled}) > 1:  # else NumPy would make one dtype of them
        filled = [array.astype(object) for array in filled]
    return Given(
        values_M=np.concatenate(filled),
        lengths_B=np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays)),
    )


def _array_of_bag(sample: int, bag: Any) -> _Array:
    if not isinstance(bag, _BAGS):
        raise UnfitError(
            f"a bag must be a list or an array, got {bag!r:.80}; for one value a sample give an "
            "array of all",
            at=sample,
        )
    try:
        array = array_of(bag)
    except UnfitError as error:
        raise UnfitError(str(error), at=sample) from None
    if array.ndim != 1:
        raise UnfitError(f"a bag must have one dimension, got shape {list(array.shape)}", at=sample)
    return array


def _of_offsets(bags: Offsets) -> Given:
    given, offsets = take_flat(bags.ids), array_of(bags.offsets)
    if offsets.ndim != 1 or (offsets.dtype.kind not in "iu" and offsets.size):
        raise UnfitError(
            f"offsets must be integers [B], got {offsets.dtype} {list(offsets.shape)}; if these "
            "are two bags, give a list instead of a tuple"
        )
    lengths_B = _lengths_between(offsets.astype(np.int64), len(given.values_M), bags)
    return replace(given, lengths_B=lengths_B, has_offsets=True)


def _lengths_between(offsets: _Ints, num_values: int, bags: Offsets) -> _Ints:
    if not bags.include_last_offset:
        if num_values and not len(offsets):
            raise UnfitError(
                f"offsets are empty, and there are {num_values} ids; give each bag the position of "
                "its first id"
            )
        offsets = np.append(offsets, num_values)
    elif not len(offsets) or offsets[-1] != num_values:
        raise UnfitError(
            f"the last offset must be the number of ids, {num_values}, got {offsets[-1:].tolist()};"
            " mend it, or leave it out with include_last_offset=False"
        )
    if offsets[0] != 0:
        raise UnfitError(f"the first offset must be 0, got {offsets[0]} for {num_values} ids")
    lengths_B = np.diff(offsets)
    if (lengths_B < 0).any():
        at = int((lengths_B < 0).argmax())
        raise UnfitError(
            f"its ids begin at {offsets[at]} and end at {offsets[at + 1]} of {num_values}; "
            "offsets must not decrease, and not exceed the number of ids",
            at=at,
        )
    return lengths_B
