"""Counts the ids of a data set, row by row, and sums them up in a `DataProfile`."""

# N ids, R rows that were looked up

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from shardemb.config import MAX_NUM_EMBEDDINGS, TableConfig
from shardemb.data.batches import checked_tables, limits_of
from shardemb.data.id_guard import IdGuard
from shardemb.data.profile import DataProfile, FeatureProfile

NUM_BLOCKS = 4096
NUM_HOT_ROWS = 100
_BUFFER_IDS = 1 << 17


def profile_batches(
    batches: Iterable[KeyedJaggedTensor],
    tables: Sequence[TableConfig | BaseEmbeddingConfig],
    *,
    source: str = "batches",
) -> DataProfile:
    """Counts what batches look up.

    Memory grows with the rows that are looked up, not with the batches: 12 bytes for each, some
    times that while counts are added up, and half a MB for each feature.

    Args:
        batches: As many as are to be counted; an endless loader would be read for ever
            (`itertools.islice` ends it).
        tables: The tables that they look up.
        source: What the batches are of, for people.

    Returns:
        For each feature of the tables: the 100 hottest rows, exactly, and the others by at most
        4,096 blocks. A feature of two tables is counted for the smaller, whose rows bound its ids.

    Raises:
        ValueError: There is no batch, or one does not fit the tables, as the id guard says.

    Example:
        >>> import torch
        >>> table = TableConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=("x",))
        >>> batch = KeyedJaggedTensor(
        ...     keys=["x"], values=torch.tensor([3, 3, 8]), lengths=torch.tensor([2, 0, 1])
        ... )
        >>> profile_batches([batch], [table]).features["x"].hot_rows
        {3: 2, 8: 1}
    """
    tables = checked_tables(tables)
    guards = [IdGuard(limits_of(tables), is_weighted=weighted) for weighted in (False, True)]
    rows_of: dict[str, int] = {}
    for table in tables:
        for feature in table.feature_names:
            rows_of[feature] = min(table.num_embeddings, rows_of.get(feature, MAX_NUM_EMBEDDINGS))
    counter = ProfileCounter(rows_of)
    for batch in batches:
        guards[batch.weights_or_none() is not None].check(batch)
        counter.add(batch, int(batch.stride()))
    if not counter.num_samples:
        raise ValueError("a profile needs at least one sample, got none; give batches")
    return counter.profile(source)


class ProfileCounter:
    """Counts of batches so far.

    Args:
        rows_of: Rows of the table of each feature.
    """

    def __init__(self, rows_of: Mapping[str, int]) -> None:
        self._rows = {feature: _RowCounts(num_rows) for feature, num_rows in rows_of.items()}
        self.num_samples = 0
        """Samples counted."""

    def add(self, batch: KeyedJaggedTensor, num_samples: int) -> None:
        """Counts a batch, of which every id names a row.

        Args:
            batch: With every feature of `rows_of`.
            num_samples: Its samples, without those that only pad it and have no ids.
        """
        self.num_samples += num_samples
        keys, offsets = list(batch.keys()), batch.offset_per_key()
        ids_N = batch.values().cpu().numpy()
        for feature, rows in self._rows.items():
            at = keys.index(feature)
            rows.add(ids_N[offsets[at] : offsets[at + 1]])

    def profile(self, source: str) -> DataProfile:
        """The profile of all batches so far.

        Args:
            source: What they are of, for people.

        Returns:
            By feature.
        """
        return DataProfile(
            source=source,
            features={
                feature: rows.profile(self.num_samples) for feature, rows in self._rows.items()
            },
        )


class _RowCounts:
    """How often each row was looked up, for the rows that were."""

    def __init__(self, num_embeddings: int) -> None:
        self._num_embeddings = num_embeddings
        self._rows_R = np.empty(0, dtype=np.uint32)  # a table has less than 2**31 rows
        self._counts_R = np.empty(0, dtype=np.int64)
        self._waiting: list[npt.NDArray[np.uint32]] = []
        self._num_waiting = 0

    def add(self, ids_N: npt.NDArray[np.integer]) -> None:
        self._waiting.append(ids_N.astype(np.uint32))
        self._num_waiting += len(ids_N)
        if self._num_waiting >= max(_BUFFER_IDS, len(self._rows_R) // 4):
            self._merge()

    def _merge(self) -> None:
        """Adds up what waits: seldom enough that its cost for each id stays the same."""
        rows, counts = np.unique(
            np.concatenate([*self._waiting, self._rows_R[:0]]), return_counts=True
        )
        self._waiting, self._num_waiting = [], 0
        at = np.searchsorted(self._rows_R, rows)
        known = at < len(self._rows_R)
        known[known] = self._rows_R[at[known]] == rows[known]
        self._counts_R[at[known]] += counts[known]
        new = ~known
        self._rows_R = np.insert(self._rows_R, at[new], rows[new])
        self._counts_R = np.insert(self._counts_R, at[new], counts[new])

    def profile(self, num_samples: int) -> FeatureProfile:
        self._merge()
        rows_R, counts_R, num_rows = self._rows_R, self._counts_R, self._num_embeddings
        num_ids = int(counts_R.sum())
        hottest_first = np.lexsort((rows_R, -counts_R))
        hot = hottest_first[:NUM_HOT_ROWS]
        percent = hottest_first[: -(-num_rows // 100)]
        others_R = counts_R.copy()
        others_R[hot] = 0
        block_rows = -(-num_rows // NUM_BLOCKS)
        blocks = np.zeros(-(-num_rows // block_rows), dtype=np.int64)
        np.add.at(blocks, rows_R // block_rows, others_R)
        return FeatureProfile(
            num_embeddings=num_rows,
            num_samples=num_samples,
            num_ids=num_ids,
            num_rows_touched=len(rows_R),
            block_rows=block_rows,
            block_counts=tuple(blocks.tolist()),
            hot_rows=dict(zip(rows_R[hot].tolist(), counts_R[hot].tolist(), strict=True)),
            hottest_percent_share=float(counts_R[percent].sum() / num_ids) if num_ids else None,
        )
