"""Files that are whole or not there, and tensors in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_files(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write files, each under a temporary name; when all are written, rename them. None is ever half there."""
    temporary = {path: path.with_name(f"{path.stem}.partial{path.suffix}") for path in writers}
    try:
        for path, write in writers.items():
            write(temporary[path])
        for path in writers:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def tensors_writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """What writes tensors as safetensors to a path."""

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(on_cpu, path, metadata={"format": "pt"})

    return write


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: a damaged file.
    """
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
