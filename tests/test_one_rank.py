"""What one rank does not pay for, and that its dense parameters train all the same."""

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from tests.spmd import spmd


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = se.TableConfig(
            name="t",
            num_embeddings=10,
            embedding_dim=4,
            feature_names=("f",),
            optimizer=optim.SGD(lr=0.5),
        )
        self.tables = se.EmbeddingBagCollection([table])
        self.over = nn.Linear(4, 1)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        loss: torch.Tensor = self.over(self.tables(batch).values()).mean()
        return loss


def counted(env: Env) -> tuple[dict[str, int], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collectives of a step by kind; what rows it read; the dense weight before and after."""
    model = Model()
    model = se.shard_modules(
        model, se.plan_sharding(model, env, {"t": layouts.table_wise(rank=0)}), env
    )
    optimizer = se.build_optimizer(model, dense=lambda p: torch.optim.SGD(p, lr=0.5))
    batch = KeyedJaggedTensor(["f"], torch.tensor([3, 4]), lengths=torch.tensor([1, 1]))
    with torch.no_grad():
        pooled = model.module.tables(batch).values().clone()
    before = model.module.over.weight.detach().clone()
    with se.CollectiveCounter() as counter:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    calls = {kind: count.num_calls for (kind, _), count in counter.counts.items()}
    return calls, pooled, before, model.module.over.weight.detach()


@spmd(world_size=1)
def test_one_rank_averages_no_dense_gradients_and_trains_them(env: Env) -> None:
    calls, pooled, before, after = counted(env)
    assert "all_reduce" not in calls
    torch.testing.assert_close(after, before - 0.5 * pooled.mean(0, keepdim=True))
    assert not torch.equal(after, before)


@spmd(world_size=2)
def test_two_ranks_average_dense_gradients(env: Env) -> None:
    calls, pooled, before, after = counted(env)
    assert calls["all_reduce"] >= 2  # the dense gradients, and whether the step is taken
    torch.testing.assert_close(after, before - 0.5 * pooled.mean(0, keepdim=True))
