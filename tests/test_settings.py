"""Settings that change between steps, in whatever way: each is seen, and reaches the rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from shardemb.env import Env
from shardemb.errors import RunError
from tests.both import OPTIMIZERS, Both
from tests.plans import KERNELS
from tests.spmd import spmd


def groups_of(both: Both) -> dict[str, dict[str, Any]]:
    return {group["table"]: group for group in both.optimizer.param_groups if "table" in group}


@spmd(world_size=2)
def test_what_changes_in_place_reaches_the_rows_on_the_next_step(env: Env) -> None:
    for kernel in KERNELS:
        both = Both(env, kernel=kernel)
        groups = groups_of(both)
        rate = torch.tensor(OPTIMIZERS["fused"].lr, dtype=torch.float64)
        betas: list[Any] = [0.9, torch.tensor(0.999, dtype=torch.float64)]
        groups["fused"]["lr"] = rate
        groups["own"]["betas"] = betas
        changed: dict[str, Any] = dict(both.reference.optimizers)
        for step in range(4):
            if step == 1:
                rate.fill_(0.03)
                changed["fused"] = replace(changed["fused"], lr=0.03)
            if step == 2:
                betas[0] = 0.5
                changed["own"] = replace(changed["own"], betas=(0.5, 0.999))
            if step == 3:
                betas[1].fill_(0.9)
                changed["own"] = replace(changed["own"], betas=(0.5, 0.9))
            both.reference.optimizers.update(changed)
            both.step(step)
        both.assert_equal()


@spmd(world_size=2)
def test_what_no_step_can_take_is_seen_after_steps_that_took_all(env: Env) -> None:
    for kernel in KERNELS:
        both = Both(env, kernel=kernel)
        group = groups_of(both)["own"]
        group["lr"] = torch.tensor(group["lr"])
        for step in range(2):
            both.step(step)
        rate = group["lr"].clone()
        if not env.is_main:
            group["lr"].fill_(float("nan"))
        for _ in range(2):  # not only where it is new
            with pytest.raises(RunError, match=r"^step 3: lr of table 'own' is nan; nothing of"):
                both.optimizer.step()
        group["lr"].copy_(rate)
        limit = group.pop("max_gradient")
        group["maximum"] = limit  # as many settings as before, of the same values
        with pytest.raises(ValueError, match="table 'own': Adam: max_gradient is missing"):
            both.optimizer.step()
        del group["maximum"]
        group["max_gradient"] = limit
        eps = group["eps"]
        if env.is_main:
            group["eps"] = 0.5
        with pytest.raises(RunError, match=r"eps of table 'own' is 0\.5 on rank 0 and 0\.0001 on"):
            both.optimizer.step()
        group["eps"] = eps
        both.step(2)
        both.assert_equal()
