"""Initial rows that are given, not drawn: tensors, arrays, and files larger than memory."""

# R rows, C columns asked for

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shardemb.distributions import Distribution
from shardemb.errors import RunError
from shardemb.weight_files import Weights, open_weights

if TYPE_CHECKING:
    import torch

_ROWS_IN_DIGEST = 16  # of a file, each may cost the MiB that the system reads ahead


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Rows that are given. Row r of the table is row r of the weights.

    A rank reads the rows and columns of its own shards, some at a time; the rest of a file is
    neither read nor held. Weights in memory are not copied, and must not change before they are
    in their table.

    The ranks must be given equal weights, and find out where they are not: shape, dtype, and a
    digest of 16 evenly spaced rows, the first and the last among them, are part of what they
    compare. Paths may differ between nodes.

    Attributes:
        weights: float32, float16, bfloat16 or float64 [num_rows, embedding_dim]: a torch tensor, a
            NumPy array, or the path of a .npy file, which is mapped, or of a .safetensors file,
            which needs the package safetensors. Converted to the table's dtype, through float32.
        tensor: Name of the tensor in a .safetensors file; may be left out where it holds one.
        rest: Draws the rows of the table behind those that are given. By default there must be
            none.
        shape: Rows and columns of the weights.
        dtype: Of the weights, such as "float16".
        digest: Of some rows of the weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file or not whole, there is no tensor of that name, the weights
            are no matrix of floating-point numbers, or `rest` is no distribution.
        RunError: The package safetensors is missing.

    Example:
        >>> init = Pretrained(weights=np.eye(4, dtype=np.float32))
        >>> init.shape, init.dtype
        ((4, 4), 'float32')
        >>> init.rows(
        ...     seed=0, table="t", first_row=1, num_rows=1, embedding_dim=4, columns=slice(0, 2)
        ... )
        array([[0., 1.]], dtype=float32)
    """

    weights: "str | os.PathLike[str] | npt.NDArray[Any] | torch.Tensor" = field(
        repr=False, compare=False
    )
    tensor: str | None = field(default=None, repr=False, compare=False)
    rest: Distribution | None = None
    shape: tuple[int, ...] = field(init=False)
    dtype: str = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if self.rest is not None and not isinstance(self.rest, Distribution):
            raise ValueError(
                "Pretrained: rest must be a distribution of shardemb.init, such as "
                f"init.Normal(std=0.01), got {self.rest!r:.80}"
            )
        opened = open_weights(self.weights, self.tensor)
        for name, value in (
            ("shape", opened.shape),
            ("dtype", opened.dtype),
            ("digest", _digest(opened)),
        ):
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: object) -> "Pretrained":
        return self  # a copy of a model shall not hold its weights twice

    def check_fits(self, table: str, num_embeddings: int, embedding_dim: int) -> None:
        """Refuses a table that these weights cannot fill.

        Args:
            table: Its name.
            num_embeddings: Its rows.
            embedding_dim: Its columns.

        Raises:
            ValueError: It is wider or narrower, has fewer rows, or has more rows and there is no
                `rest`.

        Example:
            >>> Pretrained(weights=np.eye(4)).check_fits("user", 5, 4)
            Traceback (most recent call last):
            ValueError: table 'user' has 5 rows, and its weights (a NumPy array) have 4; ...
        """
        num_given, width = self.shape
        weights = f"its weights ({open_weights(self.weights, self.tensor).name}) have"
        if width != embedding_dim:
            raise ValueError(
                f"table {table!r} has embedding_dim {embedding_dim}, and {weights} {width} "
                f"columns; set embedding_dim={width}, or give others"
            )
        if num_given > num_embeddings:
            raise ValueError(
                f"table {table!r} has {num_embeddings} rows, and {weights} {num_given}; set "
                f"num_embeddings={num_given}, or give fewer"
            )
        if num_given < num_embeddings and self.rest is None:
            raise ValueError(
                f"table {table!r} has {num_embeddings} rows, and {weights} {num_given}; say what "
                "draws the others, Pretrained(..., rest=init.Normal(std=0.01)), or set "
                f"num_embeddings={num_given}"
            )

    def rows(
        self,
        *,
        seed: int,
        table: str,
        first_row: int,
        num_rows: int,
        embedding_dim: int,
        columns: slice = slice(None),
    ) -> npt.NDArray[np.float32]:
        """Rows first_row to first_row + num_rows - 1 of a table, float32 [R, C]."""
        num_read = min(max(0, self.shape[0] - first_row), num_rows)
        parts = []
        if num_read:
            parts.append(self._opened().read(slice(first_row, first_row + num_read), columns))
        if num_read < num_rows:
            assert self.rest is not None
            drawn_RC = self.rest.rows(
                seed=seed,
                table=table,
                first_row=first_row + num_read,
                num_rows=num_rows - num_read,
                embedding_dim=embedding_dim,
                columns=columns,
            )
            parts.append(drawn_RC)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _opened(self) -> Weights:
        opened = open_weights(self.weights, self.tensor)
        if (opened.shape, opened.dtype) != (self.shape, self.dtype):
            raise RunError(
                f"{opened.name} is {opened.dtype} {list(opened.shape)}, and was {self.dtype} "
                f"{list(self.shape)} when its table was declared; leave it as it is until the "
                "model is sharded"
            )
        return opened


def _digest(weights: Weights) -> str:
    """Of evenly spaced rows, the first and the last among them."""
    num_rows = weights.shape[0]
    count = min(num_rows, _ROWS_IN_DIGEST)
    digest = hashlib.blake2b(digest_size=16)
    for number in range(count):
        row = number * (num_rows - 1) // max(1, count - 1)
        digest.update(weights.read(slice(row, row + 1), slice(None)).tobytes())
    return digest.hexdigest()
