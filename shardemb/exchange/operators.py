"""Operators of torch for the collectives of our groups, which modes such as counters can see.

They run where such a mode is open; elsewhere the collectives do without torch's dispatcher.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

LIBRARY = "shardemb_exchange"
_SCHEMAS = {
    "all_to_all_single": (
        "Tensor(a!) output, Tensor input, int[] output_split_sizes, int[] input_split_sizes"
    ),
    "alltoall_": "Tensor(a!)[] output_tensors, Tensor[] input_tensors",
    "allgather_": "Tensor(a!)[] output_tensors, Tensor input_tensor",
    "all_gather_into_tensor": "Tensor(a!) output, Tensor input",
    "all_reduce_": "Tensor(a!) tensor, int reduce_op",
    "reduce_scatter_": "Tensor(a!) output, Tensor[] input_tensors, int reduce_op",
    "reduce_scatter_tensor": "Tensor(a!) output, Tensor input, int reduce_op",
    "broadcast_": "Tensor(a!) tensor, int root_rank",
}


@functools.cache
def define() -> torch.library.Library:
    """Makes the operators known to torch."""
    library = torch.library.Library(LIBRARY, "DEF")
    for name, arguments in _SCHEMAS.items():
        library.define(f"{name}({arguments}, str group_name) -> ()")
        library.impl(name, functools.partial(_call, name), "CompositeExplicitAutograd")
    return library


def _call(name: str, *arguments: Any) -> None:
    *given, group_name = arguments
    group = dist.distributed_c10d._resolve_process_group(group_name)
    getattr(group.collectives, name)(*given)  # type: ignore[attr-defined]
