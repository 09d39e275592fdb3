"""What training does to the tables: ids, rows touched and never touched, norms of gradients."""

# T tables, R rows of a block, U touched rows

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shardemb.exchange import exchange_group
from shardemb.optimizer import Optimizer, StepGradients
from shardemb.text import format_table
from shardemb.updates.shard_rows import ShardRows

_IDS, _ROWS, _NEVER, _ALL, _SQUARE = range(5)


@dataclass(frozen=True, kw_only=True)
class TableHealth:
    """A trained table in one step. Frozen rows and padding rows count nowhere but as embeddings.

    Attributes:
        name: Of the table.
        num_ids: Ids that were looked up, on all ranks and in all backward passes of the step.
        num_rows: Distinct rows among them.
        num_never_touched: Rows that no step looked up since the counting began.
        num_embeddings: Rows of the table.
        grad_norm: Norm of its gradient, before clipping.
    """

    name: str
    num_ids: int
    num_rows: int
    num_never_touched: int
    num_embeddings: int
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """The last step on all ranks, as `TrainingHealth.report` returns it.

    Attributes:
        step: Number of the step.
        since_step: The step after which the counting of never touched rows began.
        tables: The trained tables, as declared.
        grad_norm: Norm of all gradients together, before clipping.
        dense_grad_norm: That of the dense parameters.
    """

    step: int
    since_step: int
    tables: tuple[TableHealth, ...]
    grad_norm: float
    dense_grad_norm: float

    def __str__(self) -> str:
        rows = [
            (
                table.name,
                f"{table.num_ids:,}",
                f"{table.num_rows:,}",
                f"{table.num_never_touched:,}",
                f"{table.num_embeddings:,}",
                f"{table.num_never_touched / table.num_embeddings:.1%}",
                f"{table.grad_norm:.3g}",
            )
            for table in self.tables
        ]
        header = ("table", "ids", "rows", "never touched", "of", "share", "gradient norm")
        return (
            f"step {self.step:,}: gradient norm {self.grad_norm:.3g}, of dense parameters "
            f"{self.dense_grad_norm:.3g}; rows never touched since step {self.since_step:,}\n"
            f"{format_table(header, rows, right=range(1, len(header)))}"
        )


class TrainingHealth:
    """Counts what every step does to the tables from now on.

    It keeps a byte for each row, of which a step reads and writes those of the rows it touches.
    While it counts, no updates are left to FBGEMM's fused kernels, which do not tell the rows; the
    native ones tell them, and go on updating.

    Args:
        optimizer: Of `build_optimizer`.

    Example:
        >>> import shardemb as se
        >>> env = se.init_distributed(device="cpu")
        >>> user = se.TableConfig(
        ...     name="user", num_embeddings=10, embedding_dim=4, feature_names=("user_id",)
        ... )
        >>> model = torch.nn.Sequential(se.EmbeddingBagCollection([user]))
        >>> model = se.shard_modules(model, se.plan_sharding(model, env), env)
        >>> optimizer = se.build_optimizer(model)
        >>> health = TrainingHealth(optimizer)
        >>> batch = se.keyed_jagged_tensor({"user_id": [[3, 5], [3]]}, [user])
        >>> model(batch).values().sum().backward()
        >>> optimizer.step()
        >>> print(health.report())
        step 1: gradient norm 4.47, of dense parameters 0; rows never touched since step 0
        table  ids  rows  never touched  of  share  gradient norm
        user     3     2              8  10  80.0%           4.47
    """

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [group for _, group in optimizer.rows.named_groups]
        self._numbers_T5 = torch.zeros(
            len(groups) + 1, 5, dtype=torch.float64, device=optimizer.rows.device
        )  # the last is of the dense parameters
        self._number_of = {group["table"]: number for number, group in enumerate(groups)}
        self._step = self._since_step = optimizer.num_steps
        self._never_R: dict[tuple[str, int], torch.Tensor] = {}
        for rows in optimizer.rows.blocks:
            if _counts_here(rows):
                held_RD = rows.weight_RD
                never_R = rows.moves(torch.arange(len(held_RD), device=held_RD.device))
                self._never_R[rows.table, rows.first_row] = never_R
                numbers_5 = self._numbers_T5[self._number_of[rows.table]]
                numbers_5[_NEVER] += never_R.sum()
                numbers_5[_ALL] += len(never_R)
        optimizer.watch(self._count)

    def report(self) -> HealthReport:
        """The numbers of the last step. On all ranks together.

        Returns:
            The same on every rank.
        """
        numbers_T5 = self._numbers_T5.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers_T5, group=exchange_group(numbers_T5.device))
        *of_tables, dense = numbers_T5.tolist()
        return HealthReport(
            step=self._step,
            since_step=self._since_step,
            tables=tuple(
                TableHealth(
                    name=name,
                    num_ids=int(numbers[_IDS]),
                    num_rows=int(numbers[_ROWS]),
                    num_never_touched=int(numbers[_NEVER]),
                    num_embeddings=int(numbers[_ALL]),
                    grad_norm=math.sqrt(numbers[_SQUARE]),
                )
                for name, numbers in zip(self._number_of, of_tables, strict=True)
            ),
            grad_norm=math.sqrt(math.fsum(numbers[_SQUARE] for numbers in (*of_tables, dense))),
            dense_grad_norm=math.sqrt(dense[_SQUARE]),
        )

    def _count(self, gradients: StepGradients) -> None:
        self._step = gradients.step
        self._numbers_T5[:, [_IDS, _ROWS, _SQUARE]] = 0
        if dist.get_rank() == 0:
            self._numbers_T5[-1, _SQUARE] = gradients.dense_square
        for (rows, (rows_U, _, counts_U)), square in zip(
            gradients.touched, gradients.squares, strict=True
        ):
            numbers_5 = self._numbers_T5[self._number_of[rows.table]]
            if not rows.replicated or dist.get_rank() == 0:
                numbers_5[_SQUARE] += square
            if rows.first_column == 0:  # other slices of the columns have the same ids
                numbers_5[_IDS] += counts_U.sum()
            if _counts_here(rows):
                never_R = self._never_R[rows.table, rows.first_row]
                numbers_5[_ROWS] += len(rows_U)
                numbers_5[_NEVER] -= never_R[rows_U].sum()
                never_R.index_fill_(0, rows_U, value=False)


def _counts_here(rows: ShardRows) -> bool:
    """Whether it is this rank and block that counts the rows, of those that have the same."""
    return rows.first_column == 0 and (not rows.replicated or dist.get_rank() == 0)
