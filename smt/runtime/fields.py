"""Dataclasses of settings: values read from text, types checked, and a name that does not exist refused with the nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict, "tuple": tuple}


def kind_of(settings: type, name: str) -> str:
    """The annotation of a field, such as ``int | None``."""
    return next(str(field.type) for field in fields(settings) if field.name == name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like ``name``."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]


def parse(settings: type, name: str, value: Any) -> Any:
    """A value of YAML or the command line as its field's type; one that cannot be read as it came, for its check to refuse.

    A dictionary may be written ``name=value,name=value``, a tuple ``name,name``; ``none`` empties either.
    """
    kind = kind_of(settings, name)
    if not kind.startswith(("dict", "tuple")):
        return _scalar(kind, value)
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    return _dictionary(kind, value) if kind.startswith("dict") else _tuple(value)


def _dictionary(kind: str, value: Any) -> Any:
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split(",") if pair]
        if not all(equals for _, equals, _ in pairs):
            return value
        value = {key: item for key, _, item in pairs}
    if not isinstance(value, dict):
        return {} if value is None else value
    return {key: _scalar(_inner(kind), item) for key, item in value.items()}


def _tuple(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(filter(None, value.split(",")))
    return tuple(value or ()) if isinstance(value, list | None) else value


def _scalar(kind: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if kind.startswith("str") and value.lower() not in ("none", "null"):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return {"int": int, "float": float}[kind.split(" ")[0]](value)
    except (KeyError, ValueError):
        return value


def check_types(settings: Any) -> None:
    """Raise TypeError unless every field holds a value of its annotated type, and a dictionary or tuple such values."""
    for field in fields(settings):
        kind, value = str(field.type), getattr(settings, field.name)
        if value is None and "None" in kind:
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
        if not _is_a(kind, value) or not all(_is_a(_inner(kind), item) for item in items):
            raise TypeError(f"{field.name} must be of type {kind}, got {value!r}")


def check_names(field: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError unless all names that ``field`` gives are known ones; the message has the nearest."""
    for name in given:
        if name not in known:
            raise ValueError(f"{field} has no {name!r}; did you mean {nearest(name, known)!r}? It takes {', '.join(known)}")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """Raise ValueError where a field that is not None is below ``least``."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _is_a(kind: str, value: Any) -> bool:
    outer = re.match(r"\w+", kind).group()
    return isinstance(value, _KINDS[outer]) and not (isinstance(value, bool) and outer != "bool")


def _inner(kind: str) -> str:
    """The type of a dictionary's or a tuple's values: ``float`` of ``dict[str, float]``, ``str`` of ``tuple[str, ...]``."""
    return re.findall(r"\w+", kind)[-1]
