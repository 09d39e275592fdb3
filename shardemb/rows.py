"""The rows that a sharded table starts with: drawn or read where they lie, or of rank 0."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from shardemb.agree import all_or_none
from shardemb.env import Env
from shardemb.init import Uniform
from shardemb.modules.discovery import Collection, Table
from shardemb.modules.initial_values import InitialValues

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the initial rows of a table come from: drawn, or a weight that the model holds.

    Attributes:
        drawn: Draws any block of it, or reads it from what was given.
        held: The whole table.
    """

    drawn: InitialValues | None = None
    held: torch.Tensor | None = field(default=None, repr=False)


def origin_of(table: Table) -> Origin:
    """Where the initial rows of an unsharded table come from.

    Args:
        table: The table.

    Returns:
        Its weight, or on meta what draws it.

    Raises:
        ValueError: It is on meta and has an `init_fn` that cannot be drawn shard by shard.
    """
    init_fn = table.config.init_fn
    if not table.weight.is_meta:
        return Origin(held=table.weight.detach())
    if isinstance(init_fn, InitialValues):
        return Origin(drawn=init_fn)
    if isinstance(init_fn, partial) and _is_uniform(init_fn):
        bounds = init_fn.keywords
        uniform = Uniform(low=bounds.get("a", 0.0), high=bounds.get("b", 1.0))
        return Origin(drawn=InitialValues(table.name, uniform, seed=0))
    raise ValueError(
        f"table {table.name!r} is on meta and has an init_fn of its own, which cannot be drawn "
        "shard by shard; build the collection on 'cpu', and its weights are carried over, or use "
        "shardemb.init"
    )


def _is_uniform(init_fn: partial[object]) -> bool:
    """Whether an `init_fn` is nn.init.uniform_ with bounds, as TorchRec's default is."""
    return (
        init_fn.func is nn.init.uniform_
        and not init_fn.args
        and set(init_fn.keywords) <= {"a", "b"}
    )


@contextmanager
def left_unfilled(collections: Iterable[Collection]) -> Iterator[None]:
    """Keeps TorchRec from filling shards; it tells no `init_fn` which rows a shard holds."""
    configs = [table.config for collection in collections for table in collection.tables.values()]
    fills = [config.init_fn for config in configs]
    for config in configs:
        config.init_fn = lambda _: None
    try:
        yield
    finally:
        for config, fill in zip(configs, fills, strict=True):
            config.init_fn = fill


@torch.no_grad()
def set_rows(weight: torch.Tensor | ShardedTensor, origin: Origin, env: Env) -> None:
    """Fills this rank's part of a table. On all ranks together, unless its rows are drawn.

    Args:
        weight: The sharded table, or the whole one where it is replicated.
        origin: What its rows are.
        env: This process.

    Raises:
        ValueError: The rows are given, and one is not finite, or not in the table's dtype.
        OSError: They are in a file that cannot be read.
        RunError: It is another than when the table was declared, or another rank failed.
    """
    blocks = blocks_of(weight)
    if origin.held is not None:
        _take_from_main(origin.held, blocks, env)
        return
    assert origin.drawn is not None
    width = weight.metadata().size[1] if isinstance(weight, ShardedTensor) else weight.shape[1]
    if not origin.drawn.are_given:
        _fill(blocks, origin.drawn, width)
        return
    with all_or_none(env, f"reading the initial rows {origin.drawn}"):
        _fill(blocks, origin.drawn, width)


def _fill(
    blocks: Iterable[tuple[torch.Tensor, int, int]], drawn: InitialValues, embedding_dim: int
) -> None:
    for block, first_row, first_column in blocks:
        drawn.fill(
            block, first_row=first_row, first_column=first_column, embedding_dim=embedding_dim
        )


def blocks_of(weight: torch.Tensor | ShardedTensor) -> list[tuple[torch.Tensor, int, int]]:
    """This rank's blocks of a sharded or replicated table, each with its first row and column."""
    if not isinstance(weight, ShardedTensor):
        return [(weight, 0, 0)]
    return [
        (shard.tensor, shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1])
        for shard in weight.local_shards()
    ]


def _take_from_main(
    held_RD: torch.Tensor, blocks: Iterable[tuple[torch.Tensor, int, int]], env: Env
) -> None:
    """Copies rank 0's whole table into the blocks, some rows at a time."""
    for start in range(0, held_RD.shape[0], _ROWS_AT_ONCE):
        rows = held_RD[start : start + _ROWS_AT_ONCE].to(env.device, copy=True)
        dist.broadcast(rows, src=0)
        for block, first, column in blocks:
            low, high = max(first, start), min(first + len(block), start + len(rows))
            if low < high:
                block[low - first : high - first].copy_(
                    rows[low - start : high - start, column : column + block.shape[1]]
                )
