"""Fills tables, or blocks of them, with the initial values that they declare."""

# R rows, C columns of a block

import torch

from shardemb.init import Init, Pretrained

_VALUES_AT_ONCE = 1 << 18
"""Values drawn or read at once while a table is filled, in elements: 1 MiB of float32."""


class InitialValues:
    """Fills any block of a table with its initial values. TorchRec's configs hold it as `init_fn`.

    Args:
        table: Name of the table.
        init: The distribution, or the weights.
        seed: Seed of all tables of the collection.
        padding_idx: A row that starts as zeros, as in `torch.nn.Embedding`, unless it is given, as
            in `torch.nn.Embedding.from_pretrained`.
    """

    def __init__(
        self, table: str, init: Init, seed: int, *, padding_idx: int | None = None
    ) -> None:
        self._table, self._init, self._seed = table, init, seed
        self._zeros = padding_idx
        if padding_idx is not None and isinstance(init, Pretrained) and padding_idx < init.shape[0]:
            self._zeros = None

    def __repr__(self) -> str:
        zeros = "" if self._zeros is None else f", zeros in row {self._zeros}"
        return f"InitialValues({self._table!r}, {self._init!r}, seed={self._seed}{zeros})"

    @property
    def are_given(self) -> bool:
        """Whether they are read from what a user gave, which can fail, and not drawn."""
        return isinstance(self._init, Pretrained)

    @torch.no_grad()
    def fill(
        self, block_RC: torch.Tensor, *, first_row: int, first_column: int, embedding_dim: int
    ) -> None:
        """Writes the table's initial values into a block of it, a few rows at a time.

        Args:
            block_RC: The block, any floating dtype and device [R, C].
            first_row: Row of the table at which the block begins.
            first_column: Column of the table at which the block begins.
            embedding_dim: Columns of the whole table.

        Raises:
            ValueError: A value is not finite, or not in the block's dtype.
            OSError: A file of weights cannot be read.
            RunError: It is another than when the table was declared.
        """
        num_rows, num_columns = block_RC.shape
        step = max(1, _VALUES_AT_ONCE // embedding_dim)
        for start in range(0, num_rows, step):
            rows_RC = self._init.rows(
                seed=self._seed,
                table=self._table,
                first_row=first_row + start,
                num_rows=min(step, num_rows - start),
                embedding_dim=embedding_dim,
                columns=slice(first_column, first_column + num_columns),
            )
            values_RC = torch.from_numpy(rows_RC).to(block_RC.dtype)
            self._check_finite(values_RC, first_row + start)
            block_RC[start : start + step].copy_(values_RC)
        if self._zeros is not None and first_row <= self._zeros < first_row + num_rows:
            block_RC[self._zeros - first_row] = 0

    def __call__(self, weight_RD: torch.Tensor) -> None:
        """Fills a whole table, as TorchRec asks of an `init_fn` of an unsharded collection."""
        self.fill(weight_RD, first_row=0, first_column=0, embedding_dim=weight_RD.shape[1])

    def _check_finite(self, values_RC: torch.Tensor, first_row: int) -> None:
        finite_RC = torch.isfinite(values_RC)
        if finite_RC.all():
            return
        row, column = torch.nonzero(~finite_RC)[0].tolist()
        dtype = str(values_RC.dtype).removeprefix("torch.")
        raise ValueError(
            f"table {self._table!r}: row {first_row + row} starts with "
            f"{float(values_RC[row, column])} as {dtype}; mend what its init gives, or choose a "
            "wider dtype"
        )
