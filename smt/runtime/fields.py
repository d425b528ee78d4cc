"""Dataclasses of settings: values read from text and checked, and a name that does not exist refused with the nearest.

A dataclass whose fields take only some words has them in CHOICES, by field: the values of a text, the names of a dictionary's
items, the items of a tuple.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict, "tuple": tuple, "Any": object}
# What torch's generators and every other take.
LARGEST_SEED = 2**63 - 1


def kind_of(settings: type, name: str) -> str:
    """The annotation of a field, such as ``int | None``; a field that is not there is a ValueError."""
    check_known(settings, [name])
    return next(str(field.type) for field in fields(settings) if field.name == name)


def choices_of(settings: type) -> dict[str, Sequence[str]]:
    """The words that fields take, of those that take only some."""
    return getattr(settings, "CHOICES", {})


def defaults_of(settings: type) -> dict[str, Any]:
    """The default of every field that has one."""
    made = {field.name: field.default_factory() for field in fields(settings) if field.default_factory is not MISSING}
    return made | {field.name: field.default for field in fields(settings) if field.default is not MISSING}


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like ``name``."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]


def parse(settings: type, name: str, value: Any) -> Any:
    """A value of YAML or the command line as its field's type; one that cannot be read as it came, for its check to refuse.

    A dictionary may be written ``name=value,name=value``, a tuple ``name,name``; ``none`` empties either.
    """
    kind = kind_of(settings, name)
    if isinstance(value, bool):  # as YAML takes these words, its version 1.1 also "no"
        words = [word for word in (str(value).lower(), "yes" if value else "no") if word in choices_of(settings).get(name, ())]
        value = words[0] if words else value
    if not kind.startswith(("dict", "tuple")):
        return _scalar(kind, value)
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    return _dictionary(kind, value) if kind.startswith("dict") else _tuple(kind, value)


def as_text(value: Any) -> str:
    """A value as ``parse`` reads it."""
    if isinstance(value, dict):
        return ",".join(f"{name}={as_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, tuple):
        return ",".join(map(as_text, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _dictionary(kind: str, value: Any) -> Any:
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split(",") if pair]
        if not all(equals for _, equals, _ in pairs):
            return value
        value = {key: item for key, _, item in pairs}
    if not isinstance(value, dict):
        return {} if value is None else value
    return {key: _scalar(_inner(kind), item) for key, item in value.items()}


def _tuple(kind: str, value: Any) -> Any:
    if isinstance(value, str):
        value = list(filter(None, value.split(",")))
    return tuple(_scalar(_inner(kind), item) for item in value or ()) if isinstance(value, list | None) else value


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


def check_fields(settings: Any) -> None:
    """Check what holds for fields of any meaning, and for the values in a dictionary or a tuple.

    Raises:
        TypeError: a value that is not of its annotated type.
        ValueError: a number that is not finite, an empty text, or a word that is none of CHOICES.
    """
    choices = choices_of(type(settings))
    for field in fields(settings):
        kind, value = str(field.type), getattr(settings, field.name)
        if value is None and "None" in kind:
            continue
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else None
        if not _is_a(kind, value) or not all(_is_a(_inner(kind), item) for item in inside or ()):
            raise TypeError(f"{field.name} must be of type {kind}, got {value!r}")
        if field.name in choices:
            if inside is None:
                check_choice(field.name, value, choices[field.name])
            else:
                check_names(field.name, value, choices[field.name])
        for item in [value] if inside is None else inside:
            if "float" in kind:
                check_finite(field.name, item)
            if item == "":
                raise ValueError(f"{field.name} must not be empty")


def check_known(settings: type, names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, unless the dataclass ``settings`` has all fields of these names."""
    known = [field.name for field in fields(settings)]
    for name in names:
        if name not in known:
            raise ValueError(f"{settings.__name__} has no field {name!r}; did you mean {nearest(name, known)!r}?")


def check_finite(field: str, value: float) -> None:
    """Raise ValueError for an infinity, what is not a number, and an integer that no floating-point number can hold."""
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"{field} must be finite, got {value}")


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``; the message has one that is much like it, if any is."""
    if value not in choices:
        near = [f"; did you mean {choice!r}?" for choice in difflib.get_close_matches(value, choices, n=1)]
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}{''.join(near)}")


def check_seed(field: str, value: int) -> None:
    """Raise ValueError unless every generator of random numbers takes ``value``."""
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"{field} must lie in 0..{LARGEST_SEED}, got {value}")


def check_folder_name(field: str, value: str) -> None:
    """Raise ValueError unless ``value`` names a folder inside the one where it is made: dots alone name others."""
    if value != Path(value).name or not value.strip("."):
        raise ValueError(f"{field} must be the name of a folder, got {value!r}")


def expand_home(path: str) -> str:
    """The path with a ``~`` at its beginning replaced, which a shell leaves as it is behind ``=`` and in a file."""
    return os.path.expanduser(path) if path.startswith("~") else path


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


def check_above(settings: Any, bound: float, *names: str) -> None:
    """Raise ValueError where a field is not above ``bound``."""
    for name in names:
        value = getattr(settings, name)
        if not value > bound:
            raise ValueError(f"{name} must be above {bound}, got {value}")


def check_fraction(settings: Any, *names: str) -> None:
    """Raise ValueError where a field that is not None lies outside of [0, 1)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")


def _is_a(kind: str, value: Any) -> bool:
    outer = re.match(r"\w+", kind).group()
    return isinstance(value, _KINDS[outer]) and not (isinstance(value, bool) and outer not in ("bool", "Any"))


def _inner(kind: str) -> str:
    """The type of a dictionary's or a tuple's values: ``float`` of ``dict[str, float]``, ``str`` of ``tuple[str, ...]``."""
    return re.findall(r"\w+", kind)[-1]


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], but: Collection[str] = ()) -> str:
    """Where the values of settings of one kind differ, in words; ``but`` these."""
    differing = (name for name in ours if name not in but and theirs[name] != ours[name])
    return ", ".join(f"{name} = {theirs[name]!r}, not {ours[name]!r}" for name in differing)
