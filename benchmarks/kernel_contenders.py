"""Who looks up and updates rows in `kernels.py`, from bare kernels to sharded models."""

# B batch, D width of all tables together

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.bare_kernel import bare_kernel
from benchmarks.cases import EMBEDDING_DIM, LR, START, Batches, Case, zipf_batches
from benchmarks.contenders import (
    OWN_LOOP,
    PIPELINE,
    PLAIN,
    TORCHREC,
    Step,
    loop,
    pipeline,
    plain,
    shardemb,
    torchrec_directly,
)
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice

FBGEMM, ON_FBGEMM, BARE, LOSS = (
    "FBGEMM used directly",
    'shardemb, kernel="fbgemm"',
    "shardemb's bare kernel",
    "the loss alone",
)
FBGEMM_OPTIMIZERS = {
    "SGD": EmbOptimType.EXACT_SGD,
    "Adagrad": EmbOptimType.EXACT_ADAGRAD,
    "RowWiseAdagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


def fbgemm_tables(case: Case) -> Any:
    """FBGEMM's tables, which update their rows in the backward."""
    spec = (case.num_embeddings, EMBEDDING_DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [spec] * case.num_tables,
        optimizer=FBGEMM_OPTIMIZERS[case.optimizer],
        learning_rate=LR,
        eps=1e-8,
        device="cpu",
    )
    tables.init_embedding_weights_uniform(START, START)
    return tables


def fbgemm(case: Case, batches: Batches, env: Env) -> Step:  # noqa: ARG001 - called as the others
    """A step of them; its offsets are at hand, as for all others."""
    tables, upcoming = fbgemm_tables(case), cycle(batches)

    def step() -> torch.Tensor:
        batch = next(upcoming)
        loss: torch.Tensor = tables(batch.values(), batch.offsets()).mean()
        loss.backward()
        return loss.detach()

    return step


def loss_alone(case: Case, batches: Batches, env: Env) -> Step:  # noqa: ARG001 - as above
    """The loss of pooled features that are there already, and its gradient."""
    pooled_BD = torch.ones(case.batch_size, case.num_tables * EMBEDDING_DIM, requires_grad=True)

    def step() -> torch.Tensor:
        pooled_BD.grad = None
        loss = pooled_BD.mean()
        loss.backward()
        return loss.detach()

    return step


def own_loop(case: Case, batches: Batches, env: Env, *, kernel: KernelChoice = "auto") -> Step:
    """A step of shardemb's sharded model by a kernel."""
    return loop(*shardemb(case, env, kernel=kernel), batches)


def own_pipeline(case: Case, batches: Batches, env: Env) -> Step:
    """A step of a TrainPipeline over the same."""
    return pipeline(*shardemb(case, env), batches, env)


Make = Callable[[Case, Batches, Env], Step]
CONTENDERS: dict[str, Make] = {
    OWN_LOOP: own_loop,
    PIPELINE: own_pipeline,
    BARE: bare_kernel,
    ON_FBGEMM: partial(own_loop, kernel="fbgemm"),
    FBGEMM: fbgemm,
    TORCHREC: torchrec_directly,
    PLAIN: plain,
    LOSS: loss_alone,
}
ONLY_FUSED = (FBGEMM, TORCHREC)
"""Those without Adam on CPU."""


def steps_of(case: Case, names: Sequence[str], env: Env) -> dict[str, Step]:
    """A step of each of the contenders that are named."""
    batches = zipf_batches(case, env)
    return {name: CONTENDERS[name](case, batches, env) for name in names}
