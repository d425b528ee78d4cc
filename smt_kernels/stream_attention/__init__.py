"""Attention over a stream: each query sees the last tokens and the last memory slots written before it, in one softmax.

out_t = sum_j softmax_j(scale * q_t . k_j) v_j    over slots [writes_before(t) - n, writes_before(t)) and tokens (t - m, t]

The folder, in the order to read it:

    reference.py          the definition
    strips.py             which rows of queries, slots and tokens each block of queries works on in plain PyTorch
    blocked.py            the definition over these blocks (``smt_kernels.dense_attention``), for any device
    geometry.py           who sees whom, inside kernels, in 32 bits
    kernels.py            the Triton backend, and its forward kernel
    backward_kernels.py   its backward kernels, and what launches them
    settings.py           with how many warps and in what blocks, by chip and head size

Before kernels: ``smt_kernels.tiles``.
"""

from __future__ import annotations

from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.operators import register
from smt_kernels.precision import accumulation_dtype
from smt_kernels.stream_attention.reference import stream_attention as reference
from smt_kernels.window import WindowSpec


def stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    *,
    window: WindowSpec,
    scale: float | None = None,
    first_step: int = 0,
    first_slot: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attention of T consecutive steps to their last n = ``window.n_memory`` slots and last m = ``window.n_tokens`` tokens.

    The query of step t sees, in one softmax, those of the slots [writes_before(t) - n, writes_before(t)) and of the tokens
    (t - m, t] that are given. With ``window.stride=None`` the memory is static: every query sees all of it (meta tokens).

    Args:
        q: queries (B, T, H, D) of the last T of the S steps.
        k, v: keys and values (B, S, H_kv, D) in the dtype of q, S >= T: the first S - T are history. H is a multiple of H_kv.
        memory_k, memory_v: keys and values of K >= 0 consecutive slots (B, K, H_kv, D); None: a plain sliding window.
        window: who sees whom; ``n_tokens`` is at least 1, so that every query sees itself.
        scale: factor of the scores; None: 1 / sqrt(D).
        first_step: the step of k[:, 0]; may be negative.
        first_slot: the number of the slot memory_k[:, 0]; may be negative.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        TypeError: a dtype or type that does not fit.
        ValueError: a shape, device, size or scale that does not fit, or one of memory_k and memory_v without the other.

    Source: sliding windows with meta tokens as in Hymba (Dong et al., 2024), section 2.
    """
    _check(q, k, v, memory_k, memory_v, window, first_step, first_slot)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    backend = backends.choose("stream_attention", q, backend)
    if backend == "reference":
        settings = {"window": window, "scale": scale, "first_step": first_step, "first_slot": first_slot}
        return reference(q, k, v, memory_k, memory_v, **settings)
    if memory_k is None:
        memory_k = memory_v = k.new_empty((k.shape[0], 0, *k.shape[2:]))
    tensors = checks.unit_stride(q, k, v, memory_k, memory_v)
    out, _ = _run(*tensors, window, scale, first_step, first_slot, backend=backend)
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    window: WindowSpec,
    first_step: int,
    first_slot: int,
) -> None:
    checks.shape("q", q, {"B": None, "T": None, "H": None, "D": None})
    checks.floating("q", q)
    n_batch, n_queries, n_heads, head_dim = q.shape
    checks.shape("k", k, {"B": n_batch, "S": None, "H_kv": None, "D": head_dim})
    n_keys, n_kv_heads = k.shape[1:3]
    checks.shape("v", v, {"B": n_batch, "S": n_keys, "H_kv": n_kv_heads, "D": head_dim})
    given = [("k", k), ("v", v)]
    if (memory_k is None) != (memory_v is None):
        present, absent = ("memory_v", "memory_k") if memory_k is None else ("memory_k", "memory_v")
        raise ValueError(f"{absent} must be given together with {present}, got None")
    if memory_k is not None:
        expected = {"B": n_batch, "K": None, "H_kv": n_kv_heads, "D": head_dim}
        checks.shape("memory_k", memory_k, expected, may_be_empty=("K",))
        checks.shape("memory_v", memory_v, expected | {"K": memory_k.shape[1]}, may_be_empty=("K",))
        given += [("memory_k", memory_k), ("memory_v", memory_v)]
    for name, tensor in given:
        checks.like(name, tensor, "q", q)
    checks.head_groups(n_heads, n_kv_heads)
    if n_keys < n_queries:
        raise ValueError(f"k must hold the keys of all T = {n_queries} queries, S >= T, got S = {n_keys} in {tuple(k.shape)}")
    if not isinstance(window, WindowSpec):
        raise TypeError(f"window must be a WindowSpec, got {type(window).__name__}")
    if window.n_tokens < 1:
        raise ValueError(f"window.n_tokens must be at least 1, so that every query sees itself, got {window.n_tokens}")
    for name, value in (("first_step", first_step), ("first_slot", first_slot)):
        checks.integer(name, value)


def _empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and the log-sum-exp of the scores (B, H, T)."""
    n_batch, n_queries, n_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((n_batch, n_heads, n_queries), dtype=accumulation_dtype(q.dtype))


_run = register(_empty, kept=2, gradients=5)
