"""Dataclasses of settings: values read from text, types checked, and a name that does not exist refused with the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool}


def kind_of(settings: type, name: str) -> str:
    """The annotation of a field, such as ``int | None``."""
    return next(str(field.type) for field in fields(settings) if field.name == name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like ``name``."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]


def parse(settings: type, name: str, value: Any) -> Any:
    """A value of YAML or the command line as its field's type; one that cannot be read as it came, for its check to refuse."""
    if not isinstance(value, str):
        return value
    kind = kind_of(settings, name)
    if kind.startswith("str") and value.lower() not in ("none", "null"):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return {"int": int, "float": float}[kind.split(" ")[0]](value)
    except (KeyError, ValueError):
        return value


def check_types(settings: Any) -> None:
    """Raise TypeError unless every field holds a value of its annotated type."""
    for field in fields(settings):
        kind, value = str(field.type), getattr(settings, field.name)
        if value is None and "None" in kind:
            continue
        expected = _KINDS[kind.split(" ")[0]]
        if not isinstance(value, expected) or (isinstance(value, bool) and not kind.startswith("bool")):
            raise TypeError(f"{field.name} must be of type {kind}, got {value!r}")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """Raise ValueError where a field that is not None is below ``least``."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
