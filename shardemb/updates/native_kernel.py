"""Our own kernel in TorchRec's: looks up and updates rows by the compiled code."""

# R rows of a block, B bags of a feature, F features, N ids, D width

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from shardemb.errors import RunError
from shardemb.native.kernels import OPTIMIZERS, Bags, Block, Blocks, Merged, Training, largest
from shardemb.updates.formulas import needs_whole_rows
from shardemb.updates.kernel import SMALLEST_EPS, RowKernel, Shard
from shardemb.updates.lookups import Lookup, RowGradients
from shardemb.updates.settings import held_by
from shardemb.updates.shard_rows import ShardRows

_LARGEST_SUM = 1e15
"""Of gradients that may be squared and added up unwatched."""

_LARGEST_OUTPUT = 1e30
"""Of rows to which such a step may be added unwatched."""

_LARGEST_LR = 1e12
"""Of learning rates by which such a step may be made unwatched."""


class NativeKernel(RowKernel):
    """Looks up and updates rows by the compiled code.

    Args:
        held: What holds the rows, all in one piece of memory.
        shards: The blocks, in the order of their features.
        pooling: "sum" or "mean"; None where every id has an output of its own.
    """

    def __init__(self, held: Any, shards: Sequence[Shard], *, pooling: str | None) -> None:
        super().__init__(held, shards, pooling=pooling)
        self._weights: list[Tensor] = held.split_embedding_weights()
        self._largest: list[float] = []
        self._find_memory()

    def _find_memory(self) -> None:
        """Tells the compiled code where the rows are."""
        self._address = self._weights[0].data_ptr()
        blocks = [
            Block(
                weight_RD=weight_RD,
                first_feature=shard.features.first,
                num_features=shard.features.count,
                first_column=shard.features.first_column,
            )
            for shard, weight_RD in zip(self.shards, self._weights, strict=True)
        ]
        self._blocks = Blocks(blocks)
        self._shard_of = {shard.rows: shard for shard in self.shards if shard.rows is not None}
        self._updates = _Updates(self.trained)
        self._merged: Merged | None = None
        self._sorted = False
        if self._shard_of:
            self._merged = Merged(
                Blocks(
                    [
                        block
                        for block, shard in zip(blocks, self.shards, strict=True)
                        if shard.rows is not None
                    ]
                )
            )

    def _follow_memory(self) -> None:
        """Finds rows again that moved, as by `share_memory_`."""
        if self._weights[0].data_ptr() != self._address:
            self._find_memory()

    def _look_up(
        self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, float]:
        self._follow_memory()
        bags = self._bags(ids_N, offsets, weights_N)
        try:
            output = self._blocks.look_up(bags)
        except IndexError:
            raise self._out_of_range(bags) from None
        return output, self._blocks.largest

    def _bags(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Bags:
        return Bags(
            ids_N=ids_N.contiguous(),
            offsets=offsets.contiguous(),
            weights_N=None if weights_N is None else weights_N.detach().float().contiguous(),
            num_features=self.num_features,
            pooling=self._pooling,
        )

    def _weigh_later(self, ids_N: Tensor, offsets: Tensor) -> Callable[[Tensor], Tensor]:
        bags, version = self._bags(ids_N, offsets, None), self._weights[0]._version

        def weigh(gradient: Tensor) -> Tensor:
            if self._weights[0]._version != version:
                raise RunError(
                    f"rows of tables {[shard.table for shard in self.shards]} were changed after "
                    "a lookup whose weights require a gradient, and before its backward pass; "
                    "call backward before optimizer.step()"
                )
            self._follow_memory()
            return self._blocks.weigh(bags, gradient)

        return weigh

    def _out_of_range(self, bags: Bags) -> ValueError:
        """What is to be said of the first id that its block does not have."""
        starts = bags.offsets[:: bags.num_bags].tolist()
        for shard, weight_RD in zip(self.shards, self._weights, strict=True):
            first, last = shard.features.first, shard.features.first + shard.features.count
            ids_N = bags.ids_N[starts[first] : starts[last]]
            bad = ids_N[(ids_N < 0) | (ids_N >= len(weight_RD))]
            if len(bad):
                return ValueError(
                    f"a block of {len(weight_RD)} rows, of table {shard.table!r}, was asked for "
                    f"its row {int(bad[0])}; check ids where batches are made, as "
                    "keyed_jagged_tensor and check_ids of shard_modules do"
                )
        return ValueError("an id is not one of its block's rows")

    def _keep(self, found: float) -> None:
        self._largest.append(found)
        self._sorted = False

    def clear(self) -> None:
        """Forgets all gradients."""
        super().clear()
        self._largest.clear()
        self._sorted = False

    def choose(self, *, watched: bool) -> None:  # noqa: ARG002 - it sees and scales gradients too
        """Chooses the blocks whose new rows cannot be other than finite.

        Others are updated where their new rows are looked at before they are written; and those of
        which ranks hold columns, where a row's update needs them all.
        """
        self._own = []
        self._follow_memory()
        if not self._lookups or not self._fits():
            return
        own = {rows: shard for rows, shard in self._shard_of.items() if not _needs_slices(rows)}
        halves = [shard for rows, shard in own.items() if rows.weight_RD.dtype == torch.float16]
        if halves:  # they may overflow
            bad = self._update(halves, scale=1.0, dry=True)
            own = {rows: shard for rows, shard in own.items() if rows not in bad}
        self._own = list(own.values())

    def _fits(self) -> bool:
        """Whether new rows and state are finite, if those that are held are."""
        if not all(found <= _LARGEST_OUTPUT for found in self._largest):  # one may be nan
            return False
        if not self._updates.read():
            return False
        return sum(map(_largest_sum, self._lookups)) <= _LARGEST_SUM

    def _sort(self) -> Merged:
        assert self._merged is not None
        if not self._sorted:
            self._merged.sort(
                [
                    (self._bags(lookup.ids_N, lookup.offsets, lookup.weights_N), lookup.gradient)
                    for lookup in self._lookups
                ]
            )
            self._sorted = True
        return self._merged

    def _merge(self, shard: Shard) -> RowGradients:
        return RowGradients(*self._sort().rows(list(self._shard_of.values()).index(shard)))

    def own_square(self) -> float:
        """The sum of the squares of the gradients in blocks that the kernel updates by itself."""
        if not self._own:
            return 0.0
        squares = dict(zip(self._shard_of, self._sort().squares(), strict=True))
        partly = [shard for shard in self._own if shard.rows and not shard.rows.all_move]
        found = [squares[one.rows] for one in self._own if one.rows and one.rows.all_move]
        found += [
            float(gradients.grad_UD.double().square().sum())
            for _, gradients in self._merged_of(partly)
        ]
        return math.fsum(found)

    def step(self, scale: float) -> Mapping[ShardRows, int]:
        """Updates the rows of the blocks that were chosen.

        Args:
            scale: What gradients are multiplied by.

        Returns:
            Of some blocks the first row that was left as it was, as its state is not finite.
        """
        if not self._own:
            return {}
        increment_version(self._weights[0])  # torch sees no other writers
        return self._update(self._own, scale=scale, dry=False)

    def _update(self, shards: Sequence[Shard], *, scale: float, dry: bool) -> dict[ShardRows, int]:
        chosen = set(shards)
        trainings = self._updates.of_step(
            [shard in chosen for shard in self._shard_of.values()], scale=scale
        )
        bad = self._sort().update(trainings, dry=dry)
        return {rows: row for rows, row in zip(self.trained, bad, strict=True) if row >= 0}


def _needs_slices(rows: ShardRows) -> bool:
    return rows.slices is not None and needs_whole_rows(
        type(rows.training.optimizer), rows.settings
    )


def _largest_sum(lookup: Lookup) -> float:
    """What no sum of its gradients exceeds."""
    bound = largest(lookup.gradient) * len(lookup.ids_N)
    if lookup.weights_N is not None:
        bound *= largest(lookup.weights_N.contiguous())
    return bound


class _Updates:
    """How blocks are trained, for the compiled code.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[ShardRows]) -> None:
        self._blocks = blocks
        self._trainings = (Training * len(blocks))(*map(_training_of, blocks))
        # np.ctypeslib.as_array does not know pointers among the fields
        self._columns = np.frombuffer(memoryview(self._trainings), dtype=np.dtype(Training))
        self._settings: list[list[Any]] = [[] for _ in blocks]
        self._names = [list(vars(rows.training.optimizer)) for rows in blocks]
        self._has_eps = np.array(["eps" in names for names in self._names], dtype=bool)
        self._optimizers = [
            OPTIMIZERS.index(type(rows.training.optimizer).__name__) for rows in blocks
        ]

    def read(self) -> bool:
        """Takes over the settings of the next step; whether it may be left unwatched with them."""
        for number, (rows, names) in enumerate(zip(self._blocks, self._names, strict=True)):
            held = held_by(rows.settings, names)
            if held != self._settings[number]:
                _set(self._trainings[number], rows.settings)
                self._settings[number] = held
        lr, eps = self._columns["lr"], self._columns["eps"]
        return bool((np.abs(lr) < _LARGEST_LR).all() and (eps[self._has_eps] >= SMALLEST_EPS).all())

    def of_step(self, chosen: Sequence[bool], *, scale: float) -> ctypes.Array[Training]:
        """How the blocks are trained in the next step, whose settings were read.

        Args:
            chosen: Which of them are.
            scale: What gradients are multiplied by.
        """
        columns = self._columns
        columns["optimizer"] = np.where(chosen, self._optimizers, -1)
        columns["scale"] = scale
        columns["num_updates"] = [rows.settings["step"] + 1 for rows in self._blocks]
        columns["correction1"] = 1 - columns["beta1"] ** columns["num_updates"]
        columns["correction2"] = np.sqrt(1 - columns["beta2"] ** columns["num_updates"])
        for field, state in (("momentum", "momentum1"), ("square", "exp_avg_sq")):
            columns[field] = [
                rows.state[state].data_ptr() if state in rows.state else 0 for rows in self._blocks
            ]
        return self._trainings


def _training_of(rows: ShardRows) -> Training:
    """What does not change from step to step."""
    training, is_rounded = rows.training, rows.weight_RD.dtype != torch.float32
    return Training(
        embedding_dim=rows.embedding_dim,
        first_row=rows.first_row,
        first_column=rows.first_column,
        frozen_rows=training.frozen_rows,
        padding_row=-1 if training.padding_idx is None else training.padding_idx,
        key=rows.key,
        stochastic=is_rounded and training.rounding == "stochastic",
    )


def _set(training: Training, settings: dict[str, Any]) -> None:
    """Takes over the settings of a parameter group."""
    for field, name in (
        ("lr", "lr"),
        ("eps", "eps"),
        ("weight_decay", "weight_decay"),
        ("momentum_factor", "momentum"),
        ("eta", "eta"),
    ):
        setattr(training, field, float(settings.get(name, 0.0)))
    training.beta1, training.beta2 = map(float, settings.get("betas", (0.0, 0.0)))
    clip = settings["max_gradient"]
    training.max_gradient = -1.0 if clip is None else float(clip)
