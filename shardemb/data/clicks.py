"""A click log's rows as arrays, their ids, and the batch made of them. Reads no file."""

# B samples of a batch, N rows, I = 13 integers, F = 26 categories, D = 26 dense inputs

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from shardemb.data.id_hash import mix64

INTEGER_NAMES = tuple(f"I{number}" for number in range(1, 14))
CATEGORY_NAMES = tuple(f"C{number}" for number in range(1, 27))


@dataclass(frozen=True, kw_only=True, eq=False)
class CriteoRows:
    """Parsed rows. A row that is not valid is zero and missing everywhere.

    Attributes:
        labels_N: float32, 0 or 1.
        integers_NI: float32, sign(x) * log1p(|x|); 0 where missing.
        integer_missing_NI: bool.
        categories_NF: uint32; 0 where missing.
        category_missing_NF: bool.
        valid_N: bool.
        malformed: The rows that are not valid, in order: (row, reason).
    """

    labels_N: npt.NDArray[np.float32]
    integers_NI: npt.NDArray[np.float32]
    integer_missing_NI: npt.NDArray[np.bool_]
    categories_NF: npt.NDArray[np.uint32]
    category_missing_NF: npt.NDArray[np.bool_]
    valid_N: npt.NDArray[np.bool_]
    malformed: tuple[tuple[int, str], ...] = ()

    @classmethod
    def blank(cls, num_rows: int) -> Self:
        """Rows that are not valid, for padding and to be filled in.

        Args:
            num_rows: How many.

        Returns:
            Zero and missing everywhere.
        """
        integers, categories = (num_rows, len(INTEGER_NAMES)), (num_rows, len(CATEGORY_NAMES))
        return cls(
            labels_N=np.zeros(num_rows, dtype=np.float32),
            integers_NI=np.zeros(integers, dtype=np.float32),
            integer_missing_NI=np.ones(integers, dtype=np.bool_),
            categories_NF=np.zeros(categories, dtype=np.uint32),
            category_missing_NF=np.ones(categories, dtype=np.bool_),
            valid_N=np.zeros(num_rows, dtype=np.bool_),
        )

    def padded(self, num_rows: int) -> Self:
        """These rows, then rows that are not valid.

        Args:
            num_rows: Rows in all, at least as many as there are.

        Returns:
            `num_rows` rows. The padding is not among `malformed`.
        """
        if num_rows == len(self.labels_N):
            return self
        pad = self.blank(num_rows - len(self.labels_N))
        arrays = {
            name: np.concatenate([value, vars(pad)[name]])
            for name, value in vars(self).items()
            if name != "malformed"
        }
        return type(self)(malformed=self.malformed, **arrays)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClickBatch(Pipelineable):  # type: ignore[misc]  # torchrec has no types
    """One rank's part of a batch of impressions, as TorchRec's pipelines take it.

    Attributes:
        dense_BD: float32 [B, 26], 13 transformed integers, then 13 flags, 1 where one is missing.
        sparse: Keys `CATEGORY_NAMES` in order, one int64 id or an empty bag each.
        labels_B: float32, 0 or 1.
        weights_B: float32, 1, or 0 for a sample that is padding or malformed and must not count.
    """

    dense_BD: torch.Tensor
    sparse: KeyedJaggedTensor
    labels_B: torch.Tensor
    weights_B: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:  # noqa: FBT001, FBT002
        """Copies the batch to a device.

        Args:
            device: Where to.
            non_blocking: Whether to return before a copy from pinned memory ends.

        Returns:
            The batch there.
        """
        return type(self)(
            dense_BD=self.dense_BD.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels_B=self.labels_B.to(device, non_blocking=non_blocking),
            weights_B=self.weights_B.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory until what `stream` has queued so far is done.

        Args:
            stream: A stream that uses the batch.
        """
        for part in (self.dense_BD, self.sparse, self.labels_B, self.weights_B):
            part.record_stream(stream)

    def pin_memory(self) -> Self:
        """Copies the batch to pinned memory, from which copies to the GPU need not block.

        Returns:
            The pinned batch.
        """
        return type(self)(
            dense_BD=self.dense_BD.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels_B=self.labels_B.pin_memory(),
            weights_B=self.weights_B.pin_memory(),
        )


def hash_categories(
    categories_NF: npt.NDArray[np.uint32], num_embeddings_F: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Maps categories to rows of their tables, the same in every run and on every machine.

    The hash is the first output of SplitMix64 seeded with the category, modulo the number of rows:
    that of `hash_ids`.

    Args:
        categories_NF: uint32 [N, F].
        num_embeddings_F: Rows of each field's table, [F].

    Returns:
        int64 [N, F], each in [0, num_embeddings).

    Raises:
        ValueError: There is not one positive number of rows for each field.

    Example:
        >>> hash_categories(np.array([[0x68fd1e64]], dtype=np.uint32), [1000])
        array([[113]])
    """
    rows_F = np.asarray(num_embeddings_F)
    is_one_each = rows_F.shape == categories_NF.shape[1:] and rows_F.dtype.kind in "iu"
    if not is_one_each or (rows_F < 1).any():
        raise ValueError(
            f"num_embeddings_F must be {categories_NF.shape[1]} positive integers, one for each "
            f"field, got {num_embeddings_F!r}"
        )
    mixed_NF = mix64(categories_NF.astype(np.uint64))
    return (mixed_NF % rows_F.astype(np.uint64)).astype(np.int64)


def click_batch(rows: CriteoRows, num_embeddings_F: npt.ArrayLike) -> ClickBatch:
    """Makes a batch on the CPU of parsed rows. Rows that are not valid get weight 0 and no id.

    Args:
        rows: B rows.
        num_embeddings_F: Rows of each category's table, [26].

    Returns:
        The batch.
    """
    present_FN = ~rows.category_missing_NF.T
    ids_NF = hash_categories(rows.categories_NF, num_embeddings_F)
    dense_BD = np.concatenate([rows.integers_NI, rows.integer_missing_NI], axis=1)
    return ClickBatch(
        dense_BD=torch.from_numpy(dense_BD),
        sparse=KeyedJaggedTensor(
            keys=list(CATEGORY_NAMES),
            values=torch.from_numpy(ids_NF.T[present_FN]),
            lengths=torch.from_numpy(present_FN.astype(np.int64).ravel()),
            stride=len(rows.labels_N),
        ),
        labels_B=torch.from_numpy(rows.labels_N),
        weights_B=torch.from_numpy(rows.valid_N.astype(np.float32)),
    )
