"""Saved states: one safetensors file of the tensors by name, with the configuration and the steps in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.runtime.files import tensors_writer, write_files
from smt.state.layout import misfit

FORMAT = "smt.state/2"


def write_state(path: str | Path, config: SMTConfig, steps: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    """Write a state under a temporary name and rename it, so that no half-written file is ever at ``path``."""
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), "steps": json.dumps(steps)}
    write_files({Path(path): tensors_writer(tensors, metadata)})


def read_state(path: str | Path, device: torch.device | str = "cpu") -> tuple[SMTConfig, list[int], dict[str, Tensor]]:
    """Read what ``write_state`` wrote, onto ``device``: the configuration, the steps and the tensors of a state.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, not a state, or its tensors are not those of its configuration; the message names the key.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no state file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved state: its metadata has format {metadata.get('format')!r}, not {FORMAT!r}")
    config, steps = _read(path, metadata)
    wrong = misfit(config, len(steps), tensors)
    if wrong is not None:
        raise ValueError(f"{path} {wrong}")
    return config, steps, {name: tensor.to(device) for name, tensor in tensors.items()}


def _read(path: Path, metadata: dict[str, str]) -> tuple[SMTConfig, list[int]]:
    for name in ("config", "steps"):
        if name not in metadata:
            raise ValueError(f"{path} has no {name!r} in its metadata")
    try:
        config = SMTConfig.from_dict(json.loads(metadata["config"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a 'config' that cannot be used: {error}") from error
    try:
        steps = json.loads(metadata["steps"])
    except ValueError as error:
        raise ValueError(f"{path} has 'steps' that cannot be read: {error}") from error
    if not isinstance(steps, list) or not steps or any(type(step) is not int or step < 0 for step in steps):
        raise ValueError(f"{path} must have a list of step counts in 'steps', got {metadata['steps']}")
    return config, steps
