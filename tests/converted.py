"""What tests of converted models compare: their whole tables, and torch's optimizers."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from shardemb.optim import SparseOptimizer
from tests.every_layout import whole_table


def torch_optimizer(model: nn.Module, optimizer: SparseOptimizer) -> torch.optim.Optimizer:
    kind: type[torch.optim.Optimizer] = getattr(torch.optim, type(optimizer).__name__)
    options = {name: value for name, value in vars(optimizer).items() if value}
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def weights_of(model: nn.Module, reference: nn.Module) -> Mapping[str, torch.Tensor]:
    """The whole tables of a converted model, by the names that the torch model has for them."""
    like = reference.state_dict()
    return {
        name: whole_table(weight, torch.zeros(like[name].shape))
        for key, weight in model.state_dict().items()
        for name in [re.sub(r"\.collection\..*", ".weight", key)]
    }
