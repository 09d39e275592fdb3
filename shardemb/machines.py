"""Common machines by name: memory and bandwidths as their vendors state them. Numbers only.

GB and GB/s are 10^9 bytes; a GPU's memory counts as 10^9 bytes a GB too, which is less than it has.
NVLink is stated for both directions together: half of it is what a rank can send. A node's network
is stated in Gb/s of all its cards: an eighth of that in bytes, by the GPUs of a node, is a rank's.
These are peaks: `shardemb.planning.probe` measures what a machine at hand reaches.

Sources, by GPU and by the node that stands for its machines:

- H100: NVIDIA H100 datasheet, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s. DGX H100 user guide: 8 GPUs,
  8 ConnectX-7 cards of 400 Gb/s.
- H200: NVIDIA H200 datasheet, SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200: as DGX H100.
- B200: DGX B200 datasheet and user guide: 8 GPUs with 1,440 GB and 64 TB/s together, NVLink 14.4
  TB/s together, 8 ConnectX-7 cards of 400 Gb/s.
- A100: NVIDIA A100 datasheet, SXM: 40 GB with 1,555 GB/s or 80 GB with 2,039 GB/s, NVLink 600
  GB/s. DGX A100 user guide: 8 GPUs, 8 compute cards of 200 Gb/s.
- V100: NVIDIA V100 datasheet, SXM2: 32 GB, 900 GB/s, NVLink 300 GB/s. DGX-1 system architecture
  whitepaper: 8 GPUs, 4 cards of 100 Gb/s.
- A10G: NVIDIA A10 datasheet: 24 GB, 600 GB/s, PCIe 4.0 x16 of 64 GB/s in both directions. Amazon
  EC2, g5.48xlarge: 8 GPUs, 100 Gb/s.
- L4: NVIDIA L4 datasheet: 24 GB, 300 GB/s, PCIe 4.0 x16 of 64 GB/s in both directions. Google
  Cloud, g2-standard-96: 8 GPUs, 100 Gb/s.
"""

from typing import NamedTuple


class Machine(NamedTuple):
    """A node of eight equal GPUs: what each of them has, and what CUDA calls it."""

    device_name: str
    memory_gb: float
    memory_gb_per_s: float
    intra_node_gb_per_s: float
    inter_node_gb_per_s: float


GPUS_PER_NODE = 8
MACHINES: dict[str, Machine] = {
    "h100": Machine("NVIDIA H100 80GB HBM3", 80, 3350, 900 / 2, 8 * 400 / 8 / 8),
    "h200": Machine("NVIDIA H200", 141, 4800, 900 / 2, 8 * 400 / 8 / 8),
    "b200": Machine("NVIDIA B200", 180, 8000, 1800 / 2, 8 * 400 / 8 / 8),
    "a100-80gb": Machine("NVIDIA A100-SXM4-80GB", 80, 2039, 600 / 2, 8 * 200 / 8 / 8),
    "a100-40gb": Machine("NVIDIA A100-SXM4-40GB", 40, 1555, 600 / 2, 8 * 200 / 8 / 8),
    "v100": Machine("Tesla V100-SXM2-32GB", 32, 900, 300 / 2, 4 * 100 / 8 / 8),
    "a10g": Machine("NVIDIA A10G", 24, 600, 64 / 2, 100 / 8 / 8),
    "l4": Machine("NVIDIA L4", 24, 300, 64 / 2, 100 / 8 / 8),
}
"""Machines by the names that `Cluster.preset` takes."""


def machine_of(device_name: str) -> Machine | None:
    """The machine whose GPUs CUDA calls so, if it is among them.

    Example:
        >>> machine_of("NVIDIA H100 80GB HBM3").memory_gb_per_s
        3350
    """
    return next((found for found in MACHINES.values() if found.device_name == device_name), None)
