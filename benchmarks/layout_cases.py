"""What `memory_and_bytes.py` runs: the same tables in every layout, and their batches."""

# N ids

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.layouts import Layout

WORLD_SIZE, NUM_NODES, BATCH_SIZE = 4, 2, 512


def _table(
    name: str,
    num_embeddings: int,
    optimizer: optim.SparseOptimizer,
    dtype: Literal["float32", "float16"] = "float32",
) -> se.TableConfig:
    return se.TableConfig(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=64,
        feature_names=(name,),
        optimizer=optimizer,
        dtype=dtype,
    )


TABLES = [
    _table("adagrad", 400_000, optim.Adagrad(lr=0.1)),
    _table("row_wise_adagrad", 800_000, optim.RowWiseAdagrad(lr=0.1)),
    _table("sgd", 800_000, optim.SGD(lr=0.1)),
    _table("sgd_float16", 1_600_000, optim.SGD(lr=0.1), "float16"),
]
"""Of about 200 MB each, with the state."""
NAMES = [table.name for table in TABLES]
IDS_PER_SAMPLE = dict(zip(NAMES, (1, 4, 10, 30), strict=True))
GRID = layouts.grid_shard([0, 1])
LAYOUTS: dict[str, Sequence[Layout]] = {
    "table_wise": [layouts.table_wise(rank) for rank in range(WORLD_SIZE)],
    "row_wise": [layouts.row_wise()] * 4,
    "column_wise": [layouts.column_wise(range(WORLD_SIZE))] * 4,
    "table_row_wise": [layouts.table_row_wise(node) for node in (0, 1, 0, 1)],
    "table_column_wise": [
        layouts.table_column_wise(ranks) for ranks in ([0, 1], [2, 3], [1, 0], [3, 2])
    ],
    "grid_shard": [GRID] * 4,
    "data_parallel and others": [
        layouts.data_parallel(),
        layouts.row_wise(),
        layouts.table_wise(1),
        layouts.row_wise(),
    ],
}
SEQUENCES = ("table_wise", "row_wise", "column_wise")


class Mean(nn.Module):
    """The collection and a loss."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """The loss."""
        found: Any = self.collection(batch)
        outputs = found.to_dict() if hasattr(found, "to_dict") else found
        rows = [out if isinstance(out, torch.Tensor) else out.values() for out in outputs.values()]
        return torch.stack([of.mean() for of in rows]).sum()


def draw(
    name: str, num_embeddings: int, generator: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """The bags of one batch: Poisson lengths, and low ids more often than high ones."""
    lengths = generator.poisson(IDS_PER_SAMPLE[name], BATCH_SIZE)
    ids = (num_embeddings * generator.random(lengths.sum()) ** 3).astype(np.int64)
    return np.split(ids, np.cumsum(lengths)[:-1])


def batch_of(tables: Sequence[se.TableConfig], seed: int) -> KeyedJaggedTensor:
    """One rank's batch."""
    generator = np.random.default_rng(seed)
    bags = {table.name: draw(table.name, table.num_embeddings, generator) for table in tables}
    return se.keyed_jagged_tensor(bags, tables)


def workload_of(tables: Sequence[se.TableConfig], num_batches: int = 64) -> se.Workload:
    """What other batches than those of the steps say of the data."""
    others = (batch_of(tables, seed=10**6 + number) for number in range(num_batches))
    profile = se.profile_batches(others, tables, source="other batches")
    return se.Workload(batch_size=BATCH_SIZE, profile=profile)
