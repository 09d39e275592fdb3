"""Which tables of a sharded model are trained, and which parameters are tables."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule

from shardemb.modules.training import RowTraining

_TRAINED = "_shardemb_trained"


@dataclass(frozen=True, kw_only=True)
class TrainedTable:
    """A table that is to be updated, on whatever ranks it lies.

    Attributes:
        key: Of its weight in the model's state.
        training: How its rows are trained.
    """

    key: str
    training: RowTraining


def ids_of_table_parameters(model: nn.Module) -> set[int]:
    """The identities of a sharded model's parameters that are tables."""
    return {
        id(weight)
        for module in model.modules()
        if isinstance(module, ShardedEmbeddingModule)
        for weight in module.parameters()
    }


class Backwards:
    """The collections that backward passes reached since the last step, in their order.

    Their exchanges run in that order; where it differs between ranks, they meet each other's.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []

    def watch(self, path: str, output: torch.Tensor) -> None:
        """Notes when a gradient of a collection's output comes."""
        if output.requires_grad:
            output.register_hook(lambda _: self._note(path))

    def _note(self, path: str) -> None:
        if self.paths[-1:] != [path]:
            self.paths.append(path)


@dataclass(kw_only=True)
class TrainedModel:
    """What `build_optimizer` needs to know of a sharded model.

    Attributes:
        tables: Its trained tables, by name, as declared.
        backwards: What watches its backward passes.
        has_optimizer: Whether it was built one.
    """

    tables: Mapping[str, TrainedTable]
    backwards: Backwards
    has_optimizer: bool = False


def note_trained(model: nn.Module, trained: TrainedModel) -> None:
    """Notes on a sharded model what is trained of it."""
    setattr(model, _TRAINED, trained)


def noted_trained(model: nn.Module) -> TrainedModel | None:
    """What `shard_modules` noted; None of a model that is not sharded."""
    found: TrainedModel | None = getattr(model, _TRAINED, None)
    return found
