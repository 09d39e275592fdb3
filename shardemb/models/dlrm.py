"""DLRM: dense and pooled sparse features meet in dot products. Knows nothing of ranks or shards."""

# B batch, I dense features, F sparse features, D embedding_dim, P pairs of features

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor, KeyedTensor

from shardemb.data.clicks import ClickBatch


class DLRM(nn.Module):
    """The deep learning recommendation model of Naumov et al. 2019 (arXiv 1906.00091, section 2).

    Args:
        collection: Maps a `KeyedJaggedTensor` to a `KeyedTensor` whose features all have
            `embedding_dim` columns.
        feature_names: The sparse features, in the order in which the model is to see them. It is
            named here, as a sharded collection returns them in an order that depends on the layout.
        embedding_dim: Columns of each feature.
        num_dense: Number of dense features.
        bottom: Widths of the hidden layers over the dense features.
        top: Widths of the hidden layers over the interactions.
    """

    def __init__(
        self,
        collection: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        self._feature_names = list(feature_names)
        self.collection = collection
        self.bottom = _mlp([num_dense, *bottom, embedding_dim])
        num_vectors = len(self._feature_names) + 1
        row_P, column_P = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("_pairs_P", row_P * num_vectors + column_P, persistent=False)
        self.top = nn.Sequential(_mlp([embedding_dim + len(row_P), *top]), nn.Linear(top[-1], 1))

    def forward(self, dense_BI: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
        """Scores samples.

        Args:
            dense_BI: float32 [B, num_dense].
            sparse: Ids of B samples.

        Returns:
            Logits, float32 [B].
        """
        bottom_BD = self.bottom(dense_BI)
        (pooled_BFD,) = KeyedTensor.regroup([self.collection(sparse)], [self._feature_names])
        vectors_BVD = torch.cat([bottom_BD, pooled_BFD], 1).unflatten(1, (-1, bottom_BD.shape[1]))
        dots_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
        pairs_BP = dots_BVV.flatten(1).index_select(1, cast("torch.Tensor", self._pairs_P))
        logits_B1: torch.Tensor = self.top(torch.cat([bottom_BD, pairs_BP], 1))
        return logits_B1.squeeze(1)


class ClickModel(nn.Module):
    """Adds the loss of a click log to a model of (dense, sparse) -> logits.

    Args:
        model: Such a model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ClickBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the logits of a batch.

        Args:
            batch: B samples with their weights.

        Returns:
            The weighted binary cross-entropy, summed and divided by B, and the logits, float32 [B].
            By B and not by the sum of weights, so that the mean over ranks is that of the global
            batch wherever the weights lie.
        """
        logits_B = self.model(batch.dense_BD, batch.sparse)
        loss = functional.binary_cross_entropy_with_logits(
            logits_B, batch.labels_B, weight=batch.weights_B, reduction="sum"
        )
        return loss / len(logits_B), logits_B


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(widths):
        layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
    return nn.Sequential(*layers)
