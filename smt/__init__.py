"""The Stride Memory Transformer: one fixed window of memory slots and recent tokens, at constant cost per token."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smt.config import SMTConfig
    from smt.model import Aux, StrideMemoryTransformer
    from smt.state import SMTState

__all__ = ["Aux", "SMTConfig", "SMTState", "StrideMemoryTransformer"]

# Imported on first use: the command line must set up torch's threads before torch is there.
_HOMES = {"Aux": "smt.model", "SMTConfig": "smt.config", "SMTState": "smt.state", "StrideMemoryTransformer": "smt.model"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
