"""The architectures that a run may have, by name: which configuration each takes, and what is built from it."""

from __future__ import annotations

from pathlib import Path

from smt.baselines.gpt2 import FullAttentionGPT2
from smt.baselines.hymba import ChunkedHymba
from smt.config import SMTConfig
from smt.hymba.config import HymbaConfig
from smt.model.checkpoint import CONFIG_FILE
from smt.model.transformer import StrideMemoryTransformer
from smt.runtime.files import read_yaml

CONFIGS: dict[str, type] = {"smt": SMTConfig, "gpt2": SMTConfig, "hymba": HymbaConfig}
RunModel = StrideMemoryTransformer | FullAttentionGPT2 | ChunkedHymba


def build(architecture: str, config: SMTConfig | HymbaConfig, context: int) -> RunModel:
    """A fresh model; ``context`` is the longest chunk that it will read, which a GPT-2 must know."""
    match architecture:
        case "smt":
            return StrideMemoryTransformer(config)
        case "gpt2":
            return FullAttentionGPT2(config, context)
        case "hymba":
            return ChunkedHymba(config)
    raise ValueError(f"architecture must be one of {', '.join(CONFIGS)}, got {architecture!r}")


def architecture_of(folder: str | Path) -> str:
    """The architecture of a run or a checkpoint.

    Raises:
        ValueError: its ``config.yaml`` is not there or damaged, or names one that does not exist.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    name = read_yaml(path).get("architecture", "smt")
    if name not in CONFIGS:
        raise ValueError(f"architecture in {path} must be one of {', '.join(CONFIGS)}, got {name!r}")
    return name
