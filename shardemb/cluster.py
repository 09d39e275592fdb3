"""The machines that a plan is for: how many, with how much memory, how fast they exchange."""

import reprlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from shardemb.host_memory import host_memory_bytes
from shardemb.machines import GPUS_PER_NODE, MACHINES, Machine, machine_of

if TYPE_CHECKING:  # a plan is read and compared without torch
    from shardemb.env import Env

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "memory_bytes": 128 << 30,
        "memory_gb_per_s": 55.0,
        "intra_node_gb_per_s": 2.0,
        "inter_node_gb_per_s": 1.25,
    },
    "cuda": {
        "memory_bytes": 32 << 30,
        "memory_gb_per_s": 963.0,
        "intra_node_gb_per_s": 644.0,
        "inter_node_gb_per_s": 13.4,
    },
}
"""What a rank has where nobody says: TorchRec's defaults (TorchRec 1.8, `distributed/planner/
constants.py`), but on CPU what gloo reaches between processes, and a network of 10 Gb/s."""

_MOST = {"num_nodes": 1 << 20, "ranks_per_node": 1 << 20, "memory_bytes": 1 << 63}
_MOST_GB_PER_S = 1e9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices, one rank on each.

    Attributes:
        name: For people.
        num_nodes: Number of nodes.
        ranks_per_node: Number of ranks, and of devices, on each node.
        device: "cpu" or "cuda".
        memory_bytes: Memory of each rank in which tables lie: the device's, or on CPU its part of
            the node's.
        memory_gb_per_s: Bandwidth of that memory for a rank, in 10^9 bytes/s.
        intra_node_gb_per_s: What a rank can send to ranks of its node, in 10^9 bytes/s.
        inter_node_gb_per_s: What a rank can send to ranks of other nodes, in 10^9 bytes/s.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> Cluster.preset("h100", num_nodes=8).world_size
        64
    """

    name: str
    num_nodes: int = 1
    ranks_per_node: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    memory_bytes: int
    memory_gb_per_s: float
    intra_node_gb_per_s: float
    inter_node_gb_per_s: float

    def __post_init__(self) -> None:
        who = f"cluster {self.name!r}"
        if self.device not in {"cpu", "cuda"}:
            raise ValueError(f"{who}: device must be 'cpu' or 'cuda', got {self.device!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in {"num_nodes", "ranks_per_node", "memory_bytes"}:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(
                        f"{who}: {field.name} must be a positive integer, got {value!r}"
                    )
                if value > _MOST[field.name]:
                    raise ValueError(
                        f"{who}: {field.name} must be at most {_MOST[field.name]}, got "
                        f"{reprlib.repr(value)}"
                    )
            elif field.name.endswith("gb_per_s"):
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not is_number or not 0 < value <= _MOST_GB_PER_S:
                    raise ValueError(
                        f"{who}: {field.name} must be a positive number of 10^9 bytes/s, at most "
                        f"{_MOST_GB_PER_S:g}, got {reprlib.repr(value)}"
                    )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.ranks_per_node

    @classmethod
    def preset(
        cls, name: str, *, num_nodes: int = 1, ranks_per_node: int = GPUS_PER_NODE
    ) -> "Cluster":
        """A cluster of common machines, by the figures of `shardemb.machines`.

        Args:
            name: Of the machine: "h100", "h200", "b200", "a100-80gb", "a100-40gb", "v100", "a10g"
                or "l4".
            num_nodes: Number of nodes.
            ranks_per_node: GPUs that are used of each.

        Returns:
            The cluster.

        Raises:
            ValueError: There is no machine of that name, or a number is not positive.

        Example:
            >>> Cluster.preset("b200", num_nodes=2).memory_bytes
            180000000000
        """
        if name not in MACHINES:
            raise ValueError(
                f"there is no preset {name!r}; there are {', '.join(MACHINES)}, and any other "
                "machine is a Cluster(...) of its figures"
            )
        return cls(
            name=name,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            device="cuda",
            memory_bytes=round(MACHINES[name].memory_gb * 1e9),
            **_bandwidths(MACHINES[name]),
        )


def check_where(where: object) -> None:
    """Refuses what names no ranks.

    Args:
        where: Should be an `Env` or a `Cluster`.

    Raises:
        ValueError: It is neither.

    Example:
        >>> check_where(Cluster.preset("h100"))
    """
    if isinstance(where, Cluster):
        return
    from shardemb.env import Env

    if not isinstance(where, Env):
        raise ValueError(
            "where: the ranks must be the Env of init_distributed, or a Cluster such as "
            f"Cluster.preset('h100'), got {where!r}"
        )


def cluster_of(env: "Env") -> Cluster:
    """The ranks of an environment as a cluster.

    Those of this run have the memory that is here: the CUDA device's, or on CPU an equal part of
    this node's for each rank on it. Bandwidths are those of `machines.py` where the GPU is
    among them, and else defaults; `shardemb plan --probe` measures them. An environment that was
    made by hand is of another machine, and has 32 GiB of device memory or 128 GiB of host memory a
    rank, as TorchRec assumes: describe that machine by a `Cluster` instead.

    Args:
        env: The ranks.

    Returns:
        The cluster.

    Example:
        >>> from shardemb.env import Env
        >>> cluster_of(Env(world_size=4, num_nodes=2)).ranks_per_node
        2
    """
    device: Literal["cpu", "cuda"] = "cuda" if env.device.type == "cuda" else "cpu"
    cluster = Cluster(
        name="this run" if env.is_live else "a run elsewhere",
        num_nodes=env.num_nodes,
        ranks_per_node=env.local_world_size,
        device=device,
        **_DEFAULTS[device],
    )
    if not env.is_live:
        return cluster
    if device == "cpu":
        return replace(cluster, memory_bytes=host_memory_bytes() // env.local_world_size)
    import torch

    properties = torch.cuda.get_device_properties(env.device)
    machine = machine_of(properties.name)
    cluster = replace(cluster, memory_bytes=properties.total_memory)
    return cluster if machine is None else replace(cluster, **_bandwidths(machine))


def _bandwidths(machine: Machine) -> dict[str, Any]:
    return {name: value for name, value in machine._asdict().items() if name.endswith("gb_per_s")}
