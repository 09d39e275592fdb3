"""What the configs of sparse optimizers refuse, and what others are told of them."""

from typing import Any, cast, get_args

import pytest
import torchrec

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.plans.shards import OPTIMIZERS


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: optim.SGD(lr=0), "SGD: lr must be a positive number, got 0"),
        (lambda: optim.Adagrad(lr=0.1, eps=-1e-8), "Adagrad: eps must be a positive number"),
        (lambda: optim.RowWiseAdagrad(lr=float("nan")), "RowWiseAdagrad: lr must be a positive"),
        (
            lambda: optim.RowWiseAdagrad(lr=cast("float", "0.1")),
            "lr must be a positive number, got '0.1'",
        ),
        (lambda: optim.SGD(lr=0.1, momentum=1.0), r"SGD: momentum must be a number in \[0, 1\)"),
        (lambda: optim.Adam(lr=0.1, weight_decay=-1), "weight_decay must be a number of at least"),
        (lambda: optim.LAMB(lr=0.1, betas=(0.9, 1.0)), r"two numbers in \[0, 1\), got \(0.9, 1.0"),
        (
            lambda: optim.PartialRowWiseLAMB(lr=0.1, betas=cast("tuple[float, float]", 0.9)),
            "PartialRowWiseLAMB: betas must be two numbers",
        ),
        (lambda: optim.LarsSGD(lr=0.1, eta=0.0), "LarsSGD: eta must be a positive number, got 0"),
        (
            lambda: optim.PartialRowWiseAdam(lr=0.1, max_gradient=0),
            "PartialRowWiseAdam: max_gradient must be a positive number or None, got 0",
        ),
    ],
)
def test_a_bad_optimizer_is_refused_by_name(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_an_option_that_is_not_honoured_does_not_exist() -> None:
    with pytest.raises(TypeError, match="nesterov"):
        optim.SGD(lr=0.1, nesterov=True)  # type: ignore[call-arg]


def test_every_optimizer_names_its_state_as_torchrec_does_and_counts_its_bytes() -> None:
    two = {"momentum1": "element", "exp_avg_sq": "element"}
    mixed = {"momentum1": "element", "exp_avg_sq": "row"}
    per_row = 8 * 4
    expected = {
        "SGD": ({}, 0),
        "SGD with momentum": ({"momentum1": "element"}, per_row),
        "LarsSGD": ({"momentum1": "element"}, per_row),
        "Adagrad": ({"momentum1": "element"}, per_row),
        "RowWiseAdagrad": ({"momentum1": "row"}, 4),
        "Adam": (two, 2 * per_row),
        "AdamW": (two, 2 * per_row),
        "LAMB": (two, 2 * per_row),
        "PartialRowWiseAdam": (mixed, per_row + 4),
        "PartialRowWiseLAMB": (mixed, per_row + 4),
    }
    named = {name: made for name, made in OPTIMIZERS.items() if made is not None}
    assert {
        name: (made.state, made.state_bytes(10, 8) // 10) for name, made in named.items()
    } == expected
    assert {type(made) for made in named.values()} == set(get_args(optim.SparseOptimizer))
    for made in named.values():
        assert list(made.state)[:1] == ["momentum1"] * bool(made.state)
        assert hasattr(torchrec.optim, made.torchrec_class)


def test_only_what_fbgemms_cpu_kernels_do_exactly_is_fused() -> None:
    fused = {name for name, made in OPTIMIZERS.items() if made is not None and made.fused}
    assert fused == {"SGD", "Adagrad", "RowWiseAdagrad"}
    for kind in (optim.SGD, optim.Adagrad, optim.RowWiseAdagrad):
        assert not kind(lr=0.1, weight_decay=0.1).fused
        assert not kind(lr=0.1, max_gradient=1.0).fused
    assert not optim.SGD(lr=0.1, momentum=0.9).fused


def test_a_plan_counts_the_state_of_momentum_and_comes_back_from_its_file(tmp_path: Any) -> None:
    def model_of(optimizer: optim.SparseOptimizer) -> torchrec.EmbeddingBagCollection:
        table = se.TableConfig(
            name="t",
            num_embeddings=10,
            embedding_dim=8,
            feature_names=("t",),
            optimizer=optimizer,
        )
        return se.EmbeddingBagCollection([table])

    env = Env(world_size=2)
    plain, moving = model_of(optim.SGD(lr=0.1)), model_of(optim.SGD(lr=0.1, momentum=0.5))
    plans = [se.plan_sharding(model, env, {"t": layouts.row_wise()}) for model in (plain, moving)]
    assert [plan.tables[0].shards[1].optimizer_bytes for plan in plans] == [0, 5 * 8 * 4]
    plans[1].save(tmp_path / "plan.json")
    assert se.load_plan(tmp_path / "plan.json", moving, env) == plans[1]
    text = "optimizer is 'SGD', the plan was made for 'SGD with momentum'"
    with pytest.raises(ValueError, match=text):
        se.load_plan(tmp_path / "plan.json", plain, env)
