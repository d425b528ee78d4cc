"""A model in a folder: ``config.yaml`` and ``model.safetensors``, whose tensors have the names of ``model.state_dict()``.

``config.yaml`` holds the fields of the model's configuration under ``model``, as the configuration of a training run does: a
checkpoint's is a valid configuration of a run, and a run's folder is a checkpoint. It names the architecture, unless that is
``smt``.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor, nn

from smt.config import ModelConfig, SMTConfig
from smt.runtime.fields import differences, parse
from smt.runtime.files import read_safetensors, read_yaml, tensors_writer, text_writer, write_files
from smt.runtime.names import shown

CONFIG_FILE, WEIGHTS_FILE = "config.yaml", "model.safetensors"

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config", bound=ModelConfig)


def save_model(model: nn.Module, folder: str | Path, **of_run: str) -> None:
    """Write ``model.config`` and the weights into ``folder``, which is made if need be.

    Both files are complete under temporary names before either takes its place.

    Args:
        of_run: what the configuration of a run says besides its parts, such as ``architecture``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = yaml.safe_dump({**of_run, "model": model.config.to_dict()}, sort_keys=False)
    write_files(
        {
            folder / WEIGHTS_FILE: tensors_writer(model.state_dict()),
            folder / CONFIG_FILE: text_writer(described),
        }
    )


def load_model(
    cls: type[Model],
    folder: str | Path,
    settings: type[Config] = SMTConfig,
    *,
    architecture: str = "smt",
    device: torch.device | str = "cpu",
) -> Model:
    """Build the model of a checkpoint, for evaluation (no dropout), in the number format in which it was saved.

    Args:
        cls: builds a model from ``settings``.
        folder: what ``save_model`` or a training run left.
        architecture: what its configuration must name.

    Raises:
        ValueError: a file that is missing or damaged, another architecture, or weights that are not those of the
            configuration, with their names.
    """
    folder = Path(folder)
    _check_architecture(folder / CONFIG_FILE, settings, architecture)
    config = read_config(folder / CONFIG_FILE, settings)
    tensors = _read_weights(folder)
    with torch.device("meta"):  # fresh weights would be drawn for nothing
        model = cls(config)
    _check(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path, *, leave: tuple[str, ...] = ()) -> list[str]:
    """Copy a checkpoint's weights into ``model``, whose configuration may differ where the shapes of weights do not.

    Args:
        leave: parameters of the model to leave as they are.

    Returns:
        the names of what was copied.

    Raises:
        ValueError: as ``load_model``; the message names the fields of the configurations that differ.
    """
    folder = Path(folder)
    theirs, ours = read_config(folder / CONFIG_FILE, type(model.config)).to_dict(), model.config.to_dict()
    tensors = {name: tensor for name, tensor in _read_weights(folder).items() if name not in leave}
    differing = differences(theirs, ours)
    _check(model, tensors, folder, leave, f"; its config has {differing}" if differing else "")
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return list(tensors)


def read_config(path: str | Path, settings: type[Config] = SMTConfig) -> Config:
    """The model's part of a YAML file: of a checkpoint, of a run, or nothing but the fields of ``settings``.

    Raises:
        ValueError: no such file, not a mapping, an unknown field or a value out of range.
    """
    known = {field.name for field in fields(settings)}  # ``from_dict`` refuses others
    given = read_fields(path, settings).items()
    return settings.from_dict({name: parse(settings, name, value) if name in known else value for name, value in given})


def read_fields(path: str | Path, settings: type = SMTConfig) -> dict[str, Any]:
    """The fields of a model's configuration that a YAML file gives, unchecked; errors as ``read_config``."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    what = f"a mapping of {settings.__name__} fields"
    values = read_yaml(path, what)
    given = values.get("model", values)
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold {what}, got {type(given).__name__}")
    return given


def _check_architecture(path: Path, settings: type, architecture: str) -> None:
    read_fields(path, settings)  # of a file that is missing or damaged it says so
    there = read_yaml(path).get("architecture", "smt")
    if there != architecture:
        raise ValueError(f"{path} must be of a model of architecture {architecture}, it is of {there}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    return read_safetensors(path)


def _check(model: nn.Module, tensors: dict[str, Tensor], folder: Path, leave: tuple[str, ...] = (), hint: str = "") -> None:
    """Raise ValueError unless ``tensors`` are exactly the model's, by name and shape."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in leave}
    problems = {
        "lacks {}": [name for name in own if name not in tensors],
        "has {}, which the model has not": [name for name in tensors if name not in own],
        "has other shapes: {}": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{folder / WEIGHTS_FILE} {problem.format(shown(names))}{hint}")
