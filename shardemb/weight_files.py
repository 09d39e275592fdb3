"""Weights that were given, in memory or in a file, of which any block can be read. Knows no table.

Files are mapped, and opened anew for each block, so that what was read does not stay in memory.
"""

# R rows, C columns of a block

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shardemb.errors import RunError
from shardemb.text import some_names

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Of weights that are read."""
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A matrix of which blocks are read.

    Attributes:
        name: What it is, for messages.
        shape: Rows and columns.
        dtype: One of `DTYPES`.
        read: Copies some rows and columns of it as float32 [R, C]; what float32 cannot hold becomes
            infinite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[slice, slice], npt.NDArray[np.float32]]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            *others, last = DTYPES
            raise ValueError(
                f"{self.name}: weights must be {', '.join(others)} or {last}, got {self.dtype}; "
                "convert them"
            )
        if len(self.shape) != 2 or not all(self.shape):
            raise ValueError(
                f"{self.name}: weights must have rows and columns, [num_rows, embedding_dim], got "
                f"shape {list(self.shape)}"
            )


def open_weights(
    given: "str | os.PathLike[str] | npt.NDArray[Any] | torch.Tensor", tensor: str | None = None
) -> Weights:
    """Finds out what weights are; of a file, only the header is read.

    Args:
        given: A path that ends with .npy or .safetensors, an array, or a tensor on any device.
        tensor: Which of a .safetensors file; None if it holds one.

    Returns:
        The weights. They keep a file mapped as long as they live.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file or not whole, there is no tensor of that name, or the weights
            are no matrix of floating-point numbers.
        RunError: The package safetensors is missing.

    Example:
        >>> weights = open_weights(np.eye(3))
        >>> weights.dtype, weights.read(slice(1, 2), slice(0, 2)).tolist()
        ('float64', [[0.0, 1.0]])
    """
    is_file = isinstance(given, (str, os.PathLike))
    path = Path(given) if isinstance(given, (str, os.PathLike)) else None
    if tensor is not None and (path is None or path.suffix != ".safetensors"):
        what = f"'{path}'" if is_file else f"a {type(given).__name__}"
        raise ValueError(
            f"tensor={tensor!r} names a tensor of a .safetensors file, and the weights are {what}; "
            "leave it out"
        )
    if path is not None:
        return _of_file(path, tensor)
    if type(given) in {np.ndarray, np.memmap}:
        return _of_array(given, "a NumPy array")
    return _of_tensor(given)


def _of_file(path: Path, tensor: str | None) -> Weights:
    if path.suffix not in {".npy", ".safetensors"}:
        raise ValueError(
            f"'{path}': the name of a file of weights must end with .npy or .safetensors; save "
            "them by numpy.save or safetensors.torch.save_file, or give a tensor, such as one of "
            "torch.load(path, mmap=True), of which only what is used is read"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}' to read weights from")
    return _of_npy(path) if path.suffix == ".npy" else _of_safetensors(path, tensor)


def _of_array(array: Any, name: str) -> Weights:
    def read(rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore"):
            return np.array(array[rows, columns], np.float32, order="C")

    return Weights(name=name, shape=array.shape, dtype=array.dtype.name, read=read)


def _of_tensor(given: Any) -> Weights:
    import torch

    kind = type(given)
    if kind not in {torch.Tensor, torch.nn.Parameter}:
        raise ValueError(
            "weights must be a path, a NumPy array or a plain torch tensor, got "
            f"{kind.__name__}; make one of it"
        )
    if given.layout is not torch.strided or given.is_meta:
        what = "is on meta" if given.is_meta else f"has layout {given.layout}"
        raise ValueError(f"weights must be a dense tensor that holds numbers, and it {what}")
    dtype = str(given.dtype).removeprefix("torch.")
    return _of_torch(given.detach(), given.shape, dtype, "a torch tensor")


def _of_torch(matrix: Any, shape: Any, dtype: str, name: str) -> Weights:
    """Of a tensor, or of what gives one when it is sliced."""

    def read(rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        return np.array(matrix[rows, columns].float().cpu().numpy(), order="C")

    return Weights(name=name, shape=tuple(shape), dtype=dtype, read=read)


def _of_npy(path: Path) -> Weights:
    with path.open("rb") as file:
        if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise ValueError(
                f"'{path}' does not begin as a .npy file does, it may be a pickle, which is not "
                "read because it may run code; save the array by numpy.save"
            )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        why = f"it cannot be mapped: {error}"
        if "object" in str(error):
            why = "it holds pickled objects, which are not read because they may run code"
        elif "mmap length" in str(error):
            why = "it ends before its last row, as if it were copied or written in part"
        raise ValueError(f"'{path}': {why}; save it anew by numpy.save") from None
    return _of_array(array, f"'{path}'")


def _of_safetensors(path: Path, tensor: str | None) -> Weights:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise RunError(
            f"reading '{path}' needs the package safetensors; python -m pip install safetensors"
        ) from None
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is no whole .safetensors file: {error}; copy or save it anew"
        ) from None
    names = list(file.keys())
    if tensor is None and len(names) == 1:
        (tensor,) = names
    if tensor not in names:
        problem = f"no tensor {tensor!r}" if tensor else "more than one tensor"
        raise ValueError(
            f"'{path}' holds {problem}; name one by tensor=..., it has "
            f"{some_names(names, tensor or '')}"
        )
    found = file.get_slice(tensor)
    dtype = found.get_dtype()
    return _of_torch(
        found,
        found.get_shape(),
        _SAFETENSORS_DTYPES.get(dtype, dtype),
        f"tensor {tensor!r} of '{path}'",
    )
