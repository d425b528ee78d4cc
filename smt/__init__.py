"""The Stride Memory Transformer: one fixed window of memory slots and recent tokens, at constant cost per token.

``config`` holds the sizes. Folders, from those that import nothing of ``smt`` to those that import most: ``runtime``, ``data``,
``state``, ``pretrained``, ``model``, ``hymba``, ``baselines``, ``evaluation``, ``huggingface``, ``training``, ``experiments``,
``study``, ``cli``; the docstring of each maps its files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smt.huggingface.registration import register

if TYPE_CHECKING:
    from smt.config import SMTConfig
    from smt.huggingface.cache import SMTCache
    from smt.huggingface.config import SMTPreTrainedConfig
    from smt.huggingface.model import SMTForCausalLM
    from smt.model.transformer import Aux, StrideMemoryTransformer
    from smt.state.state import SMTState

# Imported on first use: the command line must set up torch's threads before torch is there.
_HOMES = {
    "Aux": "smt.model.transformer",
    "SMTCache": "smt.huggingface.cache",
    "SMTConfig": "smt.config",
    "SMTForCausalLM": "smt.huggingface.model",
    "SMTPreTrainedConfig": "smt.huggingface.config",
    "SMTState": "smt.state.state",
    "StrideMemoryTransformer": "smt.model.transformer",
}
__all__ = ["Aux", "SMTCache", "SMTConfig", "SMTForCausalLM", "SMTPreTrainedConfig", "SMTState", "StrideMemoryTransformer"]

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
