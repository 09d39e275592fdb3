"""The compiled kernels for tensors: looks rows up, sorts ids, merges gradients, updates rows.

Results are the same on any number of threads and at any level of the machine's instructions. All
tensors are on the CPU and contiguous; callers see to it, as nothing here could tell otherwise.

A process that was forked after its parent had used several threads must use one, as with torch: the
OpenMP library waits there for threads that were not copied. DataLoader's workers do so.
"""

# R rows of a block, B bags of a feature, F features, N ids, D width, U distinct rows

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardemb.native.library import library, missing

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POOLINGS = {None: 0, "sum": 1, "mean": 2}
OPTIMIZERS = (
    "SGD",
    "LarsSGD",
    "Adagrad",
    "RowWiseAdagrad",
    "Adam",
    "AdamW",
    "PartialRowWiseAdam",
    "LAMB",
    "PartialRowWiseLAMB",
)
"""Names of the classes in `shardemb.optim`, by their numbers in training.h."""


class _Block(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("first_column", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("first_feature", ctypes.c_int32),
        ("num_features", ctypes.c_int32),
    )


class _Lookup(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("num_bags", ctypes.c_int64),
        ("id_bytes", ctypes.c_int32),
        ("offset_bytes", ctypes.c_int32),
        ("pooling", ctypes.c_int32),
        ("num_features", ctypes.c_int32),
    )


class Training(ctypes.Structure):
    """How a block is trained, and its optimizer's state; the fields of training.h."""

    _fields_ = (
        ("momentum", ctypes.c_void_p),
        ("square", ctypes.c_void_p),
        ("lr", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("momentum_factor", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eta", ctypes.c_double),
        ("max_gradient", ctypes.c_double),
        ("correction1", ctypes.c_double),
        ("correction2", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("embedding_dim", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("first_column", ctypes.c_int64),
        ("frozen_rows", ctypes.c_int64),
        ("padding_row", ctypes.c_int64),
        ("num_updates", ctypes.c_int64),
        ("key", ctypes.c_int64),
        ("optimizer", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
    )


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a table, and the features that look up in it.

    Attributes:
        weight_RD: Its rows, float32, float16 or bfloat16 [R, D], of less than 2**32 rows.
        first_feature: Number of its first feature.
        num_features: How many follow one another.
        first_column: Where its first feature's columns begin in a pooled output.
    """

    weight_RD: Tensor
    first_feature: int
    num_features: int
    first_column: int


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Bags of ids, feature after feature, each feature with as many.

    Attributes:
        ids_N: Local rows, int32 or int64 [N].
        offsets: Where the bags begin and the last ends, int32 or int64 [F * B + 1].
        weights_N: Weights of the ids, float32 [N], if they have some.
        num_features: F.
        pooling: "sum" or "mean"; None where each id has an output of its own.
    """

    ids_N: Tensor
    offsets: Tensor
    weights_N: Tensor | None
    num_features: int
    pooling: str | None

    @property
    def num_bags(self) -> int:
        """Bags of each feature, B."""
        return (len(self.offsets) - 1) // self.num_features

    def with_output(self, output: Tensor) -> _Lookup:
        """What C takes, with the output or its gradient."""
        return _Lookup(
            ids=self.ids_N.data_ptr(),
            offsets=self.offsets.data_ptr(),
            weights=None if self.weights_N is None else self.weights_N.data_ptr(),
            output=output.data_ptr(),
            stride=output.shape[1],
            num_bags=self.num_bags,
            id_bytes=self.ids_N.element_size(),
            offset_bytes=self.offsets.element_size(),
            pooling=_POOLINGS[self.pooling],
            num_features=self.num_features,
        )


class Blocks:
    """The blocks of a kernel, in the order of their features; the kernels work on them.

    Args:
        blocks: At least one. Their rows must stay where they are in memory.

    Raises:
        RuntimeError: There is no compiled code.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError(missing())
        self._c, self._blocks = loaded, list(blocks)
        self.num_features = sum(block.num_features for block in blocks)
        self.width = sum(block.weight_RD.shape[1] * block.num_features for block in blocks)
        self._array = (_Block * len(blocks))(*map(_block_of, blocks))
        self._largest = ctypes.c_float()

    @property
    def largest(self) -> float:
        """Largest magnitude in the last output; not finite where any value was not."""
        return self._largest.value

    def look_up(self, bags: Bags) -> Tensor:
        """Looks rows up.

        Args:
            bags: Of all features.

        Returns:
            Float32, pooled [B, sum of the features' widths], else [N, D].

        Raises:
            IndexError: A block does not have a row.
        """
        if bags.pooling is None:
            shape = len(bags.ids_N), self._blocks[0].weight_RD.shape[1]
        else:
            shape = bags.num_bags, self.width
        output = torch.empty(shape)
        lookup = bags.with_output(output)
        bad = self._c.se_look_up(
            self._array,
            len(self._blocks),
            ctypes.byref(lookup),
            ctypes.byref(self._largest),
            torch.get_num_threads(),
        )
        if bad >= 0:
            raise IndexError(f"id {int(bags.ids_N[bad])} is not one of the block's rows")
        return output

    def weigh(self, bags: Bags, grad: Tensor) -> Tensor:
        """The gradient of the weights of summed ids.

        Args:
            bags: With weights, and pooling "sum"; of ids that `look_up` found to be rows.
            grad: Of the output, float32 [B, sum of the features' widths].

        Returns:
            Float32 [N].
        """
        grad_N = torch.zeros(len(bags.ids_N))
        self._c.se_weigh(
            self._array,
            len(self._blocks),
            ctypes.byref(bags.with_output(grad)),
            ctypes.c_void_p(grad_N.data_ptr()),
            torch.get_num_threads(),
        )
        return grad_N


def _block_of(block: Block) -> _Block:
    num_rows, width = block.weight_RD.shape
    return _Block(
        weight=block.weight_RD.data_ptr(),
        num_rows=num_rows,
        first_column=block.first_column,
        width=width,
        dtype=_DTYPES[block.weight_RD.dtype],
        first_feature=block.first_feature,
        num_features=block.num_features,
    )


def largest(values: Tensor) -> float:
    """The largest magnitude of float32 values; infinity where one is not finite."""
    loaded = library()
    assert loaded is not None
    found: float = loaded.se_largest(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int64(values.numel()),
        torch.get_num_threads(),
    )
    return found


class Merged:
    """The ids of a step sorted by row; made once, read by what follows.

    Args:
        blocks: Those that are to be updated.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._c = blocks, blocks._c
        self._sorted = ctypes.c_void_p(self._c.se_sorted_new())
        self._kept: list[Any] = []

    def __del__(self) -> None:
        self._c.se_sorted_free(self._sorted)

    def sort(self, lookups: Sequence[tuple[Bags, Tensor]]) -> None:
        """Sorts the ids of some lookups.

        Args:
            lookups: Each with the gradient of its output; they and the ids must stay as they are
                as long as the rest is asked for. Of ids that `look_up` found to be rows, which is
                not checked again; pooled alike, and all or none with weights.

        Raises:
            MemoryError: There is not enough, or some block has more than 2**32 ids.
        """
        self._kept = list(lookups)
        array = (_Lookup * len(lookups))(*(bags.with_output(grad) for bags, grad in lookups))
        self._kept.append(array)
        self._check(
            self._c.se_sort(
                self._sorted,
                self._blocks._array,
                len(self._blocks._blocks),
                array,
                len(lookups),
                torch.get_num_threads(),
            )
        )

    def squares(self) -> list[float]:
        """Of each block, the sum over its rows of the squares of their summed gradients."""
        squares = (ctypes.c_double * len(self._blocks._blocks))()
        self._check(
            self._c.se_squares(self._sorted, self._blocks._array, squares, torch.get_num_threads())
        )
        return list(squares)

    def update(
        self, trainings: Sequence[Training] | ctypes.Array[Training], *, dry: bool = False
    ) -> list[int]:
        """Updates the rows.

        Args:
            trainings: How each block is trained.
            dry: Whether nothing is to be written.

        Returns:
            Of each block the first row that would have become something not finite, and was left
            as it was; -1 where there is none.
        """
        bad_rows = (ctypes.c_int64 * len(self._blocks._blocks))()
        if not isinstance(trainings, ctypes.Array):
            trainings = (Training * len(trainings))(*trainings)
        self._check(
            self._c.se_update(
                self._sorted,
                self._blocks._array,
                trainings,
                int(dry),
                bad_rows,
                torch.get_num_threads(),
            )
        )
        return list(bad_rows)

    def rows(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """A block's rows with the sums of their gradients.

        Args:
            block: Its number.

        Returns:
            Rows, each once, ascending, int64 [U]; their gradients, float32 [U, D]; and how many
            ids looked each up, int64 [U].
        """
        counts = (ctypes.c_int64 * len(self._blocks._blocks))()
        self._check(self._c.se_count_rows(self._sorted, counts, torch.get_num_threads()))
        rows_U = torch.empty(counts[block], dtype=torch.int64)
        counts_U = torch.empty_like(rows_U)
        grad_UD = torch.empty(len(rows_U), self._blocks._blocks[block].weight_RD.shape[1])
        self._check(
            self._c.se_merge(
                self._sorted,
                self._blocks._array,
                block,
                *(ctypes.c_void_p(of.data_ptr()) for of in (rows_U, counts_U, grad_UD)),
                torch.get_num_threads(),
            )
        )
        return rows_U, grad_UD, counts_U

    @staticmethod
    def _check(failed: int) -> None:
        if failed:
            raise MemoryError("the ids of a step do not fit into memory, or are more than 2**32")
