"""Which tables of a sharded model are trained, and which parameters are tables."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule

from shardemb.modules.training import RowTraining

_TABLES = "_shardemb_tables"


@dataclass(frozen=True, kw_only=True)
class TrainedTable:
    """A table that is to be updated, on whatever ranks it lies.

    Attributes:
        name: Its name.
        key: Of its weight in the model's state.
        training: How its rows are trained.
    """

    name: str
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
