"""Attention pooling: each window of memory slots and tokens becomes one vector.

    x^_i = x_i / rms(x_i);   u = W_k^T W_q mean_i(x^_i);   a = softmax_i(u . x^_i / sqrt(d_k));   pooled = sum_i a_i x^_i

``attention_pool`` takes windows; ``attention_pool_sequence`` takes the tokens and slots that the windows of many writes share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.attention_pool import arguments, reference
from smt_kernels.direct import direct
from smt_kernels.window import WindowSpec

# Where the writes, tokens and slots of a sequence lie, in the order in which the operation takes it.
TIMELINE = ("first_write", "n_writes", "write_group", "first_step", "first_slot")


def attention_pool(
    windows: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    *,
    n_memory: int,
    valid_memory: Tensor | None = None,
    valid_tokens: Tensor | None = None,
    normalise: bool = True,
    dropout_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool each of N windows of W entries, the first ``n_memory`` of which are memory slots, by attention from its own mean.

    Args:
        windows: (N, W, d). What stands at entries that do not exist has no influence.
        w_q, w_k: projections (d_k, d) in the dtype of windows.
        n_memory: memory entries per window, 0 <= n_memory <= W.
        valid_memory, valid_tokens: (N,) int32, how many entries of each right-aligned half exist; None: all. Every window must
            have at least one (checked on CPU; elsewhere a window without entries gives nan).
        normalise: divide every entry by its root mean square first (eps 1e-5), for mean, scores and sum alike.
        dropout_mask: (N, W) in the dtype of windows, factors of the weights (0 or 1 / (1 - p)), not differentiated; None: 1.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        pooled (N, d) and the weights before dropout (N, W), 0 where an entry does not exist, in the dtype of windows.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or count that does not fit, or a window without entries.

    Source: DESIGN 2.1 and 4.3; Bahdanau et al. (2015) pooling with the scores of Vaswani et al. (2017), section 3.2.1.
    """
    arguments.check_windows(windows, n_memory, valid_memory, valid_tokens)
    n_windows, size, _ = windows.shape
    arguments.check_projections("windows", windows, w_q, w_k)
    arguments.check_dropout("windows", windows, dropout_mask, {"N": n_windows, "W": size})
    exists = None
    if valid_memory is not None or valid_tokens is not None:
        window = WindowSpec(n_memory, size - n_memory, stride=None)
        exists = window.entry_exists(valid_memory, valid_tokens, windows.device)
    backend = backends.choose("attention_pool", windows, backend)
    if backend == "reference":
        if exists is None:
            exists = torch.ones(1, size, dtype=torch.bool, device=windows.device)
        mask = None if dropout_mask is None else dropout_mask.detach()
        return reference.attention_pool(windows, w_q, w_k, exists, normalise=normalise, dropout_mask=mask)
    windows, w_q, w_k = checks.unit_stride(windows, w_q, w_k)
    pooled, weights, *_ = _forward(windows, w_q, w_k, exists, dropout_mask, normalise, backend)
    return pooled, weights.to(windows.dtype)


