"""What the config of every sparse optimizer has: checked fields, and state of a known size."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

Per = Literal["row", "element"]
"""What has a float32 of a state tensor of its own."""


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a positive number", _is_positive),
    "eps": ("a positive number", _is_positive),
    "eta": ("a positive number", _is_positive),
    "momentum": ("a number in [0, 1)", _is_fraction),
    "weight_decay": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "max_gradient": ("a positive number or None", lambda v: v is None or _is_positive(v)),
    "betas": (
        "two numbers in [0, 1)",
        lambda value: (
            isinstance(value, tuple) and len(value) == 2 and all(map(_is_fraction, value))
        ),
    ),
}
"""What each field must be."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of every sparse optimizer, and what others need to know of it.

    Attributes:
        lr: Learning rate.
        weight_decay: Added to the gradient as `weight_decay * w`, unless the optimizer says
            otherwise; of touched rows only.
        max_gradient: The summed gradient of a row is scaled down to at most this L2 norm, over all
            of its columns, before all else. FBGEMM's option of that name clamps each element of the
            gradient of the output instead.

    Raises:
        ValueError: A field is out of its range.
    """

    lr: float
    weight_decay: float = 0.0
    max_gradient: float | None = None
    torchrec_class: ClassVar[str]
    """The class in `torchrec.optim` by which TorchRec picks FBGEMM's fused kernel."""
    _state: ClassVar[Mapping[str, Per]]
    _fused_on_cpu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            rule, holds = _RULES[field.name]
            if not holds(value):
                raise ValueError(
                    f"{type(self).__name__}: {field.name} must be {rule}, got {value!r}"
                )

    @property
    def state(self) -> dict[str, Per]:
        """Its state tensors in order: what of a table has a float32 of each."""
        return dict(self._state)

    @property
    def plan_name(self) -> str:
        """The name that a plan has for it; state tensors follow from that name."""
        return type(self).__name__

    @property
    def fused(self) -> bool:
        """Whether FBGEMM's fused update does exactly this, on CPU and CUDA."""
        return self._fused_on_cpu and self.weight_decay == 0 and self.max_gradient is None

    def state_bytes(self, num_rows: int, embedding_dim: int) -> int:
        """Bytes of optimizer state of a table or shard of that shape."""
        per_row = {"row": 4, "element": 4 * embedding_dim}
        return num_rows * sum(per_row[per] for per in self.state.values())
