"""Refuses backward passes whose dense gradients would not be averaged over the ranks."""

from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from shardemb.updates.trained import ids_of_table_parameters


class _OneBackward:
    """Knows whether the next backward pass is the first after a forward of the whole model.

    DistributedDataParallel averages gradients in that one only; in any other the dense parameters
    of the ranks would go apart, in silence.
    """

    def __init__(self) -> None:
        self._expected = self._running = False

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """What torch calls after a forward."""
        if torch.is_grad_enabled():
            self._expected, self._running = True, False

    def after_gradient(self, parameter: nn.Parameter) -> None:  # noqa: ARG002
        """What torch calls when a parameter has got a gradient.

        Raises:
            ValueError: It will not be averaged.
        """
        if self._running:
            return
        if not self._expected:
            raise ValueError(
                "dense parameters take part in a second backward pass after one forward of the "
                "model, or in a forward of a part of it, whose gradients would not be averaged "
                "over the ranks; call the whole model, and backward once for the sum of its losses"
            )
        self._expected, self._running = False, True
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._running = False


def refuse_second_backwards(model: nn.Module) -> None:
    """Refuses a second backward pass of one forward, where a model has dense parameters.

    Args:
        model: Sharded, on more than one rank.
    """
    watch = _OneBackward()
    tables = ids_of_table_parameters(model)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_forward_hook(watch.after_forward)
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in tables:
                    parameter.register_post_accumulate_grad_hook(watch.after_gradient)
