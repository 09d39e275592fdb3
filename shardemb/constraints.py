"""What a plan must keep to beside named layouts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from shardemb.layouts import LAYOUTS, Layout

DEFAULT_HEADROOM = 0.15


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a plan must keep to, whoever chooses the layouts.

    Attributes:
        layouts: By table, the layouts that it may have: TorchRec's names, or values of
            `shardemb.layouts` without ranks or nodes. They are kept as names.
        ranks: By table, the ranks that may hold any of it.
        colocate: Groups of tables that must have one layout, on the same ranks.
        replicate: Tables that every rank must hold: `data_parallel`.
        headroom: The part of each rank's memory that stays free of tables and their optimizer
            state: for activations, the dense model, and what else runs there.

    Raises:
        ValueError: A field is out of its range, or a group is not one.

    Example:
        >>> Constraints(layouts={"user": ["row_wise"]}, headroom=0.3).layouts["user"]
        ('row_wise',)
    """

    layouts: Mapping[str, Sequence[str | Layout]] = field(default_factory=dict)
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    colocate: Sequence[Sequence[str]] = ()
    replicate: Sequence[str] = ()
    headroom: float = DEFAULT_HEADROOM

    def __post_init__(self) -> None:
        is_number = isinstance(self.headroom, (int, float)) and not isinstance(self.headroom, bool)
        if not is_number or not 0 <= self.headroom < 1:
            raise ValueError(
                "constraints: headroom must be the part of memory that stays free, from 0 to less "
                f"than 1, got {self.headroom!r}"
            )
        for name in ("layouts", "ranks"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(
                    f"constraints: {name} must be lists by table, such as {{'user': "
                    f"{['row_wise'] if name == 'layouts' else [0, 1]}}}, got "
                    f"{getattr(self, name)!r}"
                )
            given = {
                table: _tuple(values, f"{name} of table {table!r}")
                for table, values in getattr(self, name).items()
            }
            object.__setattr__(self, name, given)
        groups = tuple(
            _tuple(group, "a group of colocate")
            for group in _tuple(self.colocate, "colocate", may_be_empty=True)
        )
        object.__setattr__(self, "colocate", groups)
        object.__setattr__(
            self, "replicate", _tuple(self.replicate, "replicate", may_be_empty=True)
        )
        self._check_names()
        self._name_layouts()
        self._check_ranks()
        self._check_groups()

    def _check_names(self) -> None:
        for name, tables in (
            ("layouts", self.layouts),
            ("ranks", self.ranks),
            ("colocate", [table for group in self.colocate for table in group]),
            ("replicate", self.replicate),
        ):
            for table in tables:
                if not isinstance(table, str):
                    raise ValueError(f"constraints: {name} must name tables, got {table!r}")

    def _name_layouts(self) -> None:
        """Puts names for layouts."""
        names = {
            table: tuple(_layout_name(table, given) for given in layouts)
            for table, layouts in self.layouts.items()
        }
        object.__setattr__(self, "layouts", names)

    @property
    def layout_names(self) -> Mapping[str, Sequence[str]]:
        """By table, TorchRec's names of the layouts that it may have."""
        return cast("Mapping[str, Sequence[str]]", self.layouts)

    def _check_ranks(self) -> None:
        for table, ranks in self.ranks.items():
            for rank in ranks:
                if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                    raise ValueError(
                        f"constraints: ranks of table {table!r} must be numbers from 0, got "
                        f"{rank!r}"
                    )

    def _check_groups(self) -> None:
        together = [table for group in self.colocate for table in group]
        for group in self.colocate:
            if len(set(group)) < 2:
                raise ValueError(
                    f"constraints: colocate needs groups of two tables or more, got {group!r}"
                )
        twice = sorted({table for table in together if together.count(table) > 1})
        if twice:
            raise ValueError(
                f"constraints: table {twice[0]!r} is in two groups of colocate; make one of them"
            )


def _layout_name(table: str, given: object) -> str:
    """TorchRec's name of a layout that a table may have.

    Raises:
        ValueError: It is no layout, or says on which ranks.
    """
    if isinstance(given, Layout):
        if given != type(given)():
            raise ValueError(
                f"constraints: table {table!r} may have layout {given}, and constraints take "
                f"{given.torchrec_name} as such; name it in layouts instead"
            )
        return given.torchrec_name
    if not isinstance(given, str) or given not in LAYOUTS:
        raise ValueError(
            f"constraints: table {table!r} may have layout {given!r}, which is none; there are "
            f"{', '.join(LAYOUTS)}"
        )
    return given


def _tuple(values: Any, what: str, *, may_be_empty: bool = False) -> tuple[Any, ...]:
    way = "" if values is None else f"; use [{values!r}]"
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"constraints: {what} must be a list, got {values!r}{way}")
    given = tuple(values)
    if not given and not may_be_empty:
        raise ValueError(f"constraints: {what} must not be empty; leave it out instead")
    return given
