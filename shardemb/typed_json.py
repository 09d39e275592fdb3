"""Dataclasses from JSON, strictly: what is missing, unknown or of another kind is refused."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_MOST = 2**63
"""The largest number that arithmetic on arrays and devices has."""
_MOST_DIGITS = 18


def parse_json(text: str) -> Any:
    """Parses JSON in which no object has a key twice.

    Args:
        text: The JSON.

    Returns:
        Its value.

    Raises:
        ValueError: It is not JSON, is nested too deep, or a key is there twice.

    Example:
        >>> parse_json('{"a": [1, 2]}')
        {'a': [1, 2]}
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise ValueError(f"key {twice!r} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deep") from None


def make_typed(cls: type[T], values: Any, where: str, **given: Any) -> T:
    """Makes a dataclass of a JSON object that has its fields.

    Args:
        cls: A dataclass whose fields are numbers, strings, bools, tuples and mappings of such, or
            other such dataclasses.
        values: The JSON object.
        where: What to call it in an error.
        **given: Fields that do not come from the object.

    Returns:
        The dataclass; fields that are not there have their defaults.

    Raises:
        ValueError: A field is missing, unknown or of another kind, or the dataclass refuses it.

    Example:
        >>> from shardemb.init import Normal
        >>> make_typed(Normal, {"std": 0.5}, "the initial values")
        Normal(std=0.5)
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {_shown(values)}")
    wanted = {field.name: field for field in fields(cls) if field.name not in given}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in wanted]
    if unknown:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}; known are {_list(wanted)}")
    missing = [
        name
        for name, field in wanted.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}")
    kinds = get_type_hints(cls)
    typed = {name: typed_value(kinds[name], v, f"{where}: {name}") for name, v in values.items()}
    try:
        return cls(**typed, **given)
    except ValueError as error:
        named = str(error).startswith(where)
        raise ValueError(str(error) if named else f"{where}: {error}") from error


def typed_value(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a field of some type has it.

    Args:
        kind: The type: of a number, string or bool, a tuple or mapping of such, a dataclass, one of
            these or None, or a Literal.
        value: The JSON value.
        where: What to call it in an error.

    Returns:
        The value, with tuples for lists.

    Raises:
        ValueError: It is of another kind.

    Example:
        >>> typed_value(tuple[int, ...], [1, 2], "ranks")
        (1, 2)
    """
    outer, inner = get_origin(kind), get_args(kind)
    if outer is UnionType or NoneType in inner:
        if value is None and NoneType in inner:
            return None
        (kind,) = (one for one in inner if one is not NoneType)
        return typed_value(kind, value, where)
    if outer is Literal:
        if type(value) not in map(type, inner) or value not in inner:
            raise ValueError(f"{where} must be one of {_list(inner)}, got {_shown(value)}")
        return value
    if outer is tuple and isinstance(value, list):
        return tuple(typed_value(inner[0], item, where) for item in value)
    if outer is Mapping and isinstance(value, dict):
        return {
            _key(inner[0], k, where): typed_value(inner[1], v, f"{where} {k!r}")
            for k, v in value.items()
        }
    if is_dataclass(kind) and isinstance(kind, type):
        return make_typed(kind, value, where)
    if type(value) is kind or (kind is float and type(value) is int):
        if kind in {int, float} and not abs(value) <= _MOST:
            raise ValueError(f"{where} must be from -2**63 to 2**63, got {_shown(value)}")
        return value
    word = _WORDS.get(kind, "a list" if outer is tuple else "an object")
    raise ValueError(f"{where} must be {word}, got {_shown(value)}")


def _key(kind: type, key: str, where: str) -> Any:
    """A key of a JSON object, which is a string, as a mapping has it.

    Raises:
        ValueError: It should be a whole number and is not.
    """
    if kind is int:
        if not key.isdecimal():
            raise ValueError(f"{where}: keys must be whole numbers, got {key!r}")
        if len(key) > _MOST_DIGITS:
            raise ValueError(
                f"{where}: keys must have at most {_MOST_DIGITS} digits, got {_shown(key)}"
            )
        return int(key)
    return key


def _list(names: Any) -> str:
    return ", ".join(str(name) for name in names)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "lists in lists"
    return text if len(text) <= 60 else f"{text[:57]}..."
