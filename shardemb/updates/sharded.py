"""TorchRec's sharded collections, with our kernels in the place of FBGEMM's."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import (
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding import (
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.dp_sharding import BaseDpEmbeddingSharding
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from shardemb.updates.install import Trained, install_fbgemm
from shardemb.updates.kernel import RowKernel
from shardemb.updates.native_lookups import NativePooledLookup, NativeSequenceLookup
from shardemb.updates.weight_gradients import WeightGradients


class _WithRowKernels:
    """A sharded collection that puts our kernels around FBGEMM's, or in their place.

    Its replicated tables are not in a DistributedDataParallel, which averages gradients in every
    backward pass, and wrongly where there are two after a forward; `merge_replicated` does so once,
    in `step`.

    Args:
        trained: By the names of tables; the others are frozen.
        native: Whether our own kernels are in the place of FBGEMM's.
        options: What TorchRec's class takes.
    """

    native_lookup: ClassVar[type[nn.Module]]

    def __init__(self, *, trained: Mapping[str, Trained], native: bool, **options: Any) -> None:
        # before the rest: TorchRec makes its lookups as it is made
        self._trained, self._native = trained, native
        super().__init__(**options)
        self._lookups: list[nn.Module] = [
            lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
            for lookup in self._lookups
        ]

    def _create_lookups(self) -> None:
        """Makes the lookups, as TorchRec asks for it."""
        if self._native:
            self._lookups = [self._native_lookup(sharding) for sharding in self._shardings()]
        else:
            super()._create_lookups()  # type: ignore[misc]
        self._row_kernels = []
        for lookup in self._lookups:
            modules: Any = lookup._emb_modules
            kernels = [
                kernel
                for kernel in modules
                if isinstance(kernel, (BatchedFusedEmbeddingBag, BatchedFusedEmbedding))
            ]
            for kernel in kernels if not self._native else ():
                install_fbgemm(kernel, self._trained)
            self._row_kernels.append([kernel.emb_module for kernel in kernels])

    def _shardings(self) -> Iterable[Any]:
        """TorchRec's shardings, one for each layout of its tables."""
        raise NotImplementedError

    def _native_lookup(self, sharding: Any) -> nn.Module:
        if isinstance(sharding, BaseDpEmbeddingSharding):
            return sharding.create_lookup()  # type: ignore[no-any-return]
        return type(self).native_lookup(sharding, self._trained)

    def compute_and_output_dist(self, ctx: Any, input: Any) -> Any:
        """Looks up, as TorchRec asks for it; the kernels learn whose samples they look up."""
        shardings = getattr(self, "_embedding_shardings", None)  # of pooled collections
        for number, kernels in enumerate(self._row_kernels):
            nodes = getattr(shardings[number], "_cross_pg", None) if shardings else None
            sizes = ctx.sharding_contexts[number].batch_size_per_rank
            ranks = ranks_in_output(len(sizes), num_nodes=nodes.size() if nodes else 1)
            for kernel in kernels:
                kernel.batches = [(rank, sizes[rank]) for rank in ranks]
        return super().compute_and_output_dist(ctx, input)  # type: ignore[misc]


def ranks_in_output(world_size: int, *, num_nodes: int) -> list[int]:
    """The ranks in the order in which a shard's output has their samples.

    Args:
        world_size: Number of ranks.
        num_nodes: Over how many nodes the exchange goes in two steps; 1 where it is one.

    Returns:
        All ranks, by local rank and then by node.

    Example:
        >>> ranks_in_output(4, num_nodes=2), ranks_in_output(4, num_nodes=1)
        ([0, 2, 1, 3], [0, 1, 2, 3])
    """
    num_local = world_size // num_nodes
    return [rank for local in range(num_local) for rank in range(local, world_size, num_local)]


class PooledCollection(_WithRowKernels, ShardedEmbeddingBagCollection):  # type: ignore[misc]
    """TorchRec's sharded `EmbeddingBagCollection`."""

    native_lookup = NativePooledLookup

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._weight_gradients: WeightGradients | None = None
        if self._native and self._is_weighted:
            sent = not all(isinstance(one, BaseDpEmbeddingSharding) for one in self._shardings())
            group = self._env.process_group if sent and self._env.world_size > 1 else None
            self._weight_gradients = WeightGradients(group)

    @property
    def weights_learn(self) -> bool:
        """Whether weights of ids get gradients."""
        return self._weight_gradients is not None and bool(self._weight_gradients.wanted)

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """Sends ids to where they are looked up, as TorchRec asks for it."""
        if self._weight_gradients is not None:
            features = self._weight_gradients.send(ctx, features)
        return super().input_dist(ctx, features)

    def compute_and_output_dist(self, ctx: Any, input: Any) -> Any:
        """Looks up, as TorchRec asks for it."""
        if self._weight_gradients is not None:
            self._weight_gradients.receive(ctx, input)
        return super().compute_and_output_dist(ctx, input)

    def _shardings(self) -> Iterable[Any]:
        return self._embedding_shardings  # type: ignore[no-any-return]


class SequenceCollection(_WithRowKernels, ShardedEmbeddingCollection):  # type: ignore[misc]
    """TorchRec's sharded `EmbeddingCollection`."""

    native_lookup = NativeSequenceLookup

    def _shardings(self) -> Iterable[Any]:
        return self._sharding_type_to_sharding.values()  # type: ignore[no-any-return]


class _Sharder:
    """Makes our sharded collections of TorchRec's.

    Args:
        trained: By the names of tables; the others are frozen.
        native: Whether our own kernels are in the place of FBGEMM's.
    """

    sharded: ClassVar[type[_WithRowKernels]]

    def __init__(self, trained: Mapping[str, Trained], *, native: bool) -> None:
        super().__init__()
        self._trained, self._native = trained, native

    def shard(
        self,
        module: nn.Module,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        """Shards a collection, as TorchRec asks for it."""
        return self.sharded(
            trained=self._trained,
            native=self._native,
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,  # type: ignore[attr-defined]
            device=device,
            module_fqn=module_fqn,
        )  # type: ignore[return-value]


class PooledRowSharder(_Sharder, EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder of an `EmbeddingBagCollection`."""

    sharded = PooledCollection


class SequenceRowSharder(_Sharder, EmbeddingCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder of an `EmbeddingCollection`."""

    sharded = SequenceCollection


def row_kernels(model: nn.Module) -> list[RowKernel]:
    """The kernels of a sharded model, in the order of its modules."""
    return [
        kernel
        for module in model.modules()
        if isinstance(module, _WithRowKernels)
        for kernels in module._row_kernels
        for kernel in kernels
    ]
