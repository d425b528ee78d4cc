"""Fused kernels for the Stride Memory Transformer: an operation in each folder, whose docstring maps its files.

Read ``window`` (who sees whom) and ``stream_attention`` first. What the operations share: ``backends`` (which implementation
runs, and why), ``operators`` (registration with PyTorch), ``checks`` (of arguments), ``precision`` (dtype of sums), ``kept``
(tensors saved for the backward pass), ``dense_attention`` (of many small blocks in PyTorch), ``launch`` and ``tiles`` (Triton).
"""

from smt_kernels.attention_pool import attention_pool, attention_pool_sequence
from smt_kernels.backends import BACKENDS, BackendChoice, last_choice, use_backend
from smt_kernels.linear_cross_entropy import linear_cross_entropy
from smt_kernels.stream_attention import stream_attention
from smt_kernels.stream_attention_decode import stream_attention_decode
from smt_kernels.stride_memory import Memory, MemoryWeights, stride_memory
from smt_kernels.stride_write import stride_write
from smt_kernels.window import WindowSpec
from smt_kernels.window_attention import window_attention

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "Memory",
    "MemoryWeights",
    "WindowSpec",
    "attention_pool",
    "attention_pool_sequence",
    "last_choice",
    "linear_cross_entropy",
    "stream_attention",
    "stream_attention_decode",
    "stride_memory",
    "stride_write",
    "use_backend",
    "window_attention",
]
