"""Attention inside fixed windows of at most 128 entries: memory slots first, then tokens, causal.

out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over the existing entries j <= i of the same window

The folder, in the order to read it:

    reference.py   the definition
    blocked.py     the same as batched products (``smt_kernels.dense_attention``), for any device
    kernels.py     the Triton kernels, forward and backward, and what launches them
    settings.py    with how many warps and in what blocks, by chip and head size

Before kernels: ``smt_kernels.tiles``.
"""

from __future__ import annotations

from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.operators import register
from smt_kernels.precision import accumulation_dtype
from smt_kernels.window_attention.reference import window_attention as reference

MAX_WINDOW = 128


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_memory: int,
    valid_memory: Tensor | None = None,
    valid_tokens: Tensor | None = None,
    tail: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention inside each of N independent windows of W entries, the first ``n_memory`` of which are memory slots.

    Entry i sees the entries j <= i that exist. An entry that sees nothing gets zeros.

    Args:
        q: queries (N, W, H, D), or only the last ``tail`` of them, (N, tail, H, D).
        k, v: keys and values (N, W, H_kv, D) in the dtype of q, W <= 128; H is a multiple of H_kv.
        n_memory: memory entries per window, 0 <= n_memory <= W.
        valid_memory, valid_tokens: (N,) int32, how many entries of each right-aligned half exist; None: all.
        tail: compute only the last ``tail`` queries; None: all W.
        scale: factor of the scores; None: 1 / sqrt(D).
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        (N, tail or W, H, D) in the dtype of q.

    Raises:
        TypeError: a dtype or type that does not fit.
        ValueError: a shape, device, scale or count that does not fit; counts are checked on CPU, elsewhere one too large is
            all of its half.

    Source: softmax statistics as in FlashAttention-2 (Dao, 2023), section 3.
    """
    _check(q, k, v, n_memory, valid_memory, valid_tokens, tail)
    if tail is not None:
        q = q[:, -tail:]
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    backend = backends.choose("window_attention", q, backend)
    if backend == "reference":
        return reference(q, k, v, n_memory=n_memory, valid_memory=valid_memory, valid_tokens=valid_tokens, scale=scale)
    valid_memory, valid_tokens = (None if x is None else x.contiguous() for x in (valid_memory, valid_tokens))
    out, _ = _run(*checks.unit_stride(q, k, v), valid_memory, valid_tokens, n_memory, scale, backend=backend)
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, n_memory: int, valid_memory: Tensor | None, valid_tokens: Tensor | None, tail: int | None
) -> None:
    checks.shape("q", q, {"N": None, "W": None, "H": None, "D": None})
    checks.floating("q", q)
    n_windows, n_queries, n_heads, head_dim = q.shape
    checks.shape("k", k, {"N": n_windows, "W": None, "H_kv": None, "D": head_dim})
    window, n_kv_heads = k.shape[1:3]
    checks.shape("v", v, {"N": n_windows, "W": window, "H_kv": n_kv_heads, "D": head_dim})
    checks.like("k", k, "q", q)
    checks.like("v", v, "q", q)
    checks.head_groups(n_heads, n_kv_heads)
    if window > MAX_WINDOW:
        raise ValueError(f"a window holds at most {MAX_WINDOW} entries, got W = {window} in k of shape {tuple(k.shape)}")
    checks.integer("n_memory", n_memory)
    if tail is not None:
        checks.integer("tail", tail)
        if not 1 <= tail <= window:
            raise ValueError(f"tail must lie in 1..W = 1..{window}, got {tail}")
    if n_queries != window and n_queries != tail:
        expected = f"W = {window}" if tail is None else f"W = {window} or tail = {tail}"
        raise ValueError(f"q must hold {expected} entries per window, got {n_queries} in shape {tuple(q.shape)}")
    if not 0 <= n_memory <= window:
        raise ValueError(f"n_memory must lie in 0..W = 0..{window}, got {n_memory}")
    for name, valid, upper in (("valid_memory", valid_memory, n_memory), ("valid_tokens", valid_tokens, window - n_memory)):
        if valid is not None:
            checks.counts(name, valid, n_windows, upper, q)


def _empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid_memory: Tensor | None,
    valid_tokens: Tensor | None,
    n_memory: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out (N, T, H, D) and the log-sum-exp of the scores (N, H, T)."""
    n_windows, n_queries, n_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((n_windows, n_heads, n_queries), dtype=accumulation_dtype(q.dtype))


_run = register(_empty, kept=2, gradients=3)
