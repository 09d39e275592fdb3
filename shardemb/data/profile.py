"""Which rows of the tables a data set looks up, and how often: an id histogram of each feature."""

# S ranges of rows, K blocks

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class FeatureProfile:
    """How a feature's ids spread over the rows of a table.

    Attributes:
        num_embeddings: Rows of the table that the ids were taken for.
        num_samples: Samples counted.
        num_ids: Ids counted.
        num_rows_touched: Rows that were looked up at least once.
        block_rows: Rows of each block of `block_counts`; the last block may have fewer.
        block_counts: Ids in each block of rows, without those of `hot_rows`.
        hot_rows: The rows that were looked up most, with the number of times.
        hottest_percent_share: The part of all ids that fall on the hottest 1 % of the table's rows
            (at least one row), between 0 and 1; None where it was not counted.

    Raises:
        ValueError: The numbers contradict each other.

    Example:
        >>> profile = FeatureProfile(
        ...     num_embeddings=6, num_samples=4, num_ids=8, num_rows_touched=4,
        ...     block_rows=4, block_counts=(2, 1), hot_rows={5: 5},
        ... )
        >>> profile.ids_per_sample, profile.share(0, 4), profile.shares([0, 2, 4, 6]).tolist()
        (2.0, 0.25, [0.125, 0.125, 0.75])
    """

    num_embeddings: int
    num_samples: int
    num_ids: int
    num_rows_touched: int
    block_rows: int
    block_counts: tuple[int, ...]
    hot_rows: Mapping[int, int] = field(default_factory=dict)
    hottest_percent_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        counts = (*self.block_counts, *self.hot_rows.values(), self.num_samples)
        if min(counts) < 0:
            raise ValueError(f"counts must not be negative, got {min(counts)}")
        num_blocks = -(-self.num_embeddings // self.block_rows)
        if len(self.block_counts) != num_blocks:
            raise ValueError(
                f"{self.num_embeddings} rows in blocks of {self.block_rows} need {num_blocks} "
                f"block_counts, got {len(self.block_counts)}"
            )
        for row in self.hot_rows:
            if not 0 <= row < self.num_embeddings:
                raise ValueError(f"hot row {row} is outside 0..{self.num_embeddings - 1}")
        counted = sum(self.block_counts) + sum(self.hot_rows.values())
        if counted != self.num_ids:
            raise ValueError(
                f"num_ids must be what block_counts and hot_rows add up to, {counted}, got "
                f"{self.num_ids}"
            )
        most = min(self.num_embeddings, self.num_ids)
        if not min(1, most) <= self.num_rows_touched <= most:
            raise ValueError(
                f"num_rows_touched must be in {min(1, most)}..{most}, the least of rows and ids, "
                f"got {self.num_rows_touched}"
            )
        share = self.hottest_percent_share
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"hottest_percent_share must be between 0 and 1, got {share}")

    @property
    def ids_per_sample(self) -> float:
        """The mean number of ids in a bag: the pooling factor."""
        return self.num_ids / self.num_samples if self.num_samples else 0.0

    @property
    def hottest_row_share(self) -> float:
        """The part of all ids that are the row that was looked up most; 0 if none is known."""
        return max(self.hot_rows.values(), default=0) / self.num_ids if self.num_ids else 0.0

    def share(self, first_row: int, num_rows: int) -> float:
        """The part of all ids that fall in some rows; within a block, ids are taken as even.

        Args:
            first_row: The first of the rows.
            num_rows: Their number.

        Returns:
            Between 0 and 1.
        """
        return float(self.shares([first_row, first_row + num_rows])[0])

    def shares(self, boundaries: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The `share` of each of S ranges of rows that follow one another, all at once.

        Args:
            boundaries: Integers [S + 1]: range s is rows boundaries[s] to boundaries[s + 1] - 1.
                Rows that the table does not have hold no ids.

        Returns:
            float64 [S].
        """
        counts = np.diff(self.ids_before(boundaries))
        shares: npt.NDArray[np.float64] = counts / max(1, self.num_ids)
        return shares

    def ids_before(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """How many of the counted ids lie before each of S rows.

        Args:
            rows: Integers [S].

        Returns:
            float64 [S]; within a block, ids are taken as even.
        """
        rows = np.asarray(rows)
        edges, before_edges, hot_rows, before_hot = self._sums
        counts: npt.NDArray[np.float64] = np.interp(rows, edges, before_edges)
        return counts + before_hot[np.searchsorted(hot_rows, rows)]

    @cached_property
    def _sums(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Edges of the blocks with the ids before each, hot rows with the ids of those before."""
        edges = np.arange(len(self.block_counts) + 1, dtype=np.int64) * self.block_rows
        edges[-1] = self.num_embeddings
        hot = sorted(self.hot_rows.items())
        hot_rows = np.array([row for row, _ in hot], dtype=np.int64)
        sums = (np.cumsum([0, *self.block_counts]), np.cumsum([0, *(count for _, count in hot)]))
        before_edges, before_hot = (sum_.astype(np.int64) for sum_ in sums)
        return edges, before_edges, hot_rows, before_hot


@dataclass(frozen=True, kw_only=True)
class DataProfile:
    """What a data set looks up.

    Attributes:
        source: The data that was counted, for people.
        features: By feature name.
    """

    source: str
    features: Mapping[str, FeatureProfile]
