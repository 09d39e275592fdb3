"""What from_torch refuses, by name, leaving the model as it was, and what its modules refuse."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.utils import parametrizations, prune, weight_norm

import shardemb as se
from shardemb import optim

SGD = optim.SGD(lr=0.1)


class Scaled(nn.EmbeddingBag):
    """A subclass, of which nobody knows what it computes."""


class Model(nn.Module):
    """An item table, a user table that is asked for, and a projection as wide as the items are."""

    def __init__(self, user: nn.Module | None = None) -> None:
        super().__init__()
        self.item = nn.EmbeddingBag(10, 8)
        self.user = user or nn.Embedding(10, 8)
        self.out = nn.Linear(8, 10, bias=False)


def hooked() -> nn.Module:
    module = nn.Embedding(9, 8)
    module.weight.register_hook(lambda grad: grad * 2)
    return module


def stepping() -> nn.Module:
    module = nn.Embedding(9, 8)
    weight = module.weight
    weight.register_post_accumulate_grad_hook(lambda _: None)
    return module


def updated_in_backward() -> nn.Module:
    module = nn.Embedding(9, 8)
    _apply_optimizer_in_backward(torch.optim.SGD, [module.weight], {"lr": 0.1})
    return module


def compiled() -> nn.Module:
    module = nn.Embedding(9, 8)
    module.compile()
    return module


class Rows(nn.Parameter):
    """A parameter that may be anything."""


def of_other_parameter() -> nn.Module:
    module = nn.Embedding(9, 8)
    module.weight = Rows(module.weight.data)
    return module


def of_other_forward() -> nn.Module:
    module = nn.Embedding(9, 8)
    module.forward = lambda ids: ids  # type: ignore[assignment,method-assign]
    return module


def quantized() -> nn.Module:
    from torch.ao.nn.quantized import EmbeddingBag

    bag: nn.Module = EmbeddingBag(10, 12)
    return bag


MODULES: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.EmbeddingBag(9, 8, mode="max"), "mode='max' is not supported; use 'sum' or 'me"),
    (lambda: nn.Embedding(9, 8, max_norm=1.5), "max_norm=1.5 is not supported"),
    (lambda: nn.EmbeddingBag(9, 8, max_norm=2.0), "max_norm=2.0 is not supported"),
    (lambda: nn.Embedding(9, 8, scale_grad_by_freq=True), "scale_grad_by_freq=True is not supp"),
    (
        lambda: nn.Embedding(9, 0),
        "embedding_dim must be a positive integer, got 0; give its rows",
    ),
    (lambda: nn.Embedding(9, 8, device="meta"), "its weight is on meta, and has no rows to carry"),
    (lambda: nn.Embedding(9, 8).double(), "its weight is torch.float64, the kernels have float32"),
    (lambda: Scaled(9, 8), r"Scaled may compute something else than nn\.EmbeddingBag; use that"),
    (quantized, "EmbeddingBag may compute something else than"),
    (lambda: parametrizations.orthogonal(nn.Embedding(9, 8)), "its weight is parametrized"),
    (lambda: weight_norm(nn.Embedding(9, 8)), r"it holds \['weight_g', 'weight_v'\], and not just"),
    (lambda: prune.identity(nn.Embedding(9, 8), "weight"), r"it holds \['weight_orig', 'weight_m"),
    (of_other_forward, "its forward was replaced or compiled"),
    (compiled, "its forward was replaced or compiled"),
    (of_other_parameter, r"its weight is a Rows, and not a plain nn\.Parameter"),
    (updated_in_backward, "its weight has an optimizer in the backward pass"),
    (hooked, "its weight has gradient hooks"),
    (stepping, "its weight has gradient hooks"),
]


@pytest.mark.parametrize(("make", "text"), MODULES)
def test_a_module_that_sharding_would_change_is_refused_or_skipped(
    make: Callable[[], nn.Module], text: str
) -> None:
    model = Model(make())
    before = list(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match=f"^module 'user': .*{text}") as caught:
        se.from_torch(model, SGD)
    assert "skip=('user',)" in str(caught.value)
    assert before == (list(model.state_dict()), repr(model))
    assert not hasattr(model.item.weight, "_optimizer_classes")
    se.from_torch(model, SGD, skip=["user"])
    assert hasattr(model.item, "collection")
    assert not hasattr(model.user, "collection")


def tied_to_dense(model: Model) -> None:
    model.out.weight = model.user.weight  # type: ignore[assignment]


def tied_modules(model: Model) -> None:
    model.user.weight = model.item.weight


def tied_by_memory(model: Model) -> None:
    model.user.weight = nn.Parameter(model.out.weight.data)


def held_twice(model: Model) -> None:
    model.other = model.user


def held_twice_by_its_parent(model: Model) -> None:
    model.towers = nn.ModuleList([nn.Sequential(tower := nn.Embedding(9, 4)), nn.Sequential(tower)])


def of_one_name(model: Model) -> None:
    model.a = nn.ModuleDict({"b_c": nn.Embedding(9, 4)})
    model.a_b = nn.ModuleDict({"c": nn.Embedding(9, 4)})


TIES: list[tuple[Callable[[Model], None], str]] = [
    (tied_to_dense, r"module 'user': its weight is tied to 'out\.weight'"),
    (tied_modules, r"module 'item': its weight is tied to 'user\.weight'"),
    (tied_by_memory, r"module 'user': its weight is tied to 'out\.weight'"),
    (held_twice, "one module is in the model twice, as 'user' and 'other'"),
    (held_twice_by_its_parent, r"in the model twice, as 'towers\.0\.0' and 'towers\.1\.0'"),
    (of_one_name, r"modules 'a\.b_c' and 'a_b\.c' would both be table 'a_b_c'; rename one"),
]


@pytest.mark.parametrize(("tie", "text"), TIES)
def test_a_weight_or_name_of_two_modules_is_refused(
    tie: Callable[[Model], None], text: str
) -> None:
    model = Model()
    tie(model)
    before = repr(model)
    with pytest.raises(ValueError, match=text):
        se.from_torch(model, SGD)
    assert repr(model) == before


def test_frozen_weights_may_share_memory() -> None:
    rows = torch.rand(9, 4)
    model = nn.ModuleList([nn.Embedding.from_pretrained(rows), nn.Embedding.from_pretrained(rows)])
    se.from_torch(model, SGD)
    assert torch.equal(model[1](torch.arange(9)), rows)
    either = [nn.Embedding.from_pretrained(rows, freeze=freeze) for freeze in (True, False)]
    with pytest.raises(ValueError, match=r"module '0': its weight is tied to '1\.weight'"):
        se.from_torch(nn.ModuleList(either), SGD)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"skip": ["usr"]},
        "skip names 'usr', and the modules are 'item', 'user'; did you mean 'user'",
    ),
    ({"skip": "user"}, r"skip must hold paths, got the string 'user'; use \('user',\)"),
    ({"skip": 5}, "skip must hold paths, or be a test of them, got 5"),
    ({"weighted": None}, "weighted must hold paths, or be a test of them, got None"),
    ({"skip": [""]}, r"holds no nn\.EmbeddingBag .* to convert, but those that skip leaves out"),
    ({"weighted": ["item"]}, "module 'item' is a mean bag, and only sum bags take per_sample_wei"),
    ({"weighted": ["user"]}, "module 'user' is no bag, and only sum bags take per_sample_weights"),
    ({"optimizer": {"item": SGD}}, "module 'user' has no optimizer; add it to those by path"),
    ({"optimizer": {"": SGD, "itm": SGD}}, "optimizer names 'itm', .* did you mean 'item'"),
    ({"optimizer": {"user": 0.1}}, r"optimizer of 'user' must be one of shardemb\.optim, such"),
    ({"optimizer": torch.optim.SGD}, r"optimizer must be one of shardemb\.optim, such as"),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS)
def test_an_option_that_names_nothing_is_refused(options: dict[str, Any], text: str) -> None:
    model = Model()
    before = repr(model)
    with pytest.raises(ValueError, match=text):
        se.from_torch(model, **{"optimizer": SGD} | options)
    assert repr(model) == before


def test_models_without_torch_s_embeddings_are_refused_and_torchrec_s_left_alone() -> None:
    for thing in (None, 5, nn.Embedding):
        with pytest.raises(ValueError, match="model must be a torch module, got "):
            se.from_torch(thing, SGD)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"Linear holds no nn\.EmbeddingBag or nn\.Embedding"):
        se.from_torch(nn.Linear(4, 4), SGD)
    table = se.TableConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=("t",))
    collection = se.EmbeddingBagCollection([table], device="cpu")
    model = nn.ModuleDict({"ours": collection, "torch_s": nn.Embedding(9, 4)})
    before = repr(collection)
    se.from_torch(model, SGD)
    assert repr(model["ours"]) == before
    assert list(model.state_dict())[1] == "torch_s.collection.embeddings.torch_s.weight"


IDS = torch.tensor([1, 2, 3])
ENDS = torch.tensor([0, 2])
NESTED = torch.nested.nested_tensor([IDS, IDS[:1]], layout=torch.jagged)
CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("item", {"input": IDS.float(), "offsets": ENDS}, "input must be int32 or int64, got torch.fl"),
    ("user", {"input": IDS.float()}, "input must be int32 or int64, got torch.float32"),
    ("item", {"input": [1, 2]}, r"input must be a tensor, got \[1, 2\]; make one of it"),
    ("user", {"input": None}, "input must be a tensor, got None"),
    ("item", {"input": IDS, "offsets": [0, 2]}, r"offsets must be a tensor, got \[0, 2\]"),
    (
        "last",
        {"input": IDS.view(1, 3), "per_sample_weights": 2.0},
        "weights must be a tensor, got 2",
    ),
    (
        "item",
        {"input": IDS * 5, "offsets": ENDS},
        r"id 10 of sample 0 is outside 0\.\.9; .* 10 rows",
    ),
    ("user", {"input": -IDS}, r"id -1 of sample 0 is outside 0\.\.9; the module has 10 rows, mend"),
    ("item", {"input": NESTED}, "input is a nested tensor, which is not supported"),
    ("item", {"input": IDS}, r"input must be \[N\] with offsets \[B\], or \[B, L\] without"),
    ("item", {"input": IDS.view(1, 3), "offsets": ENDS}, r"got input \[1, 3\] and offsets \[2\]"),
    ("item", {"input": IDS, "offsets": ENDS.float()}, "offsets must be integers, got torch.float"),
    ("item", {"input": IDS, "offsets": ENDS + 1}, r"offsets must rise from 0 to .* got \[1, 3\]"),
    ("item", {"input": IDS, "offsets": torch.tensor([0, 3, 2])}, "offsets must rise from 0 to"),
    ("last", {"input": IDS, "offsets": ENDS}, r"at most the 3 ids, and end there, got \[0, 2\]"),
    ("last", {"input": IDS[:0], "offsets": ENDS[:0]}, r"and end there, got \[\]"),
    (
        "item",
        {"input": IDS, "offsets": ENDS, "per_sample_weights": torch.rand(3)},
        r"its table is not made for them; name it in from_torch\(\.\.\., weighted=\('item',\)\)",
    ),
    (
        "last",
        {"input": IDS.view(1, 3), "per_sample_weights": torch.rand(3)},
        r"per_sample_weights must have the shape of input, \[1, 3\], got \[3\]",
    ),
]


@pytest.mark.parametrize(("path", "call", "text"), CALLS)
def test_a_call_that_torch_or_sharding_cannot_honour_is_refused(
    path: str, call: dict[str, Any], text: str
) -> None:
    model = Model()
    model.last = nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True)
    se.from_torch(model, SGD, weighted=["last"])
    with pytest.raises(ValueError, match=f"^module '{path}': .*{text}"):
        model.get_submodule(path)(**call)


def test_a_copy_of_a_converted_model_is_refused_by_the_plan_and_not_left_untrained() -> None:
    model = copy.deepcopy(se.from_torch(Model(), SGD))
    with pytest.raises(ValueError, match="table 'item' has no optimizer, and needs one"):
        se.plan_sharding(model, se.Env())
