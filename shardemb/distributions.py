"""Random and constant initial values of a table's rows: a function of (seed, table name, row).

Never of a rank or a layout.
Random bits come from NumPy's counter-based Philox4x64-10 (Salmon et al., SC 2011). The key is the
seed and a hash of the table's name; the counter is the row. So any rank draws any rows of any table
without drawing others.
"""

# R rows, D embedding_dim, C columns asked for

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_WORDS_PER_BLOCK = 8  # a counter value yields 256 bits: eight of 32


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform in [low, high), in steps of (high - low) / 2^24.

    Example:
        >>> init = Uniform(low=-0.1, high=0.1)
        >>> init.rows(seed=0, table="user", first_row=0, num_rows=2, embedding_dim=4).shape
        (2, 4)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Uniform: low must be less than high, got {self.low} and {self.high}")

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
        words_RD = _random_words(seed, table, first_row, num_rows, embedding_dim)
        unit_RD = (words_RD >> np.uint32(8)).astype(np.float32)
        unit_RD *= np.float32((self.high - self.low) / 2**24)
        unit_RD += np.float32(self.low)
        below_high = np.nextafter(np.float32(self.high), np.float32(-np.inf))
        np.minimum(unit_RD, below_high, out=unit_RD)  # the sum may round up to high
        return unit_RD[:, columns]


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Normal with mean 0, by Box and Muller's transform (Ann. Math. Stat. 29, 1958) in float64.

    Machines may differ in the last bit, where their log, sin or cos do.

    Example:
        >>> init = Normal(std=0.01)
        >>> init.rows(seed=0, table="user", first_row=7, num_rows=1, embedding_dim=4).shape
        (1, 4)
    """

    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"Normal: std must be a positive number, got {self.std}")

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
        words_RD = _random_words(
            seed, table, first_row, num_rows, embedding_dim + embedding_dim % 2
        )
        radius = np.sqrt(-2.0 * np.log((words_RD[:, 0::2] + 1.0) / 2**32))
        angle = words_RD[:, 1::2] * (2.0 * np.pi / 2**32)
        normal_RD = np.empty(words_RD.shape, np.float64)
        np.multiply(radius, np.cos(angle), out=normal_RD[:, 0::2])
        np.multiply(radius, np.sin(angle), out=normal_RD[:, 1::2])
        return (self.std * normal_RD[:, :embedding_dim][:, columns]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same value everywhere.

    Example:
        >>> init = Constant(value=0.5)
        >>> init.rows(seed=0, table="user", first_row=0, num_rows=1, embedding_dim=4)
        array([[0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"Constant: value must be finite, got {self.value}")

    def rows(
        self,
        *,
        seed: int,  # noqa: ARG002 - of no account here
        table: str,  # noqa: ARG002
        first_row: int,  # noqa: ARG002
        num_rows: int,
        embedding_dim: int,
        columns: slice = slice(None),
    ) -> npt.NDArray[np.float32]:
        """Rows of a table, float32 [R, C]."""
        return np.full((num_rows, embedding_dim), self.value, np.float32)[:, columns]


Distribution = Uniform | Normal | Constant


def _random_words(
    seed: int, table: str, first_row: int, num_rows: int, embedding_dim: int
) -> npt.NDArray[np.uint32]:
    """Random bits, uint32 [R, D]; row r is the same whatever rows are drawn with it."""
    name_hash = int.from_bytes(hashlib.blake2b(table.encode(), digest_size=8).digest(), "little")
    blocks_per_row = -(-embedding_dim // _WORDS_PER_BLOCK)
    bits = np.random.Philox(
        key=((seed % 2**64) << 64) | name_hash, counter=first_row * blocks_per_row
    )
    words = bits.random_raw(num_rows * blocks_per_row * _WORDS_PER_BLOCK // 2).view(np.uint32)
    return words.reshape(num_rows, -1)[:, :embedding_dim]
