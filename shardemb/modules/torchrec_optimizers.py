"""What TorchRec's users attach to a weight as its optimizer, as one of ours."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
import torchrec

from shardemb import optim
from shardemb.optim import SparseOptimizer

_CONFIG_OF: dict[type, type[SparseOptimizer]] = {
    torch.optim.SGD: optim.SGD,
    torch.optim.Adagrad: optim.Adagrad,
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
    torchrec.optim.SGD: optim.SGD,
    torchrec.optim.LarsSGD: optim.LarsSGD,
    torchrec.optim.Adagrad: optim.Adagrad,
    torchrec.optim.RowWiseAdagrad: optim.RowWiseAdagrad,
    torchrec.optim.Adam: optim.AdamW,
    torchrec.optim.PartialRowWiseAdam: optim.PartialRowWiseAdam,
    torchrec.optim.LAMB: optim.LAMB,
    torchrec.optim.PartialRowWiseLAMB: optim.PartialRowWiseLAMB,
}
_BETAS = ("beta1", "beta2")


def config_of(kind: type, given: Mapping[str, Any]) -> SparseOptimizer:
    """Our config of an optimizer that was attached with `apply_optimizer_in_backward`.

    It computes what its class says: torch's own what torch documents, TorchRec's what FBGEMM
    computes, with the options that FBGEMM's kernels of SGD and Adagrad ignore meant as in torch. So
    weight decay is decoupled in `torchrec.optim.Adam`, which is therefore our `AdamW`, and L2 in
    `torch.optim.Adam`.

    Args:
        kind: Its class, of `torch.optim` or `torchrec.optim`.
        given: What it was given. The decay rates of Adam and its kin may be "betas", or FBGEMM's
            "beta1" and "beta2".

    Returns:
        Ours, with the defaults of the class for what was not given.

    Raises:
        ValueError: The class or an option is not supported, an option is out of its range or there
            twice, or one is missing whose defaults differ.

    Example:
        >>> config_of(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}).plan_name
        'SGD with momentum'
        >>> config_of(torchrec.optim.Adam, {"lr": 0.1, "beta1": 0.8}).betas
        (0.8, 0.999)
    """
    if kind not in _CONFIG_OF:
        ours = ", ".join(config.__name__ for config in get_args(SparseOptimizer))
        raise ValueError(
            f"optimizer {kind.__name__} is not supported; use one of shardemb.optim: {ours}"
        )
    config = _CONFIG_OF[kind]
    own = {field.name for field in fields(config)} - {"max_gradient"}
    _check_given(kind, given, own)
    options = {name: value for name, value in given.items() if name not in _BETAS}
    if any(name in given for name in _BETAS):
        options["betas"] = (given.get("beta1", 0.9), given.get("beta2", 0.999))
    if kind is torchrec.optim.Adam:
        options.setdefault("weight_decay", 0.0)
    return config(**options)


def _check_given(kind: type, given: Mapping[str, Any], own: set[str]) -> None:
    """Refuses what would not be honoured.

    Raises:
        ValueError: An option is missing, unknown, or there twice.
    """
    who = f"optimizer {kind.__name__}"
    needed = {"lr", "eps"} if kind is torch.optim.Adagrad else {"lr"}
    if not needed <= set(given):
        raise ValueError(
            f"{who} was not given {min(needed - set(given))}, and FBGEMM's default is not torch's; "
            "give it"
        )
    known = own | set(_BETAS) if "betas" in own else own
    ignored = sorted(set(given) - known)
    if ignored:
        *others, last = sorted(own)
        raise ValueError(
            f"{who} was given {ignored[0]}, which is not honoured; give only "
            f"{', '.join(others)} and {last}"
        )
    if "betas" in given and not set(_BETAS).isdisjoint(given):
        raise ValueError(f"{who} was given betas and beta1 or beta2; give betas only")
