"""The machines that a plan is for: how many, with how much memory, how fast they exchange."""

from dataclasses import dataclass
from typing import Literal


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
    """

    name: str
    num_nodes: int = 1
    ranks_per_node: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    memory_bytes: int
    memory_gb_per_s: float
    intra_node_gb_per_s: float
    inter_node_gb_per_s: float

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.ranks_per_node
