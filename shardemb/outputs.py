"""What a sharded collection returns, made equal to what the unsharded one returns.

In the declared order; with exact means; without gradients for frozen tables.
"""

# B batch of this rank

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from shardemb.layouts import LAYOUTS
from shardemb.modules.discovery import Collection


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What is to be done to one output of a collection.

    Attributes:
        feature: The key in the batch.
        mean: Whether it is a sum, to be divided by the number of its ids.
        frozen: Whether its table is not to be updated.
    """

    feature: str
    mean: bool
    frozen: bool

    def of(
        self, values: torch.Tensor, batch: KeyedJaggedTensor, *, weights_learn: bool = False
    ) -> torch.Tensor:
        """The values that the unsharded collection would return."""
        if self.mean:
            lengths_B = batch[self.feature].lengths()
            values = values / lengths_B.clamp(min=1).unsqueeze(1)
        return values.detach() if self.frozen and not weights_learn else values


def outputs_of(collection: Collection, layout_of: Mapping[str, str]) -> dict[str, _Output]:
    """What is to be done to the outputs of a sharded collection, by their names, as declared.

    Args:
        collection: Unsharded.
        layout_of: TorchRec's name of each table's layout.

    Returns:
        One entry for each feature, and for a feature of two tables one for each "feature@table".
    """
    return {
        name: _Output(
            feature=feature,
            mean=table.pooling == "mean" and LAYOUTS[layout_of[table.name]].splits_rows,
            frozen=not table.trainable,
        )
        for name, feature, table in collection.outputs
    }


Watch = Callable[[torch.Tensor], None]
"""Is shown outputs of which the backward pass exchanges gradients."""


class FinishPooled:
    """A forward hook of a pooled collection.

    TorchRec returns features by layout, so that a model which reads all columns at once would be
    another model under another plan. A mean over rows of several shards is summed on each and
    divided afterwards, which TorchRec 1.6 and 1.8 do wrongly for features of other tables, for
    features of several tables and under `grid_shard`; so it is divided here.

    Args:
        outputs: Of `outputs_of`.
        declared_order: Whether to return the features as declared.
        watch: Is shown TorchRec's output.
    """

    def __init__(
        self, outputs: Mapping[str, _Output], *, declared_order: bool, watch: Watch
    ) -> None:
        self._outputs, self._declared_order, self._watch = outputs, declared_order, watch
        self._only_order = not any(output.mean or output.frozen for output in outputs.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What torch calls after a forward."""
        learn: bool = module.weights_learn  # type: ignore[assignment]
        output.callbacks.append(lambda pooled: self._finish(pooled, args[0], weights_learn=learn))

    def _finish(
        self, pooled: KeyedTensor, batch: KeyedJaggedTensor, *, weights_learn: bool
    ) -> KeyedTensor:
        self._watch(pooled.values())
        keys = list(self._outputs if self._declared_order else pooled.keys())
        if self._only_order and list(pooled.keys()) == keys:
            return pooled
        width_of = dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
        # on CPU two thirds of the time of KeyedTensor.regroup
        columns = dict(
            zip(width_of, pooled.values().split(list(width_of.values()), 1), strict=True)
        )
        return KeyedTensor(
            keys=keys,
            length_per_key=[width_of[key] for key in keys],
            values=torch.cat(
                [
                    self._outputs[key].of(columns[key], batch, weights_learn=weights_learn)
                    for key in keys
                ],
                1,
            ),
        )


class FinishSequences:
    """A forward hook of a sequence collection.

    Args:
        outputs: Of `outputs_of`.
        watch: Is shown TorchRec's outputs.
    """

    def __init__(self, outputs: Mapping[str, _Output], watch: Watch) -> None:
        self._outputs, self._watch = outputs, watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """What torch calls after a forward."""
        output.callbacks.append(lambda rows: self._finish(rows, args[0]))

    def _finish(
        self, rows: Mapping[str, JaggedTensor], batch: KeyedJaggedTensor
    ) -> dict[str, JaggedTensor]:
        for name in self._outputs:
            self._watch(rows[name].values())
        return {
            name: JaggedTensor(
                values=output.of(rows[name].values(), batch),
                lengths=rows[name].lengths(),
                weights=rows[name].weights_or_none(),
            )
            if output.frozen
            else rows[name]
            for name, output in self._outputs.items()
        }
