"""Fills tables, or blocks of them, with the initial values that they declare."""

import torch

from shardemb.init import Init

_VALUES_AT_ONCE = 1 << 18
"""Values drawn at once while a table is filled, in elements: 1 MiB of float32."""


class InitialValues:
    """Fills any block of a table with its initial values. TorchRec's configs hold it as `init_fn`.

    Args:
        table: Name of the table.
        init: The distribution.
        seed: Seed of all tables of the collection.
    """

    def __init__(self, table: str, init: Init, seed: int) -> None:
        self._table, self._init, self._seed = table, init, seed

    def __repr__(self) -> str:
        return f"InitialValues({self._table!r}, {self._init!r}, seed={self._seed})"

    @torch.no_grad()
    def fill(
        self, block_RD: torch.Tensor, *, first_row: int, first_column: int, embedding_dim: int
    ) -> None:
        """Writes the table's initial values into a block of it, a few rows at a time.

        Args:
            block_RD: The block, any floating dtype and device [R, D].
            first_row: Row of the table at which the block begins.
            first_column: Column of the table at which the block begins.
            embedding_dim: Columns of the whole table.
        """
        num_rows, num_columns = block_RD.shape
        step = max(1, _VALUES_AT_ONCE // embedding_dim)
        for start in range(0, num_rows, step):
            drawn = self._init.rows(
                seed=self._seed,
                table=self._table,
                first_row=first_row + start,
                num_rows=min(step, num_rows - start),
                embedding_dim=embedding_dim,
            )
            kept = torch.from_numpy(drawn)[:, first_column : first_column + num_columns]
            block_RD[start : start + step].copy_(kept)

    def __call__(self, weight_RD: torch.Tensor) -> None:
        """Fills a whole table, as TorchRec asks of an `init_fn` of an unsharded collection."""
        self.fill(weight_RD, first_row=0, first_column=0, embedding_dim=weight_RD.shape[1])