def attention_pool_sequence(
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    *,
    window: WindowSpec,
    first_write: int,
    n_writes: int,
    write_group: int = 1,
    first_step: int = 0,
    first_slot: int = 0,
    normalise: bool = True,
    dropout_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool the windows of ``n_writes`` consecutive writes straight from a sequence of tokens and slots.

    Write w, made at step t = stride * (w + 1), pools the last ``window.n_memory`` slots of earlier groups and the tokens
    (t - ``window.n_tokens``, t], of both those that are held: what lies before the first held token or slot, or after the last
    held slot, does not exist. The same as ``attention_pool`` on windows cut out of the sequence. A gradient has the length of
    ``tokens``: pass the tokens that the writes need (the last ``n_tokens + stride * (n_writes - 1)``) and not a long past.

    Args:
        tokens: (B, T, d), of which tokens[:, 0] is step ``first_step``. Holds at least the write steps of all writes.
        slots: (B, K, d) in the dtype of tokens, of which slots[:, 0] is slot ``first_slot``, K >= 0; None: pool tokens only.
        w_q, w_k: projections (d_k, d) in the dtype of tokens.
        window: sizes and stride of the window.
        first_write, n_writes: the writes, ``first_write >= 0``, ``n_writes >= 1``.
        write_group: writes per group, at least 1; the slots of the group itself are not pooled.
        first_step, first_slot: what the first token and slot are called; negative where they precede the sequence.
        normalise: divide every entry by its root mean square first (eps 1e-5), for mean, scores and sum alike.
        dropout_mask: (B, n_writes, W) in the dtype of tokens, factors of the weights (0 or 1 / (1 - p)), not differentiated.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        pooled (B, n_writes, d) and the weights before dropout (B, n_writes, W), 0 where an entry does not exist, in the dtype
        of tokens; W is ``window.size``, without slots ``window.n_tokens``.

    Raises:
        TypeError: a dtype or the type of a setting that does not fit.
        ValueError: a shape, device or setting that does not fit, or tokens that do not reach from the first to the last write.

    Source: DESIGN 2.1 (``write_group``) and 4.3.
    """
    checks.shape("tokens", tokens, {"B": None, "T": None, "d": None})
    checks.floating("tokens", tokens)
    batch, length, width = tokens.shape
    if slots is not None:
        checks.shape("slots", slots, {"B": batch, "K": None, "d": width}, may_be_empty=("K",))
        checks.like("slots", slots, "tokens", tokens)
    arguments.check_projections("tokens", tokens, w_q, w_k)
    arguments.check_timeline(window, first_write, n_writes, write_group, first_step, first_slot, length)
    size = window.n_tokens if slots is None else window.size
    arguments.check_dropout("tokens", tokens, dropout_mask, {"B": batch, "n_writes": n_writes, "W": size})
    backend = backends.choose("attention_pool_sequence", tokens, backend)
    timeline = (first_write, n_writes, write_group, first_step, first_slot)
    if backend == "reference":
        mask = None if dropout_mask is None else dropout_mask.detach()
        settings = dict(zip(TIMELINE, timeline, strict=True), normalise=normalise, dropout_mask=mask)
        return reference.attention_pool_sequence(tokens, slots, w_q, w_k, window=window, **settings)
    tokens, w_q, w_k = checks.unit_stride(tokens, w_q, w_k)
    spec = (window.n_memory, window.n_tokens, window.stride)
    pooled, weights, *_ = _call_sequence(tokens, slots, w_q, w_k, dropout_mask, spec, timeline, normalise, backend)
    return pooled, weights.to(tokens.dtype)


def _kept(x: Tensor, rows: tuple[int, ...], sizes: Sequence[int], backend: str) -> list[Tensor]:
    """Empty weights, mean, query and u as ``backend`` keeps them: Triton multiplies the last three in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dtypes = (wide, *[x.dtype if backend == "triton" else wide] * 3)
    return [x.new_empty((*rows, size), dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]


@torch.library.custom_op("smt_kernels::attention_pool", mutates_args=())
def _forward(
    windows: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    exists: Tensor | None,
    dropout_mask: Tensor | None,
    normalise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    forward = backends.implementation("attention_pool", backend).forward
    return forward(windows, w_q, w_k, exists, dropout_mask, normalise)


@_forward.register_fake
def _(windows, w_q, w_k, exists, dropout_mask, normalise, backend):
    (n_windows, size, width), rank = windows.shape, w_q.shape[0]
    return windows.new_empty((n_windows, width)), *_kept(windows, (n_windows,), (size, width, rank, width), backend)


@torch.library.custom_op("smt_kernels::attention_pool_backward", mutates_args=())
def _backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    windows: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    exists: Tensor | None,
    dropout_mask: Tensor | None,
    weights: Tensor,
    mean: Tensor,
    query: Tensor,
    u: Tensor,
    normalise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = backends.implementation("attention_pool", backend).backward
    return backward(grad_pooled, grad_weights, windows, w_q, w_k, exists, dropout_mask, weights, mean, query, u, normalise)


@_backward.register_fake
def _(grad_pooled, grad_weights, windows, w_q, w_k, *others):
    return windows.new_empty(windows.shape), w_q.new_empty(w_q.shape), w_k.new_empty(w_k.shape)


def _compute_sequence(
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    dropout_mask: Tensor | None,
    window: Sequence[int],
    timeline: Sequence[int],
    normalise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    forward = backends.implementation("attention_pool", backend).forward_sequence
    return forward(tokens, slots, w_q, w_k, dropout_mask, WindowSpec(*window), timeline, normalise)


_forward_sequence = torch.library.custom_op("smt_kernels::attention_pool_sequence", _compute_sequence, mutates_args=())


@_forward_sequence.register_fake
def _(tokens, slots, w_q, w_k, dropout_mask, window, timeline, normalise, backend):
    (batch, _, width), rank, n_writes = tokens.shape, w_q.shape[0], timeline[1]
    size = window[1] if slots is None else window[0] + window[1]
    return tokens.new_empty((batch, n_writes, width)), *_kept(tokens, (batch, n_writes), (size, width, rank, width), backend)


def _sequence_gradients(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    dropout_mask: Tensor | None,
    weights: Tensor,
    mean: Tensor,
    query: Tensor,
    u: Tensor,
    window: Sequence[int],
    timeline: Sequence[int],
    normalise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = backends.implementation("attention_pool", backend).backward_sequence
    inputs = tokens, slots, w_q, w_k, dropout_mask
    return backward(grad_pooled, grad_weights, *inputs, weights, mean, query, u, WindowSpec(*window), timeline, normalise)


_backward_sequence = torch.library.custom_op(
    "smt_kernels::attention_pool_sequence_backward", _sequence_gradients, mutates_args=()
)


@_backward_sequence.register_fake
def _(grad_pooled, grad_weights, tokens, slots, w_q, w_k, *others):
    return tuple(tokens.new_empty(0) if t is None else t.new_empty(t.shape) for t in (tokens, slots, w_q, w_k))


def _setup_context(ctx, inputs, output):
    """The tensors come first in the inputs of both operations, then their settings."""
    n_tensors = 5
    _, weights, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:n_tensors], weights, *kept)
    ctx.settings = inputs[n_tensors:]


def _autograd(backward):
    def autograd(ctx, grad_pooled, grad_weights, *_):
        *inputs, weights, mean, query, u = ctx.saved_tensors
        if grad_pooled is None:
            grad_pooled = torch.zeros_like(u)
        grads = backward(grad_pooled, grad_weights, *inputs, weights, mean, query, u, *ctx.settings)
        grads = [None if given is None else grad for given, grad in zip(inputs, grads, strict=False)]
        return *grads, *(None for _ in range(len(ctx.needs_input_grad) - len(grads)))

    return autograd


_forward.register_autograd(_autograd(_backward), setup_context=_setup_context)
_forward_sequence.register_autograd(_autograd(_backward_sequence), setup_context=_setup_context)
_call_sequence = direct(_forward_sequence, _compute_sequence, _setup_context, _autograd(_sequence_gradients))
