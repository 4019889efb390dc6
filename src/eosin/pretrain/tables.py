"""TOML tables to frozen dataclasses and back: every key known, every value of its type, every error with its path."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from eosin.errors import ConfigError, closest

T = TypeVar("T")
Presets = Mapping[type, Mapping[str, Any]]
Hidden = frozenset[tuple[type, str]]

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def from_table(
    cls: type[T],
    table: Mapping[str, Any],
    *,
    path: str = "",
    presets: Presets | None = None,
    hidden: Hidden = frozenset(),
) -> T:
    """Return the dataclass `cls` that a TOML table says.

    Args:
        cls: a dataclass of bool, int, float, str, Literal, tuple, optional and dataclass fields.
        table: what `tomllib` gave.
        path: of the table within the file, such as "data.sample"; it begins every message.
        presets: for a dataclass, its named values: a key `preset` in its table is where the other keys start from.
        hidden: (dataclass, field) that a file may not set.

    Raises:
        ConfigError: an unknown key, a missing one, a wrong type, or values that the dataclass refuses.
    """
    presets = presets or {}
    names = [f.name for f in dataclasses.fields(cls) if (cls, f.name) not in hidden]  # pyright: ignore[reportArgumentType]
    known = [*names, "preset"] if cls in presets else names
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown key {_join(path, key)}; closest: {closest(key, known)}")
    start = _preset(table, presets[cls], path) if cls in presets and "preset" in table else None
    hints = typing.get_type_hints(cls)
    values = {
        key: _value(hints[key], value, _join(path, key), presets, hidden)
        for key, value in table.items()
        if key != "preset"
    }
    missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in values]  # pyright: ignore[reportArgumentType]
    if missing and start is None:
        extra = f", or a preset: {', '.join(presets[cls])}" if cls in presets else ""
        raise ConfigError(f"{path or 'the file'} lacks {', '.join(missing)}; give them{extra}")
    try:
        return cls(**values) if start is None else dataclasses.replace(start, **values)
    except ConfigError as error:
        raise ConfigError(_join_message(path, str(error), names)) from error
    except ValueError as error:  # what the dataclass's own checks raise
        raise ConfigError(_join_message(path, str(error), names)) from error


def to_table(value: Any, hidden: Hidden = frozenset()) -> Any:
    """Return a dataclass as plain dictionaries and lists; fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = [f.name for f in dataclasses.fields(value) if (kind, f.name) not in hidden]
        return {n: to_table(v, hidden) for n in fields if (v := getattr(value, n)) is not None}
    return [to_table(v, hidden) for v in value] if isinstance(value, tuple) else value


def dump_toml(table: Mapping[str, Any], path: str = "") -> str:
    """Return nested dictionaries of bools, numbers, texts and lists as TOML; `tomllib.loads` gives them back."""
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    blocks = ["\n".join([f"[{path}]", *lines] if path else lines)] if lines or not table else []
    blocks += [dump_toml(value, _join(path, key)) for key, value in table.items() if isinstance(value, Mapping)]
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the fields in which two `to_table` tables differ, as "optimizer.lr: 0.001, now 0.002"."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        here, a, b = _join(path, key), old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, here)
        elif a != b:
            found.append(f"{here}: {_shown(a)}, now {_shown(b)}")
    return found


def require(instance: object, name: str, fine: bool, needed: str) -> None:
    """Raise a `ConfigError` naming a field of a dataclass, its value and what is needed, unless `fine`."""
    if not fine:
        raise ConfigError(f"{name} is {_shown(getattr(instance, name))}; it must be {needed}")


def _preset(table: Mapping[str, Any], known: Mapping[str, Any], path: str) -> Any:
    name = table["preset"]
    if name not in known:
        raise ConfigError(f"{path}.preset is {_shown(name)}, which is no preset; closest: {closest(str(name), known)}")
    return known[name]


def _value(hint: Any, value: Any, path: str, presets: Presets, hidden: Hidden) -> Any:
    """Return `value` as the type `hint`, or raise an error that begins with `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (a for a in arguments if a is not type(None))  # T | None: absent is None, so a value is a T
        return _value(hint, value, path, presets, hidden)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} is {_shown(value)}; it must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, path, presets, hidden)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {_shown(value)}; it must be a table, [{path}]")
        return from_table(typing.cast(type, hint), value, path=path, presets=presets, hidden=hidden)
    return _scalar(hint, value, path)


def _tuple(arguments: tuple[Any, ...], value: Any, path: str, presets: Presets, hidden: Hidden) -> tuple[Any, ...]:
    many = len(arguments) == 2 and arguments[1] is Ellipsis
    if not isinstance(value, list) or (not many and len(value) != len(arguments)):
        raise ConfigError(f"{path} is {_shown(value)}; it must be a list of {'values' if many else len(arguments)}")
    kinds = [arguments[0]] * len(value) if many else arguments
    return tuple(
        _value(kind, v, f"{path}[{i}]", presets, hidden) for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
    )


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: true is no number
        raise ConfigError(f"{path} is {_shown(value)}; it must be {_WORDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}; it must be finite")
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _join_message(path: str, message: str, names: list[str]) -> str:
    """Return a message with the path before it: "optimizer" + "lr is -1" is "optimizer.lr is -1"."""
    first = message.split(maxsplit=1)[0].rstrip(":,;") if message else ""
    if not path:
        return message
    return f"{path}.{message}" if first.split(".")[0] in names else f"{path}: {message}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return json.dumps(value, default=str, ensure_ascii=False)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but for the raw delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
