"""Every field of a run as an option, for the commands that train; what it means is in the docstring of its dataclass."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from dataclasses import fields
from typing import Any

from smt.cli.parser import FIELD
from smt.runtime.fields import as_text, choices_of, defaults_of, kind_of
from smt.runtime.meanings import in_brief, meanings

# The packaged configuration of a command that names none: one for two CPU cores, and the same text in sizes worth a GPU.
USUAL_CONFIG, USUAL_GPU_CONFIG = "stdlib", "stdlib_gpu"
_DEFAULTS = f"""\
Each overrides a field of the configuration. The default is that of a configuration without the field; a second one, where
it differs, is that of the packaged {USUAL_CONFIG}, which runs without --config (smt train on a GPU: {USUAL_GPU_CONFIG})."""
_OF_ANOTHER = """\
For --architecture {architecture}, besides these fields of model, with defaults of its own: {shared}. Other fields of a \
configuration's model, of another architecture, are ignored."""


def add_run_fields(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of ``RunConfig`` and its parts, but for ``experiment``, which names a run's folder."""
    from smt.data.recall import RecallTask
    from smt.training.settings import PARTS, RunConfig, parts_of

    usual = RunConfig.from_yaml(USUAL_CONFIG).flat()
    parser.add_argument_group("fields of a run", description=_DEFAULTS)
    whole = [field.name for field in fields(RunConfig) if field.name not in ("experiment", *PARTS)]
    groups = {"run": (RunConfig, whole)}
    groups.update({part: (settings, [field.name for field in fields(settings)]) for part, settings in PARTS.items()})
    described = {}
    for architecture in RunConfig.CHOICES["architecture"]:
        settings = parts_of(architecture)["model"]
        if settings is not PARTS["model"]:
            names, of_model = [field.name for field in fields(settings)], groups["model"][1]
            shared = ", ".join(name for name in names if name in of_model)
            title = f"model of the architecture {architecture}"
            described[title] = _wrapped(_OF_ANOTHER.format(architecture=architecture, shared=shared))
            groups[title] = settings, [name for name in names if name not in of_model]
    for title, (settings, names) in groups.items():
        group = parser.add_argument_group(title, description=described.get(title))
        meaning, defaults = meanings(settings), defaults_of(settings)
        for name in names:
            shown = f"default: {as_text(defaults[name])}"
            if usual.get(name, defaults[name]) != defaults[name]:
                shown += f"; {USUAL_CONFIG}: {as_text(usual[name])}"
            text = f"{in_brief(meaning.get(name, ''))} ({shown})"
            group.add_argument(
                f"--{name}", dest=f"{FIELD}{name}", metavar=_metavar(settings, name), help=text.replace("%", "%%")
            )
    parser.add_argument_group("names of --recall", description=_table(RecallTask))


def usual_config(given: dict[str, Any]) -> str:
    """The packaged configuration for the device that the fields ``given`` name, or else the machine has."""
    from smt.runtime.device import find_device

    return USUAL_GPU_CONFIG if find_device(given.get("device", "auto")).type == "cuda" else USUAL_CONFIG


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, as text."""
    given = {name.removeprefix(FIELD): value for name, value in vars(options).items() if name.startswith(FIELD)}
    return {name: value for name, value in given.items() if value is not None}


def _metavar(settings: type, name: str) -> str:
    kind, choices = kind_of(settings, name), choices_of(settings).get(name)
    inner = kind.removeprefix("tuple[").replace(", ...]", "").replace(" | None", "")
    word = inner.upper() if choices is None else f"{{{','.join(choices)}}}"
    return f"{word}=VALUE,..." if kind.startswith("dict") else f"{word},..." if kind.startswith("tuple") else word


def _table(settings: type) -> str:
    meaning = meanings(settings)
    lines = [
        f"{name:<13}{in_brief(meaning.get(name, ''))} (default: {as_text(value)})"
        for name, value in defaults_of(settings).items()
    ]
    return "\n".join(_wrapped(line, subsequent_indent=" " * 15) for line in lines)


def _wrapped(text: str, **options: str) -> str:
    return textwrap.fill(text, shutil.get_terminal_size().columns - 2, **options)
