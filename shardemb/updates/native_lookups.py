"""TorchRec's lookups with our own kernel in the place where it puts FBGEMM's, or its Triton one."""

from collections.abc import Mapping
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbedding,
    BaseBatchedEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding_lookup import (
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.grid_sharding import BaseGridEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import BaseRwEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import BaseTwRwEmbeddingSharding
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import data_type_to_dtype, data_type_to_sparse_type

from shardemb.huge_pages import zeros_huge
from shardemb.updates.install import Trained, install_native
from shardemb.updates.weight_gradients import tied

_LINE_BYTES = 64


class HeldRows(nn.Module):
    """The rows of a kernel's tables in one piece of memory, with what TorchRec asks FBGEMM's for.

    Args:
        config: Of the kernel.
    """

    def __init__(self, config: GroupedEmbeddingConfig) -> None:
        super().__init__()
        dtype = data_type_to_dtype(config.data_type)
        shapes = [(table.local_rows, table.local_cols) for table in config.embedding_tables]
        self.weights_precision = data_type_to_sparse_type(config.data_type)
        self.embedding_specs = [
            (*shape, EmbeddingLocation.HOST, ComputeDevice.CPU) for shape in shapes
        ]
        self.weights_physical_offsets = []
        names = [table.name for table in config.embedding_tables]
        end, line = 0, _LINE_BYTES // dtype.itemsize
        for number, (rows, width) in enumerate(shapes):
            if number == 0 or names[number] != names[number - 1]:  # slices follow one another
                end = -(-end // line) * line
            self.weights_physical_offsets.append(end)
            end += rows * width
        self.weights_host = nn.Parameter(zeros_huge([end], dtype))
        self._weights = [
            self.weights_host.detach()[first : first + rows * width].view(rows, width)
            for first, (rows, width) in zip(self.weights_physical_offsets, shapes, strict=True)
        ]

    def split_embedding_weights(self) -> list[torch.Tensor]:
        """The rows of each table."""
        return self._weights

    def get_learning_rate(self) -> float:
        """Of none: the optimizer of `build_optimizer` knows those of the tables."""
        return 0.0

    def set_learning_rate(self, lr: float) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing: there is no cache."""

    def reset_cache_states(self) -> None:
        """Does nothing: there is no cache."""


class NativeEmbeddingBag(BatchedFusedEmbeddingBag):  # type: ignore[misc]
    """TorchRec's kernel of pooled tables."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        trained: Mapping[str, Trained],
        *,
        lookup: "NativePooledLookup",
    ) -> None:
        BaseBatchedEmbeddingBag.__init__(
            self, config, lookup.pg, torch.device("cpu"), lookup.sharding_type
        )
        install_native(self, HeldRows(config), trained)

    def forward(self, features: KeyedJaggedTensor, *_: Any) -> torch.Tensor:
        """Looks rows up."""
        weights_N = features.weights_or_none()
        output: torch.Tensor = self._emb_module(features.values(), features.offsets(), weights_N)
        return output


class NativeEmbedding(BatchedFusedEmbedding):  # type: ignore[misc]
    """TorchRec's kernel of tables that are looked up id by id."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        trained: Mapping[str, Trained],
        *,
        lookup: "NativeSequenceLookup",
    ) -> None:
        BaseBatchedEmbedding.__init__(self, config, lookup.pg, torch.device("cpu"))
        install_native(self, HeldRows(config), trained)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Looks rows up."""
        output: torch.Tensor = self._emb_module(features.values(), features.offsets(), None)
        return output


class _NativeLookup:
    """One of TorchRec's lookups, which makes our kernels.

    Args:
        sharding: TorchRec's sharding, on this rank.
        trained: By the names of tables; the others are frozen.
    """

    def __init__(self, sharding: Any, trained: Mapping[str, Trained]) -> None:
        self.pg = sharding._pg
        self.sharding_type = _sharding_type(sharding)
        self._trained = trained  # before the rest: TorchRec makes its kernels as it is made
        super().__init__(  # type: ignore[call-arg]
            grouped_configs=sharding._grouped_embedding_configs_per_rank[sharding._rank],
            pg=self.pg,
            device=torch.device("cpu"),
        )


class NativePooledLookup(_NativeLookup, GroupedPooledEmbeddingsLookup):  # type: ignore[misc]
    """TorchRec's lookup of pooled tables."""

    def _create_embedding_kernel(self, config: GroupedEmbeddingConfig, *_: Any) -> nn.Module:
        return NativeEmbeddingBag(config, self._trained, lookup=self)

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Looks rows up."""
        weights_M = sparse_features.weights_or_none()
        output: torch.Tensor = super().forward(sparse_features)
        if weights_M is not None and weights_M.requires_grad:
            return tied(output, weights_M)
        return output


class NativeSequenceLookup(_NativeLookup, GroupedEmbeddingsLookup):  # type: ignore[misc]
    """TorchRec's lookup of tables that are looked up id by id."""

    def _create_embedding_kernel(self, config: GroupedEmbeddingConfig, *_: Any) -> nn.Module:
        return NativeEmbedding(config, self._trained, lookup=self)


def _sharding_type(sharding: Any) -> ShardingType | None:
    """What TorchRec's shardings tell kernels: of rows of several shards a bag's sum is wanted."""
    if isinstance(sharding, BaseRwEmbeddingSharding):
        return ShardingType.ROW_WISE
    if isinstance(sharding, (BaseTwRwEmbeddingSharding, BaseGridEmbeddingSharding)):
        return ShardingType.TABLE_ROW_WISE
    return None
