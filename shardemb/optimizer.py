"""One optimizer for all tables and the dense parameters of a sharded model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from shardemb.errors import RunError
from shardemb.exchange import exchange_group
from shardemb.updates.faults import WAY_OUT, Fault, fault_of, largest_of, raise_first
from shardemb.updates.row_optimizer import RowOptimizer, Touched
from shardemb.updates.settings import Settings, fault_of_difference, settings_of
from shardemb.updates.shard_rows import NewRows, ShardRows
from shardemb.updates.trained import Backwards

FUSED, DENSE = "fused", "dense"
"""Prefixes of the parameter names in the combined optimizer."""


@dataclass(frozen=True, kw_only=True)
class StepGradients:
    """What a step is about to apply, on this rank and before clipping.

    Attributes:
        step: Number of the step.
        touched: The blocks of tables that were looked up, with the rows to update; of a table that
            every rank holds, those that any rank looked up.
        squares: For each, the sum of the squares of its gradients, float64 scalars.
        dense_square: That of the dense gradients, which are the same on every rank.
    """

    step: int
    touched: Touched
    squares: Sequence[torch.Tensor]
    dense_square: torch.Tensor


class Optimizer(CombinedOptimizer):  # type: ignore[misc]
    """TorchRec's `CombinedOptimizer` of all tables and of the dense parameters.

    What `torch.optim` does on parameters, it does on the rows that were looked up: gradients of all
    backward passes since the last `zero_grad` are summed, and `step` updates each row once. Its
    `param_groups` are one for each trained table, in the order of their declaration and the same on
    all ranks, then those of the dense optimizer. A table's group has "table", its name, the fields
    of its sparse optimizer, of which any may be changed by a scheduler or by hand, and "step", the
    number of its updates.

    Args:
        rows: Of the tables.
        dense: Of the dense parameters, if there are any.
        backwards: What watches the model's backward passes.
        max_norm: Largest norm of all gradients together.
    """

    def __init__(
        self,
        rows: RowOptimizer,
        dense: KeyedOptimizerWrapper | None,
        *,
        backwards: Backwards,
        max_norm: float | None,
    ) -> None:
        parts = [(FUSED, rows)] if dense is None else [(FUSED, rows), (DENSE, dense)]
        super().__init__(parts)
        self.rows, self.dense, self._backwards = rows, dense, backwards
        for name in ("betas", "momentum"):  # by which torch's schedulers know what they may cycle
            if self.param_groups and all(name in group for group in self.param_groups):
                self.defaults[name] = self.param_groups[0][name]
        self._settings = Settings(rows.declared, self.param_groups)
        self._max_norm = max_norm
        self._observers: list[Callable[[StepGradients], None]] = []
        self.grad_norm: torch.Tensor | None = None
        """Norm of all gradients of the last step, before clipping, float64 scalar; if it was
        clipped or watched."""

    @property
    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """The dense parameters by name."""
        return {} if self.dense is None else dict(self.dense.params)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's
        """Forgets all gradients.

        Args:
            set_to_none: As in torch, of dense parameters.
        """
        self.rows.zero_grad()
        self._backwards.paths.clear()
        if self.dense is not None:
            self.dense.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the rows that were looked up, and the dense parameters. On all ranks together.

        Args:
            closure: Computes the gradients first.

        Returns:
            What the closure returned.

        Raises:
            ValueError: A table's parameter group holds what its optimizer cannot take.
            RunError: On all ranks, when on any a setting, a gradient or an updated value is not
                finite. The message names the step, the table, the row and, where the rows are
                pooled or sharded, a sample that looked it up; or the parameter. Nothing of the
                step was applied then, unless the message says that the model is not to be saved:
                what a dense optimizer does is known afterwards only, and so is a row or state that
                something other than training made infinite or nan; that is told by its rank alone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settings.check()
        watched = self._max_norm is not None or bool(self._observers)
        touched = self.rows.touched(watched=watched)
        square = self._show(touched) if watched else self._number(0.0)
        scale = None
        if self._max_norm is not None:
            scale = self._clip(touched, square, self._max_norm)
        new = self.rows.updated(touched)
        digest = self._number(self._digest())
        doubt, square, digests, squares = self._over_ranks(
            self._doubt(touched, new), square, digest, digest.square()
        )
        if doubt > 0 or squares * dist.get_world_size() != digests.square():
            self._refuse(touched, new)
        if watched and self._max_norm is None:
            self.grad_norm = square.sqrt()
        if self.dense is not None:
            for grad in self._dense_grads().values() if scale is not None else ():
                grad.mul_(scale.to(grad))  # type: ignore[union-attr]
            self.dense.step()
            self._check_dense()
        left = self.rows.write(touched, new, scale=1.0 if scale is None else float(scale))
        self._backwards.paths.clear()
        if left is not None:
            self._refuse_saving(*left)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's `GradScaler` asks for.

        Raises:
            ValueError: It asks.
        """
        raise ValueError(
            "GradScaler cannot unscale the gradients of rows, which are no parameters' .grad; "
            "train without it, in float32 or in bfloat16 by torch.autocast"
        )

    def add_param_group(self, param_group: Any) -> None:
        """Not after the optimizer is made.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "the groups of tables are those of shard_modules, and the dense ones what `dense` of "
            "build_optimizer makes; give that all groups"
        )

    def watch(self, observer: Callable[[StepGradients], None]) -> None:
        """Shows the gradients of every step from now on, and sets `grad_norm`.

        With FBGEMM's kernels, which do not tell the rows that they update, our own update does it
        from now on; the native ones tell them.

        Args:
            observer: Is called in each step, before anything is clipped or updated. What it is
                given it must not change.
        """
        self._observers.append(observer)

    def state_dict(self) -> dict[str, Any]:
        """All of its state.

        Returns:
            "state" by the names of parameters, as of any `CombinedOptimizer`, where tables lie with
            their `ShardedTensor`s; and "param_groups", the settings of the groups in their order.
        """
        groups = [settings_of(group) for group in self.param_groups]
        return {**super().state_dict(), "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` of an optimizer of the same tables and layouts gave.

        Args:
            state_dict: Of such an optimizer; `load_checkpoint` takes one of any layout.

        Raises:
            ValueError: It is of another optimizer.
        """
        groups = state_dict["param_groups"]
        mine = [(group.get("table"), group.get("optimizer")) for group in self.param_groups]
        theirs = [(group.get("table"), group.get("optimizer")) for group in groups]
        if mine != theirs:
            raise ValueError(
                f"the state is of parameter groups (table, optimizer) {theirs}, and this optimizer "
                f"has {mine}; load it into the optimizer it was saved from"
            )
        self.rows.load_state_dict({"state": _under(FUSED, state_dict["state"])})
        self.load_dense_state(_under(DENSE, state_dict["state"]))
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)

    def load_dense_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replaces all state of the dense optimizer by copies; none is given before its first step.

        Args:
            state: State tensors and values by the names of parameters.
        """
        if self.dense is None:
            return
        self.dense.state.clear()
        for name, entries in state.items():
            weight = self.dense_parameters[name]
            # torch keeps the step count on the CPU, and moments beside their parameter
            self.dense.state[weight] = {
                key: value.to(value.device if key == "step" else weight.device, copy=True)
                if isinstance(value, torch.Tensor)
                else value
                for key, value in entries.items()
            }

    def _show(self, touched: Touched) -> torch.Tensor:
        """Shows a step to those who watch; the sum of squares of what counts on this rank."""
        dense = self._number(0.0)
        for grad in self._dense_grads().values():
            dense += _square_of(grad)
        if self._observers:
            every = self.rows.with_those_of_kernels(touched)
            shown = StepGradients(
                step=self.num_steps + 1,
                touched=every,
                squares=[_square_of(gradients.grad_UD) for _, gradients in every],
                dense_square=dense,
            )
            for observer in self._observers:
                observer(shown)
        total = self._number(self.rows.square_of_kernels())
        for rows, gradients in touched:
            square = _square_of(gradients.grad_UD)
            if not rows.replicated or dist.get_rank() == 0:
                total += square
        return total + dense if dist.get_rank() == 0 else total

    def _clip(self, touched: Touched, square: torch.Tensor, max_norm: float) -> torch.Tensor:
        """Scales the gradients of rows so that the norm of all together is at most `max_norm`.

        Returns:
            By what dense gradients are to be scaled, when nothing speaks against the step.
        """
        (total,) = self._over_ranks(square)
        self.grad_norm = total.sqrt()
        if not torch.isfinite(total):
            self._refuse(touched, [None] * len(touched))
        # as torch.nn.utils.clip_grad_norm_
        scale = (max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for _, gradients in touched:
            gradients.grad_UD.mul_(scale.to(gradients.grad_UD))
        return scale

    def _doubt(self, touched: Touched, new: Sequence[NewRows]) -> torch.Tensor:
        """A number above 0 if anything on this rank may not be finite."""
        if self._fault_of_settings() is not None:
            return self._number(1.0)
        values = [
            rows.check(gradients, its) for (rows, gradients), its in zip(touched, new, strict=True)
        ] + largest_of(self._dense_grads())
        if not values:
            return self._number(0.0)
        return (~torch.isfinite(torch.stack(values))).any().double()

    def _fault_of_settings(self) -> Fault | None:
        return self._settings.fault or self.rows.fault_of_parameters()

    def _refuse(self, touched: Touched, new: Sequence[NewRows | None]) -> None:
        """Raises if anything on any rank is not finite. On all ranks together."""
        faults = [
            self._fault_of_settings(),
            fault_of_difference(self.param_groups, self._backwards.paths),
            self.rows.fault(touched, new),
            fault_of("the gradient of {}", self._dense_grads()),
        ]
        where = f"step {self.num_steps + 1}"
        raise_first(faults, where=where, rest="nothing of this step was applied")

    def _refuse_saving(self, rows: ShardRows, row: int) -> NoReturn:
        raise RunError(
            f"step {self.num_steps}: row {rows.first_row + row} of table {rows.table!r}, or its "
            "state, was not finite or would not be; that row was left as it was, and all else of "
            f"this step was applied; do not save the model; {WAY_OUT}"
        )

    def _check_dense(self) -> None:
        """Refuses updated dense parameters that are not finite; they are the same on all ranks.

        Raises:
            RunError: One is not.
        """
        values = {name: weight.detach() for name, weight in self.dense_parameters.items()}
        largest = largest_of(values)
        if largest and not torch.isfinite(torch.stack(largest)).all():
            fault = fault_of("parameter {}", values)
            assert fault is not None
            raise RunError(
                f"step {self.num_steps + 1}: {fault.what}; do not save the model; {WAY_OUT}"
            )

    def _dense_grads(self) -> dict[str, torch.Tensor]:
        """The values of the dense parameters' gradients, also of those that torch keeps sparse."""
        grads = {}
        for name, parameter in self.dense_parameters.items():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                grads[name] = parameter.grad.values()
            elif parameter.grad is not None:
                grads[name] = parameter.grad
        return grads

    @property
    def num_steps(self) -> int:
        """Updates of the tables so far."""
        groups = self.rows.named_groups
        return int(groups[0][1]["step"]) if groups else 0

    def _digest(self) -> float:
        """Of what ranks must have the same; a single rank differs from none."""
        if dist.get_world_size() == 1:
            return 0.0
        return float(self._settings.digest(self._backwards.paths))

    def _over_ranks(self, *numbers: torch.Tensor) -> torch.Tensor:
        """Sums over ranks, float64."""
        total = torch.stack(numbers)
        if dist.get_world_size() > 1:
            dist.all_reduce(total, group=exchange_group(total.device))
        return total

    def _number(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.rows.device)


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of one part, by its own names."""
    return {
        name.removeprefix(f"{prefix}."): entry
        for name, entry in state.items()
        if name.startswith(f"{prefix}.")
    }


def _square_of(grad: torch.Tensor) -> torch.Tensor:
    square: torch.Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    return square
