"""Sharded embedding tables on TorchRec: the same script on a laptop and on a cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardemb.checkpoint import latest_checkpoint as latest_checkpoint
    from shardemb.checkpoint import load_checkpoint as load_checkpoint
    from shardemb.checkpoint import save_checkpoint as save_checkpoint
    from shardemb.cluster import Cluster as Cluster
    from shardemb.collectives import CollectiveCounter as CollectiveCounter
    from shardemb.config import TableConfig as TableConfig
    from shardemb.constraints import Constraints as Constraints
    from shardemb.data.bag_forms import Offsets as Offsets
    from shardemb.data.batches import Batcher as Batcher
    from shardemb.data.batches import keyed_jagged_tensor as keyed_jagged_tensor
    from shardemb.data.profile import DataProfile as DataProfile
    from shardemb.data.profile_counter import profile_batches as profile_batches
    from shardemb.data.profile_file import load_profile as load_profile
    from shardemb.data.profile_file import save_profile as save_profile
    from shardemb.env import Env as Env
    from shardemb.env import init_distributed as init_distributed
    from shardemb.health import HealthReport as HealthReport
    from shardemb.health import TableHealth as TableHealth
    from shardemb.health import TrainingHealth as TrainingHealth
    from shardemb.modules.embedding import EmbeddingCollection as EmbeddingCollection
    from shardemb.modules.embedding_bag import EmbeddingBagCollection as EmbeddingBagCollection
    from shardemb.modules.from_torch import from_torch as from_torch
    from shardemb.optimizer_builder import build_optimizer as build_optimizer
    from shardemb.pipeline import TrainPipeline as TrainPipeline
    from shardemb.placement import ShardingPlan as ShardingPlan
    from shardemb.plan import plan_sharding as plan_sharding
    from shardemb.plans.fit import load_plan as load_plan
    from shardemb.shard import shard_modules as shard_modules
    from shardemb.traffic import Traffic as Traffic
    from shardemb.traffic import traffic_of as traffic_of
    from shardemb.workload import Workload as Workload

__version__ = "0.1.0"

# Imported when first used: torch and TorchRec take seconds, and a login node may have neither.
_HOME = {
    "Batcher": "shardemb.data.batches",
    "Cluster": "shardemb.cluster",
    "CollectiveCounter": "shardemb.collectives",
    "Constraints": "shardemb.constraints",
    "DataProfile": "shardemb.data.profile",
    "EmbeddingBagCollection": "shardemb.modules.embedding_bag",
    "EmbeddingCollection": "shardemb.modules.embedding",
    "Env": "shardemb.env",
    "HealthReport": "shardemb.health",
    "Offsets": "shardemb.data.bag_forms",
    "ShardingPlan": "shardemb.placement",
    "TableConfig": "shardemb.config",
    "TableHealth": "shardemb.health",
    "Traffic": "shardemb.traffic",
    "TrainPipeline": "shardemb.pipeline",
    "TrainingHealth": "shardemb.health",
    "Workload": "shardemb.workload",
    "build_optimizer": "shardemb.optimizer_builder",
    "from_torch": "shardemb.modules.from_torch",
    "init_distributed": "shardemb.env",
    "keyed_jagged_tensor": "shardemb.data.batches",
    "latest_checkpoint": "shardemb.checkpoint",
    "load_checkpoint": "shardemb.checkpoint",
    "load_plan": "shardemb.plans.fit",
    "load_profile": "shardemb.data.profile_file",
    "plan_sharding": "shardemb.plan",
    "profile_batches": "shardemb.data.profile_counter",
    "save_checkpoint": "shardemb.checkpoint",
    "save_profile": "shardemb.data.profile_file",
    "shard_modules": "shardemb.shard",
    "traffic_of": "shardemb.traffic",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shardemb' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
