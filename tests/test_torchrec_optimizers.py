"""What users of TorchRec attach to a weight becomes the config that computes it."""

from typing import Any

import pytest
import torch
import torchrec

from shardemb import optim
from shardemb.modules.torchrec_optimizers import config_of


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (torch.optim.SGD, {"weight_decay": 0.1}, optim.SGD(lr=0.5, weight_decay=0.1)),
        (torchrec.optim.SGD, {"momentum": 0.9}, optim.SGD(lr=0.5, momentum=0.9)),
        (torch.optim.Adagrad, {"eps": 1e-10}, optim.Adagrad(lr=0.5, eps=1e-10)),
        (torchrec.optim.Adagrad, {}, optim.Adagrad(lr=0.5)),
        (torchrec.optim.RowWiseAdagrad, {"eps": 1e-4}, optim.RowWiseAdagrad(lr=0.5, eps=1e-4)),
        (torch.optim.Adam, {"weight_decay": 0.1}, optim.Adam(lr=0.5, weight_decay=0.1)),
        (torch.optim.AdamW, {}, optim.AdamW(lr=0.5, weight_decay=0.01)),
        (torch.optim.AdamW, {"betas": [0.8, 0.9]}, optim.AdamW(lr=0.5, betas=(0.8, 0.9))),
        (torchrec.optim.Adam, {}, optim.AdamW(lr=0.5, weight_decay=0.0)),
        (torchrec.optim.Adam, {"weight_decay": 0.1}, optim.AdamW(lr=0.5, weight_decay=0.1)),
        (torchrec.optim.LAMB, {"beta2": 0.9}, optim.LAMB(lr=0.5, betas=(0.9, 0.9))),
        (
            torchrec.optim.PartialRowWiseLAMB,
            {"beta1": 0.7, "beta2": 0.8},
            optim.PartialRowWiseLAMB(lr=0.5, betas=(0.7, 0.8)),
        ),
        (
            torchrec.optim.PartialRowWiseAdam,
            {"weight_decay": 0.1},
            optim.PartialRowWiseAdam(lr=0.5, weight_decay=0.1),
        ),
        (torchrec.optim.LarsSGD, {"eta": 0.01}, optim.LarsSGD(lr=0.5, eta=0.01)),
    ],
)
def test_an_attached_optimizer_is_the_config_that_computes_it(
    kind: type, given: dict[str, Any], expected: optim.SparseOptimizer
) -> None:
    assert config_of(kind, {"lr": 0.5} | given) == expected


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_what_is_not_given_is_as_in_torch(name: str) -> None:
    kind = getattr(torch.optim, name)
    given = {"lr": 0.5} | ({"eps": 1e-10} if name == "Adagrad" else {})
    (group,) = kind([torch.zeros(1, requires_grad=True)], **given).param_groups
    ours = vars(config_of(kind, given))
    assert ours.pop("max_gradient") is None
    assert ours == {option: group[option] for option in ours}


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        (torch.optim.RMSprop, {"lr": 0.1}, "optimizer RMSprop is not supported; .* SGD, LarsSGD"),
        (torch.optim.SGD, {}, "optimizer SGD was not given lr, and FBGEMM's default is not torch"),
        (torch.optim.Adagrad, {"lr": 0.1}, "optimizer Adagrad was not given eps"),
        (
            torch.optim.SGD,
            {"lr": 0.1, "nesterov": True},
            "SGD was given nesterov, which is not honoured; give only lr, momentum and",
        ),
        (torch.optim.SGD, {"lr": 0.1, "beta1": 0.9}, "SGD was given beta1, which is not"),
        (torchrec.optim.LAMB, {"lr": 0.1, "max_gradient": 1.0}, "LAMB was given max_gradient"),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.9, 0.9), "beta1": 0.8}, "betas and beta1"),
        (torch.optim.Adam, {"lr": -1}, "Adam: lr must be a positive number, got -1"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(
    kind: type, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        config_of(kind, given)
