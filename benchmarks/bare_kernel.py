"""shardemb's kernels for the CPU without TorchRec, autograd or optimizer: what they cost alone."""

# B batch, D width of all tables together, R rows

import ctypes
from itertools import cycle

import torch
from torchrec import KeyedJaggedTensor

from benchmarks.cases import EMBEDDING_DIM, LR, OPTIMIZERS, START, Batches, Case
from benchmarks.contenders import Step
from shardemb.env import Env
from shardemb.huge_pages import zeros_huge
from shardemb.native.kernels import OPTIMIZERS as NUMBERED
from shardemb.native.kernels import Bags, Block, Blocks, Merged, Training


class Tables:
    """The tables of a case, for the kernels to look up in.

    Args:
        case: With a table for each feature.
    """

    def __init__(self, case: Case) -> None:
        shape = case.num_embeddings, EMBEDDING_DIM
        self.weights = [zeros_huge(shape).fill_(START) for _ in case.names]
        self.blocks = Blocks(
            [
                Block(
                    weight_RD=weight_RD,
                    first_feature=number,
                    num_features=1,
                    first_column=number * EMBEDDING_DIM,
                )
                for number, weight_RD in enumerate(self.weights)
            ]
        )

    def look_up(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """Sums of rows [B, D]."""
        return self.blocks.look_up(bags_of(batch))


def bags_of(batch: KeyedJaggedTensor) -> Bags:
    """The ids of a batch, as the kernels take them."""
    return Bags(
        ids_N=batch.values(),
        offsets=batch.offsets(),
        weights_N=None,
        num_features=len(batch.keys()),
        pooling="sum",
    )


class State:
    """The optimizer's state of the tables, and how they are trained.

    Args:
        case: Of the tables.
    """

    def __init__(self, case: Case) -> None:
        self.config = OPTIMIZERS[case.optimizer]
        elements = case.num_embeddings, EMBEDDING_DIM
        self.tensors = [
            {
                name: zeros_huge(elements if per == "element" else elements[:1])
                for name, per in self.config.state.items()
            }
            for _ in case.names
        ]
        self.num_updates = 0

    def trainings(self) -> "ctypes.Array[Training]":
        """Of each table, for the next update."""
        self.num_updates += 1
        return (Training * len(self.tensors))(
            *(self._training(tensors) for tensors in self.tensors)
        )

    def _training(self, tensors: dict[str, torch.Tensor]) -> Training:
        beta1, beta2 = getattr(self.config, "betas", (0.9, 0.999))
        fields = {"momentum": "momentum1", "square": "exp_avg_sq"}
        return Training(
            lr=LR,
            eps=getattr(self.config, "eps", 0.0),
            beta1=beta1,
            beta2=beta2,
            max_gradient=-1.0,
            correction1=1 - beta1**self.num_updates,
            correction2=(1 - beta2**self.num_updates) ** 0.5,
            scale=1.0,
            embedding_dim=EMBEDDING_DIM,
            padding_row=-1,
            num_updates=self.num_updates,
            optimizer=NUMBERED.index(type(self.config).__name__),
            **{of: tensors[name].data_ptr() for of, name in fields.items() if name in tensors},
        )


def bare_kernel(case: Case, batches: Batches, env: Env) -> Step:  # noqa: ARG001 - as others are
    """A step of them; what the loss and its gradient cost is in it, as it is for the others."""
    tables, state, upcoming = Tables(case), State(case), cycle(batches)
    merged = Merged(tables.blocks)

    def step() -> torch.Tensor:
        bags = bags_of(next(upcoming))
        pooled_BD = tables.blocks.look_up(bags)
        loss = pooled_BD.mean()
        grad_BD = torch.full_like(pooled_BD, 1 / pooled_BD.numel())
        merged.sort([(bags, grad_BD)])
        merged.update(state.trainings())
        return loss

    return step
