"""Every field of a run as an option, for the commands that train."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from smt.runtime.fields import kind_of


def add_run_fields(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of ``RunConfig`` and its parts, but for ``experiment``, which names a run's folder."""
    from smt.training.settings import PARTS, RunConfig

    whole = [field.name for field in fields(RunConfig) if field.name not in ("experiment", *PARTS)]
    groups = {"run": (RunConfig, whole)} if whole else {}
    groups.update({part: (settings, [field.name for field in fields(settings)]) for part, settings in PARTS.items()})
    for title, (settings, names) in groups.items():
        group = parser.add_argument_group(f"{title} (replaces the field of the configuration)")
        for name in names:
            spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            group.add_argument(*spellings, dest=f"field_{name}", metavar=_metavar(kind_of(settings, name)))


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, as text."""
    given = {name.removeprefix("field_"): value for name, value in vars(options).items() if name.startswith("field_")}
    return {name: value for name, value in given.items() if value is not None}


def _metavar(kind: str) -> str:
    if kind.startswith("dict"):
        return "NAME=VALUE,..."
    return "NAME,..." if kind.startswith("tuple") else kind.replace(" | None", "").upper()
