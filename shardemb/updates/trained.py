"""Which tables of a sharded model are trained, and which parameters are tables."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule

from shardemb.modules.training import RowTraining

_TABLES = "_shardemb_tables"
_HAS_OPTIMIZER = "_shardemb_has_optimizer"
_BACKWARDS = "_shardemb_backwards"


@dataclass(frozen=True, kw_only=True)
class TrainedTable:
    """A table that is to be updated, on whatever ranks it lies.

    Attributes:
        key: Of its weight in the model's state.
        training: How its rows are trained.
    """

    key: str
    training: RowTraining


def note_tables(model: nn.Module, tables: Mapping[str, TrainedTable]) -> None:
    """Notes the trained tables of a sharded model, as declared."""
    setattr(model, _TABLES, dict(tables))


def noted_tables(model: nn.Module) -> dict[str, TrainedTable] | None:
    """The trained tables of a model of `shard_modules`; None for another."""
    found: dict[str, TrainedTable] | None = getattr(model, _TABLES, None)
    return found


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


def note_backwards(model: nn.Module, backwards: Backwards) -> None:
    """Notes what watches the backward passes of a sharded model."""
    setattr(model, _BACKWARDS, backwards)


def noted_backwards(model: nn.Module) -> Backwards:
    """What was noted."""
    found: Backwards = getattr(model, _BACKWARDS)
    return found


def note_optimizer(model: nn.Module) -> None:
    """Notes that a sharded model has its optimizer."""
    setattr(model, _HAS_OPTIMIZER, True)


def has_optimizer(model: nn.Module) -> bool:
    """Whether that was noted."""
    return getattr(model, _HAS_OPTIMIZER, False)
