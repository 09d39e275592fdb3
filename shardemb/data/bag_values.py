"""Ids and weights as arrays, or why they are none. Knows nothing of bags, features or tables."""

# N values

import numbers
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_MAX_ID = 2**63 - 1


class UnfitError(ValueError):
    """What is wrong with some values.

    Args:
        text: What, and the way out; it follows the name of the feature and of the sample.
        at: The position of the first such value, or such sample; None where it is all of them.
    """

    def __init__(self, text: str, *, at: int | None = None) -> None:
        super().__init__(text)
        self.at = at


def array_of(values: Any) -> npt.NDArray[Any]:
    """Values as users hold them, as an array whose dtype says what they are.

    A list of integers becomes int64, one of floats float64; any other list, such as one of integers
    among which is a boolean, becomes an array of objects, where NumPy would convert.

    Args:
        values: A list, a tensor on the CPU, or anything that NumPy takes for an array.

    Returns:
        The array, of any shape.

    Raises:
        UnfitError: It is a tensor whose values NumPy cannot have, or an array with masked values.
    """
    if isinstance(values, torch.Tensor):
        return _array_of_tensor(values)
    if np.ma.is_masked(values):  # NumPy would hand out what lies under the mask
        num_masked = int(np.ma.getmaskarray(values).sum())
        raise UnfitError(
            f"an array has masked values, {num_masked} of {values.size}; fill an "
            "array [B, L] with the padding, such as .filled(-1), or give a list of bags without "
            "them"
        )
    if not isinstance(values, (list, tuple, range)):
        return np.asarray(values)
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    if kinds == {float}:
        return np.array(values, dtype=np.float64)
    return np.fromiter(values, dtype=object, count=len(values))


def _array_of_tensor(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.is_nested:
        raise UnfitError(
            "a nested tensor is not supported; give a list of bags, such as list(tensor.unbind())"
        )
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        kind = tensor.layout if tensor.device.type == "cpu" else f"on {tensor.device}"
        raise UnfitError(
            f"a batch is made of plain tensors on the CPU, got one that is {kind}; make it there, "
            "and move the batch with .to(device)"
        )
    if tensor.requires_grad:
        raise UnfitError("a batch passes no gradients on, got a tensor with one; detach it")
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()  # NumPy has no bfloat16
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def to_ids(values_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Checks that values are ids.

    Args:
        values_N: Of `array_of`, [N].

    Returns:
        int64 [N], or strings as objects [N]. Nothing, of any dtype, is int64 [0].

    Raises:
        UnfitError: A value is neither an integer of 64 bits nor a string, or there are both.
    """
    if values_N.size == 0:
        return np.empty(0, dtype=np.int64)
    kind = values_N.dtype.kind
    if kind == "i":
        return values_N.astype(np.int64, copy=False)
    if kind == "u":
        if int(values_N.max()) > _MAX_ID:
            _refuse_id(values_N, int((values_N > _MAX_ID).argmax()))
        return values_N.astype(np.int64)
    if kind in "UT":
        return values_N.astype(object)
    if kind == "O":
        return _objects_to_ids(values_N)
    return _refuse_id(values_N, 0)


def _objects_to_ids(values_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    is_text = isinstance(values_N[0], str)
    for at, value in enumerate(values_N):
        if isinstance(value, str) if is_text else _is_id(value):
            continue
        if isinstance(value, str) or (is_text and _is_id(value)):
            raise UnfitError(
                f"ids must be all integers or all strings, got {values_N[0]!r:.80} and "
                f"{value!r:.80}",
                at=at,
            )
        _refuse_id(values_N, at)
    return values_N if is_text else values_N.astype(np.int64)


def _is_id(value: Any) -> bool:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and -_MAX_ID - 1 <= int(value) <= _MAX_ID


def _refuse_id(values_N: npt.NDArray[Any], at: int) -> npt.NDArray[Any]:
    value, dtype = values_N[at], values_N.dtype
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        raise UnfitError(
            f"id {int(value)} does not fit into int64; take ids modulo 2**64 with "
            ".view(np.int64), or hash them",
            at=at,
        )
    what = f" of dtype {dtype}" if dtype.kind != "O" else ""
    raise UnfitError(
        f"ids must be integers, or strings for a table that hashes, got {_shown(value)}{what}; "
        "convert them where the batch is made",
        at=at,
    )


def to_weights(values_N: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Checks that values are weights.

    Args:
        values_N: Of `array_of`, [N].

    Returns:
        float32 [N], finite.

    Raises:
        UnfitError: A value is no finite number, in float32.
    """
    if values_N.size == 0:
        return np.empty(0, dtype=np.float32)
    kind = values_N.dtype.kind
    if kind == "O":
        real = [isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values_N]
        if not all(real):
            _refuse_weight(values_N, real.index(False))
    elif kind not in "fiu":
        _refuse_weight(values_N, 0)
    with np.errstate(over="ignore"):
        weights_N = values_N.astype(np.float32)
    finite_N = np.isfinite(weights_N)
    if not finite_N.all():
        _refuse_weight(values_N, int(finite_N.argmin()))
    return weights_N


def _refuse_weight(values_N: npt.NDArray[Any], at: int) -> None:
    raise UnfitError(
        f"a weight must be a finite float32, got {_shown(values_N[at])}; mend it, or leave out id "
        "and weight",
        at=at,
    )


def _shown(value: Any) -> str:
    return f"{(value.item() if isinstance(value, np.generic) else value)!r}"[:80]
