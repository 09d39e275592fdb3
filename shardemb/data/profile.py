"""Which rows of the tables a data set looks up, and how often: an id histogram of each feature."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    """

    num_embeddings: int
    num_samples: int
    num_ids: int
    num_rows_touched: int
    block_rows: int
    block_counts: tuple[int, ...]
    hot_rows: Mapping[int, int] = field(default_factory=dict)

    @property
    def ids_per_sample(self) -> float:
        """The mean number of ids in a bag: the pooling factor."""
        return self.num_ids / self.num_samples if self.num_samples else 0.0

    def share(self, first_row: int, num_rows: int) -> float:
        """The part of all ids that fall in some rows; within a block, ids are taken as even.

        Args:
            first_row: The first of the rows.
            num_rows: Their number.

        Returns:
            Between 0 and 1.
        """
        end = first_row + num_rows
        count = float(sum(n for row, n in self.hot_rows.items() if first_row <= row < end))
        for block in range(first_row // self.block_rows, -(-end // self.block_rows)):
            low = block * self.block_rows
            high = min(low + self.block_rows, self.num_embeddings)
            inside = min(end, high) - max(first_row, low)
            count += self.block_counts[block] * max(0, inside) / (high - low)
        return count / self.num_ids if self.num_ids else 0.0


@dataclass(frozen=True, kw_only=True)
class DataProfile:
    """What a data set looks up.

    Attributes:
        source: The data that was counted, for people.
        features: By feature name.
    """

    source: str
    features: Mapping[str, FeatureProfile]
