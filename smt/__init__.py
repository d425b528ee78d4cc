"""The Stride Memory Transformer: one fixed window of memory slots and recent tokens, at constant cost per token."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smt.registration import register

if TYPE_CHECKING:
    from smt.config import SMTConfig
    from smt.hf import SMTForCausalLM
    from smt.hf_cache import SMTCache
    from smt.hf_config import SMTPreTrainedConfig
    from smt.model import Aux, StrideMemoryTransformer
    from smt.state import SMTState

# Imported on first use: the command line must set up torch's threads before torch is there.
_HOMES = {
    "Aux": "smt.model",
    "SMTCache": "smt.hf_cache",
    "SMTConfig": "smt.config",
    "SMTForCausalLM": "smt.hf",
    "SMTPreTrainedConfig": "smt.hf_config",
    "SMTState": "smt.state",
    "StrideMemoryTransformer": "smt.model",
}
__all__ = ["Aux", "SMTCache", "SMTConfig", "SMTForCausalLM", "SMTPreTrainedConfig", "SMTState", "StrideMemoryTransformer"]

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
