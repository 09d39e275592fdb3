"""TorchRec's sharders of both kinds of collection, with every layout on every device."""

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder

from shardemb.layouts import LAYOUTS, DataParallel, Layout


class _AllLayouts:
    """What TorchRec's sharders offer only on CUDA: every layout, by fused kernels."""

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        """Names of the layouts; `layout_rules` says which of them a table may have."""
        return list(LAYOUTS)

    def compute_kernels(
        self,
        sharding_type: str,
        compute_device_type: str,  # noqa: ARG002
    ) -> list[str]:
        """Names of the kernels."""
        return [kernel_of(LAYOUTS[sharding_type]())]


class PooledSharder(_AllLayouts, EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder of an `EmbeddingBagCollection`."""


class SequenceSharder(_AllLayouts, EmbeddingCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder of an `EmbeddingCollection`."""


def make_sharders() -> list[ModuleSharder[nn.Module]]:
    """Sharders of both kinds of collection."""
    return [PooledSharder(), SequenceSharder()]


def kernel_of(layout: Layout) -> str:
    """TorchRec's name of the kernel that computes a layout."""
    return "dense" if isinstance(layout, DataParallel) else "fused"
