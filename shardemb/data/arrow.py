"""Arrow columns as flat arrays and lengths. Imports pyarrow only when it is handed some of it.

A null is no id: a null list is an empty bag, and a null in a list is left out.
"""

# B samples, M values with nulls among them

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shardemb.data.bag_values import UnfitError

if TYPE_CHECKING:
    import pyarrow as pa


def is_arrow(data: Any) -> bool:
    """Whether something is of pyarrow, which is not imported to find out."""
    return type(data).__module__.partition(".")[0] == "pyarrow"


def read_arrow(
    column: Any,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The values of a column, and how many each sample has.

    Args:
        column: An Array or ChunkedArray, also a slice of one, of integers, floats or strings, or of
            lists of such.

    Returns:
        The values with those that are null [M], int64 [B] the lengths, which add up to M, and
        bool [M], false where a value is null.

    Raises:
        UnfitError: It is of another type.
    """
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        empty = pa.array([], type=column.type)
        parts = [read_arrow(chunk) for chunk in [*column.chunks, empty]]
        values, lengths, kept = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return values, lengths, kept
    if not isinstance(column, pa.Array):
        raise UnfitError(
            f"a column must be an Arrow Array or ChunkedArray, got {type(column).__name__}; take "
            'one out of a table by table["name"]'
        )
    if not _is_list(column.type):
        values_M, kept_M = _read_leaf(column)
        return values_M, np.ones(len(values_M), dtype=np.int64), kept_M
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), 0)
    values_M, kept_M = _read_leaf(column.flatten())  # heeds slices, and skips null lists
    return values_M, lengths.to_numpy(zero_copy_only=False).astype(np.int64), kept_M


def _is_list(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return any(
        check(kind)
        for check in (
            *(types.is_list, types.is_large_list, types.is_fixed_size_list),
            *(types.is_list_view, types.is_large_list_view),
        )
    )


def _read_leaf(leaf: "pa.Array") -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(leaf.type):
        leaf = leaf.dictionary_decode()
    kept_M = np.logical_not(leaf.is_null().to_numpy(zero_copy_only=False))
    kind = leaf.type
    if types.is_null(kind):  # of lists that are all empty, or null
        return np.zeros(len(leaf), dtype=np.int64), kept_M
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return np.fromiter(leaf.to_pylist(), dtype=object, count=len(leaf)), kept_M
    if not types.is_integer(kind) and not types.is_floating(kind):
        raise UnfitError(f"a column must hold integers or strings, or lists of such, got {kind}")
    if leaf.null_count:
        leaf = leaf.fill_null(pa.scalar(0, type=kind))
    return leaf.to_numpy(zero_copy_only=False), kept_M
