"""What a table is: its rows, features, optimizer and initial values. Not where it lies."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from shardemb.init import Init, Pretrained, Uniform
from shardemb.optim import RowWiseAdagrad, SparseOptimizer

MAX_NUM_EMBEDDINGS = 2**31 - 1  # FBGEMM holds row numbers of a table in 32 bits on some paths

BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a value of each dtype that rows may have."""
OutOfRange = Literal["raise", "drop", "clamp", "hash", "oov_row"]


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """One embedding table, with TorchRec's field names.

    Attributes:
        name: Name of the table, unique in a model; checkpoints and initial rows go by it.
        num_embeddings: Number of rows.
        embedding_dim: Number of columns; where FBGEMM's kernels serve, as on CUDA, a multiple of 4,
            as they read four values at a time.
        feature_names: Keys of the batch that look up here. Several features may share one table.
        pooling: How the rows of a bag are pooled: "sum" or "mean". An empty bag is a row of zeros.
        optimizer: How looked-up rows are updated.
        init: Initial values, drawn by `shardemb.init.Uniform`, `Normal` or `Constant`, or given by
            `Pretrained`; by default uniform within 1 / sqrt(num_embeddings), as in TorchRec.
        dtype: Of the rows: "float32", "float16" or "bfloat16", the last not by FBGEMM's kernels on
            CPU. Optimizer state and pooled features are float32 in any case.
        rounding: Of updated 16-bit rows. "stochastic" takes one of the two neighbours, with a
            probability by its distance, so that small updates count on average; which, is a pure
            function of table, row, column and step. "nearest" loses updates of less than about
            1/2000 of a float16 weight, 1/250 of a bfloat16 one.
        trainable: Whether rows are updated; if not, they stay bit for bit as they are.
        frozen_rows: So many of the first rows stay bit for bit as they are.
        padding_idx: A row that stays as it is, and that pooled bags leave out, as in
            `torch.nn.EmbeddingBag`: a mean is of the other rows. It starts as zeros unless it is
            given by `init.Pretrained`. Counted from the end where it is negative. Tables of one
            pooled collection that share a feature must agree.
        out_of_range: What becomes of ids that the table does not have, where the batch is made:
            "raise" refuses the batch, "drop" leaves them out, "clamp" takes the nearest row,
            "hash" spreads all ids of the feature over the rows by a stable hash, that of
            `shardemb.data.id_hash.hash_ids`, "oov_row" takes the last row, which is then for them
            alone. Tables that share a feature must agree, as they get the same ids.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> user = TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> user.weight_bytes
        256000
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: tuple[str, ...]
    pooling: Literal["sum", "mean"] = "sum"
    optimizer: SparseOptimizer = field(default_factory=lambda: RowWiseAdagrad(lr=0.01))
    init: Init | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    trainable: bool = True
    frozen_rows: int = 0
    padding_idx: int | None = None
    out_of_range: OutOfRange = "raise"

    def __post_init__(self) -> None:
        table = f"table {self.name!r}"
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"{table}: name must be a non-empty string without dots")
        for name, value in (
            ("num_embeddings", self.num_embeddings),
            ("embedding_dim", self.embedding_dim),
        ):
            if not _is_int(value) or value < 1:
                raise ValueError(f"{table}: {name} must be a positive integer, got {value!r}")
        if self.num_embeddings > MAX_NUM_EMBEDDINGS:
            raise ValueError(
                f"{table}: num_embeddings must be at most {MAX_NUM_EMBEDDINGS}, got "
                f"{self.num_embeddings}; hash the ids into fewer rows"
            )
        self._check_features(table)
        for name, chosen, allowed in (
            ("pooling", self.pooling, ("sum", "mean")),
            ("dtype", self.dtype, tuple(BYTES_OF)),
            ("rounding", self.rounding, ("stochastic", "nearest")),
            ("trainable", self.trainable, (True, False)),
            ("out_of_range", self.out_of_range, get_args(OutOfRange)),
        ):
            if chosen not in allowed:
                *others, last = map(repr, allowed)
                raise ValueError(
                    f"{table}: {name} must be {', '.join(others)} or {last}, got {chosen!r}"
                )
        if not isinstance(self.optimizer, SparseOptimizer):
            raise ValueError(
                f"{table}: optimizer must be one of shardemb.optim, such as "
                f"optim.RowWiseAdagrad(lr=0.01), got {self.optimizer!r}"
            )
        if self.init is not None and not isinstance(self.init, Init):
            raise ValueError(
                f"{table}: init must be one of shardemb.init, such as init.Normal(std=0.01), got "
                f"{self.init!r}"
            )
        if isinstance(self.init, Pretrained):
            self.init.check_fits(self.name, self.num_embeddings, self.embedding_dim)
        self._check_frozen_rows(table)
        self._check_padding(table)

    def _check_frozen_rows(self, table: str) -> None:
        frozen, rows = self.frozen_rows, self.num_embeddings
        if not _is_int(frozen) or not 0 <= frozen <= rows:
            raise ValueError(
                f"{table}: frozen_rows must be an integer in 0..{rows - 1}, got {frozen!r}"
            )
        if frozen == rows:
            raise ValueError(
                f"{table}: frozen_rows={frozen} are all its rows; say trainable=False instead"
            )

    def _check_padding(self, table: str) -> None:
        padding, rows = self.padding_idx, self.num_embeddings
        if padding is None:
            return
        if not _is_int(padding) or not -rows <= padding < rows:
            raise ValueError(
                f"{table}: padding_idx must be None or an integer in {-rows}..{rows - 1}, got "
                f"{padding!r}"
            )
        object.__setattr__(self, "padding_idx", padding % rows)
        if self.out_of_range == "oov_row" and self.padding_idx == rows - 1:
            raise ValueError(
                f"{table}: padding_idx={padding} is the row that out_of_range='oov_row' keeps for "
                "unknown ids, which would be left out and never trained; use another row for "
                "padding, or out_of_range='drop'"
            )
        if self.out_of_range == "hash":
            raise ValueError(
                f"{table}: out_of_range='hash' sends the id {padding} to some other row, and other "
                f"ids to the row padding_idx={padding}; leave padding out of the bags where the "
                "batch is made, or use another out_of_range"
            )

    def _check_features(self, table: str) -> None:
        if isinstance(self.feature_names, str):
            raise ValueError(
                f"{table}: feature_names must be a tuple of names, got the string "
                f"{self.feature_names!r}; use ({self.feature_names!r},)"
            )
        if isinstance(self.feature_names, Iterable):
            object.__setattr__(self, "feature_names", tuple(self.feature_names))
        if not self.feature_names or not all(isinstance(f, str) and f for f in self.feature_names):
            raise ValueError(
                f"{table}: feature_names must hold at least one name, got {self.feature_names!r}"
            )
        if len(set(self.feature_names)) != len(self.feature_names):
            raise ValueError(
                f"{table}: feature_names names a feature twice: {self.feature_names!r}"
            )

    @property
    def initial_values(self) -> Init:
        """`init`, or its default."""
        if self.init is not None:
            return self.init
        bound = 1.0 / math.sqrt(self.num_embeddings)
        return Uniform(low=-bound, high=bound)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole table's weights."""
        return BYTES_OF[self.dtype] * self.num_embeddings * self.embedding_dim


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_tables(tables: tuple[TableConfig, ...]) -> None:
    """Checks that tables can live in one collection.

    Args:
        tables: The tables.

    Raises:
        ValueError: There are none, or two have one name.
    """
    if not tables:
        raise ValueError("a collection needs at least one table, got none")
    names = [table.name for table in tables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"table {twice[0]!r} is declared twice; give each table a name of its own")
