"""The Stride Memory Transformer: one fixed window of memory slots and recent tokens, at constant cost per token."""

from smt.config import SMTConfig
from smt.model import Aux, StrideMemoryTransformer
from smt.state import SMTState

__all__ = ["Aux", "SMTConfig", "SMTState", "StrideMemoryTransformer"]
