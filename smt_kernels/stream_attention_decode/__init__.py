"""One decoding step of stream attention: one query per row over a ring of tokens and a ring of memory slots, in one softmax.

out = sum_j softmax_j(scale * q . k_j) v_j    over the entries of both rings that exist

The folder, in the order to read it:

    reference.py   the definition
    blocked.py     the same as one call of PyTorch's attention, for any device
    kernels.py     the Triton kernel, and what launches it
    settings.py    with how many warps and in what blocks, by chip and head size

Before the kernel: ``smt_kernels.tiles``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.operators import is_transformed, register
from smt_kernels.stream_attention_decode.blocked import forward as blocked
from smt_kernels.stream_attention_decode.reference import stream_attention_decode as reference


def stream_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    n_tokens: Tensor,
    n_slots: Tensor,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one query per row to the tokens and the memory slots that the row holds.

    The rings are ``stream_attention``'s window kept from step to step: a row that has seen n entries holds them in 0..n-1, and
    once n passes the size of the ring, the newest take the place of the oldest. The order of entries does not matter, since
    positions are already in the keys. A query with nothing to see gets zeros.

    Args:
        q: queries (B, H, D).
        k, v: keys and values of tokens (B, M, H_kv, D) in the dtype of q; H is a multiple of H_kv.
        memory_k, memory_v: keys and values of slots (B, N, H_kv, D), N >= 0.
        n_tokens, n_slots: (B,) int32, how many entries of each ring exist in each row; what the others hold has no influence.
        scale: factor of the scores; None: 1 / sqrt(D).
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``. The Triton kernel has no
            backward: where a gradient is required, ``blocked`` runs, and asking for ``triton`` is an error.

    Returns:
        (B, H, D) in the dtype of q.

    Raises:
        TypeError: a dtype or type that does not fit.
        ValueError: a shape, device, scale or count that does not fit, or ``triton`` where a gradient is required; counts are
            checked on CPU, elsewhere one too large is all of its ring.

    Source: query heads that share keys are the rows of one product, as in FlashDecoding (Dao et al., 2023).
    """
    _check(q, k, v, memory_k, memory_v, n_tokens, n_slots)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    tensors = q, k, v, memory_k, memory_v
    obstacle = None
    # Tensors of a transform do not tell.
    if torch.is_grad_enabled() and (is_transformed() or any(x.requires_grad for x in tensors)):
        obstacle = "a gradient is required, and its kernel has no backward"
    backend = backends.choose("stream_attention_decode", q, backend, obstacle=obstacle)
    if backend == "reference":
        return reference(*tensors, n_tokens=n_tokens, n_slots=n_slots, scale=scale)
    if backend == "blocked":
        return blocked(*tensors, n_tokens, n_slots, scale)
    return _run(*checks.unit_stride(*tensors), n_tokens.contiguous(), n_slots.contiguous(), scale, backend=backend)


def _check(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, n_tokens: Tensor, n_slots: Tensor) -> None:
    checks.shape("q", q, {"B": None, "H": None, "D": None})
    checks.floating("q", q)
    n_batch, n_heads, head_dim = q.shape
    checks.shape("k", k, {"B": n_batch, "M": None, "H_kv": None, "D": head_dim})
    ring, n_kv_heads = k.shape[1:3]
    checks.shape("v", v, {"B": n_batch, "M": ring, "H_kv": n_kv_heads, "D": head_dim})
    expected = {"B": n_batch, "N": None, "H_kv": n_kv_heads, "D": head_dim}
    checks.shape("memory_k", memory_k, expected, may_be_empty=("N",))
    checks.shape("memory_v", memory_v, expected | {"N": memory_k.shape[1]}, may_be_empty=("N",))
    for name, tensor in (("k", k), ("v", v), ("memory_k", memory_k), ("memory_v", memory_v)):
        checks.like(name, tensor, "q", q)
    checks.head_groups(n_heads, n_kv_heads)
    checks.counts("n_tokens", n_tokens, n_batch, ring, q, dim="B")
    checks.counts("n_slots", n_slots, n_batch, memory_k.shape[1], q, dim="B")


def _empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    n_tokens: Tensor,
    n_slots: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    """out (B, H, D)."""
    return q.new_empty(q.shape)


# For triton alone: blocked is one operation of PyTorch, which compilers and autograd know themselves.
_run = register(_empty)
