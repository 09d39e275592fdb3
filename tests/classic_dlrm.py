"""A DLRM in plain torch, as one writes it with a list of embedding bags. Knows nothing of shardemb.

Naumov et al., arXiv 1906.00091, section 2: embeddings and dense features meet in dot products.
"""

# B samples, F tables and dense features together, D width

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Clicks(NamedTuple):
    """A batch. Each table has its own offsets [B] and ids [N]."""

    dense_BX: torch.Tensor
    offsets: list[torch.Tensor]
    ids: list[torch.Tensor]
    labels_B: torch.Tensor


class ClassicDLRM(nn.Module):
    """Its forward returns the loss, a mean over samples.

    Args:
        rows_of_tables: Number of rows of each table.
        width: Of all tables.
        num_dense: Number of dense features.
    """

    def __init__(self, rows_of_tables: list[int], width: int, num_dense: int) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(
            nn.EmbeddingBag(num_rows, width, mode="sum", sparse=True) for num_rows in rows_of_tables
        )
        num_vectors = len(rows_of_tables) + 1
        pairs = num_vectors * (num_vectors - 1) // 2
        self.bot_l = nn.Sequential(nn.Linear(num_dense, 16), nn.Tanh(), nn.Linear(16, width))
        self.top_l = nn.Sequential(nn.Linear(width + pairs, 16), nn.Tanh(), nn.Linear(16, 1))

    def apply_emb(self, offsets: list[torch.Tensor], ids: list[torch.Tensor]) -> list[torch.Tensor]:
        """Pooled rows of each table [B, D]."""
        return [
            table(ids_N, offsets_B)
            for table, ids_N, offsets_B in zip(self.emb_l, ids, offsets, strict=True)
        ]

    def interact(self, dense_BD: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
        """The dense vector, and the dot products of all pairs."""
        all_BFD = torch.stack([dense_BD, *pooled], dim=1)
        products_BFF = all_BFD @ all_BFD.transpose(1, 2)
        rows, columns = torch.tril_indices(all_BFD.shape[1], all_BFD.shape[1], offset=-1)
        return torch.cat([dense_BD, products_BFF[:, rows, columns]], dim=1)

    def forward(self, batch: Clicks) -> torch.Tensor:
        """The loss."""
        dense_BD = self.bot_l(batch.dense_BX)
        pooled = self.apply_emb(batch.offsets, batch.ids)
        logits_B = self.top_l(self.interact(dense_BD, pooled)).squeeze(1)
        return functional.binary_cross_entropy_with_logits(logits_B, batch.labels_B)


def clicks_of(
    step: int, samples: range, rows_of_tables: list[int], num_dense: int, dtype: torch.dtype
) -> Clicks:
    """Some samples of a global batch; each is drawn by itself."""
    dense, labels = [], []
    bags: list[list[torch.Tensor]] = [[] for _ in rows_of_tables]
    for sample in samples:
        generator = torch.Generator().manual_seed(1000 * step + sample)
        dense.append(torch.randn(num_dense, generator=generator))
        labels.append(float(torch.rand((), generator=generator) < 0.4))
        for table, num_rows in enumerate(rows_of_tables):
            length = int(torch.randint(0, 4, (), generator=generator))
            bags[table].append(torch.randint(0, num_rows, (length,), generator=generator))
    lengths = [torch.tensor([len(bag) for bag in of_table]) for of_table in bags]
    return Clicks(
        dense_BX=torch.stack(dense).to(dtype),
        offsets=[lengths_B.cumsum(0) - lengths_B for lengths_B in lengths],
        ids=[torch.cat(of_table) for of_table in bags],
        labels_B=torch.tensor(labels, dtype=dtype),
    )
