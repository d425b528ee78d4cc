"""What the fields of a dataclass mean, from the one place that says it: ``Args`` or ``Attributes`` of its docstring."""

from __future__ import annotations

import inspect
import re

_SECTIONS = ("Args:", "Attributes:")
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.+)")
_CONTINUED = " " * 8


def meanings(settings: type) -> dict[str, str]:
    """The text of every name that is documented; names that are documented together share theirs."""
    found: dict[str, str] = {}
    names: list[str] = []
    reading = False
    for line in inspect.cleandoc(settings.__doc__ or "").splitlines():
        if not line.startswith(" "):
            reading = line in _SECTIONS or (reading and not line)
        elif reading and (entry := _ENTRY.fullmatch(line)):
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif reading and line.startswith(_CONTINUED):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def in_brief(meaning: str) -> str:
    """Its first sentence, without the marks of code."""
    return re.split(r"\. (?=[A-Z])", meaning.replace("``", ""), maxsplit=1)[0].rstrip(".")
